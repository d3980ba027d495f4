from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from medgen.planning import AutoencoderPlan, DenoiserPlan, LabelPlan, Plan

NETWORK = {
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "mask_channels": 4,
    "batch_size": 2,
    "steps": 8,
    "variants": 2,
}


def build_plan(spatial_dims: int = 2, **changes: object) -> Plan:
    """A plan of all stages that runs in seconds; a mapping changes single settings of a stage."""
    plan = Plan(
        name="tiny",
        spatial_dims=spatial_dims,
        channel_names={0: "image"},
        class_names={0: "background", 1: "ball"},
        size=(16,) * spatial_dims,
        image_dtype="uint8",
        autoencoder=AutoencoderPlan(
            channels=(8, 8),
            latent_channels=2,
            patch_size=(16,) * spatial_dims,
            batch_size=2,
            steps=8,
            adversarial_start=4,
            discriminator_channels=4,
        ),
        denoiser=DenoiserPlan(**NETWORK),
        label=LabelPlan(**NETWORK),
        precision="fp32",
        validate_every=4,
        checkpoint_every=3,
    )
    whole = {
        key: dataclasses.replace(own, **value)
        if isinstance(value, dict) and dataclasses.is_dataclass(own := getattr(plan, key))
        else value
        for key, value in changes.items()
    }
    return dataclasses.replace(plan, **whole)


@pytest.fixture(scope="session")
def tiny_plan() -> Callable[..., Plan]:
    return build_plan
