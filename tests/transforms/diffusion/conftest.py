from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from medgen.conditions.attributes import Attribute
from medgen.conditions.edge import EdgeSettings
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser, TextEncoder

WORDS = ("heart", "large", "small")


def build_generator(
    spatial_dims: int = 2, *, channels: int = 1, conditions: Sequence[str] = ("mask",), **config: object
) -> Generator:
    """A real generator of a few thousand weights: untrained, but every weight takes part."""
    torch.manual_seed(0)
    attributes = {name: Attribute("number", mean=50.0, std=10.0) for name in conditions if name == "age"}
    text = "text" in conditions
    denoiser = Denoiser(
        spatial_dims=spatial_dims,
        in_channels=2,
        channels=(8, 16),
        attention_levels=(False, text),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=4,
        mask_classes=3 if "mask" in conditions else 0,
        mask_channels=4,
        mask_stride=2,
        edges="edge" in conditions,
        text_length=6 if text else 0,
        text_width=8 if text else 0,
        attributes={name: attribute.features for name, attribute in attributes.items()},
    )
    autoencoder = Autoencoder(spatial_dims=spatial_dims, in_channels=channels, channels=(4, 8), latent_channels=2)
    for part in (autoencoder, denoiser):
        for weight in part.parameters():
            if not weight.any():  # new diffusion networks end in zeros, and would ignore their input
                torch.nn.init.normal_(weight, std=0.1)
    values = {
        "name": f"tiny-{spatial_dims}d",
        "spatial_dims": spatial_dims,
        "channel_names": {index: f"channel {index}" for index in range(channels)},
        "class_names": {0: "background", 1: "organ", 2: "lesion"},
        "size": (8,) * spatial_dims,
        "objective": Objective(),
        "normalization": Normalization(),
        "intensity": IntensityMap((0.002,) * channels, (-1.0,) * channels),
        "spacing": (1.0, 1.0, 1.0) if spatial_dims == 3 else None,
        "orientation": "RAS" if spatial_dims == 3 else None,
        "latent_scale": (1.0, 1.0),
        "latent_shift": (0.0, 0.0),
        "edge": EdgeSettings(smoothing=1.0) if "edge" in conditions else None,
        "attributes": attributes,
    }
    encoder = TextEncoder(WORDS, width=8, depth=1, heads=2, length=6) if text else None
    return Generator(GeneratorConfig(**{**values, **config}), denoiser, autoencoder=autoencoder, text_encoder=encoder)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    return build_generator


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 2D model that label maps steer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_generator().save_pretrained(folder)
    return folder
