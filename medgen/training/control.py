"""Training on a finished model, a control branch or the model itself: what is planned from it, and what learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from medgen.data.dataset import Dataset
from medgen.generator import Generator
from medgen.networks import Control, Denoiser
from medgen.planning import (
    AutoencoderPlan,
    ConditionsPlan,
    Plan,
    TextPlan,
    TuningPlan,
    learned_from,
    make_plan,
    without_labels,
)
from medgen.types import BadInputError

if TYPE_CHECKING:
    from medgen.networks import LatentBaseControl, LatentBaseDenoiser

    AnyDenoiser = Denoiser | LatentBaseDenoiser
    AnyControl = Control | LatentBaseControl
_TUNING_RATE = 1e-4


class ControlledDenoiser(nn.Module):
    """A denoiser with control branches, called as a denoiser is: a branch learns, or the denoiser does.

    Gradients reach a branch through the second half of the base, so that its activations would be kept on top of the
    branch's own: more than training the whole base keeps. Both therefore recompute theirs in the backward pass. A base
    that is tuned learns with what its branches add, as it will be used; they need no backward pass.

    Args:
        base: Stays as it is, unless it is tuned.
        *controls: The branch that learns; or all branches of a base that is tuned, which stay as they are.
        tunes_base: Whether the base learns.
    """

    def __init__(self, base: AnyDenoiser, *controls: AnyControl, tunes_base: bool = False) -> None:
        super().__init__()
        self.base, self.controls, self.tunes_base = base, nn.ModuleList(controls), tunes_base
        self.reads: list[str] = [control.config["condition"] for control in controls]
        if tunes_base:
            self.controls.requires_grad_(False)
            return
        base.requires_grad_(False)
        for network in (base, *controls):
            network.checkpoint_blocks()

    @property
    def learner(self) -> nn.Module:
        """The network that learns."""
        return self.base if self.tunes_base else self.controls[0]

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the base."""
        return self.base.config

    def checkpoint_blocks(self) -> None:
        """Recompute activations of a base that is tuned; a branch that learns and its base do so as it is."""
        if self.tunes_base:
            self.base.checkpoint_blocks()

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        augmented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output of the steered base, as :meth:`medgen.networks.Denoiser.forward`."""
        residuals = [
            control(x, timesteps, conditions, augmented)
            for name, control in zip(self.reads, self.controls, strict=True)
            if name in conditions or not self.tunes_base  # what learns takes part in every step
        ]
        built_in = self.base.condition_shapes(x.shape[2:])
        parts = {name: part for name, part in conditions.items() if name in built_in}
        return self.base(x, timesteps, parts, augmented, residuals=residuals)


def new_control(base: AnyDenoiser, condition: str, num_classes: int) -> AnyControl:
    """An untrained control branch.

    Args:
        base: The denoiser to steer.
        condition: ``"mask"`` or ``"edge"``.
        num_classes: Classes of the label map, with background.

    Returns:
        The branch, which adds nothing yet.
    """
    classes = num_classes if condition == "mask" else 0
    if isinstance(base, Denoiser):
        return Control.of(base, condition, mask_classes=classes)
    from medgen.networks import LatentBaseControl  # takes long to import

    return LatentBaseControl.of(base, condition, mask_classes=classes)


def plan_on(
    base: Generator,
    dataset: Dataset,
    conditions: Sequence[str],
    *,
    lora_rank: int | None = None,
    device: str = "auto",
) -> Plan:
    """Plan for training on a finished model: a control branch for a new condition, or the model tuned by its own.

    Args:
        base: The model.
        dataset: The scans to learn from.
        conditions: One that the model lacks, ``"mask"`` or ``"edge"``, for a branch; or any that it has, by which it is
            tuned to these scans: the others are not read of them, so that ``"none"`` reads neither label maps nor
            texts.
        lora_rank: Rank of the low-rank changes by which it is tuned; None tunes all weights of the denoiser.
        device: ``auto``, ``cpu``, ``cuda`` or any torch device.

    Returns:
        The plan: grid and networks are the model's, the pace is that of this machine. A model that came without
        intensities of scans, such as Stable Diffusion, gets those of the data.

    Raises:
        BadInputError: If the conditions can be neither, or the data does not have them.
    """
    config = base.config
    if dataset.spatial_dims != config.spatial_dims or len(dataset.channel_names) != len(config.channel_names):
        raise BadInputError(
            f"{dataset.root}: expected {config.spatial_dims}D scans of {len(config.channel_names)} channel(s), as the "
            f"base '{config.name}' makes, got {dataset.spatial_dims}D scans of {len(dataset.channel_names)}. Take "
            "another base."
        )
    new = [name for name in conditions if name not in base.conditions and name != "none"]
    if len(new) > 1 or (new and (len(conditions) > 1 or new[0] not in ("mask", "edge"))):
        raise BadInputError(
            f"conditions: expected mask or edge alone, for a control branch, or some of those that steer model "
            f"'{config.name}' already ({', '.join(base.conditions) or 'none'}), to tune it, got "
            f"{', '.join(conditions)}. Add one branch after the other."
        )
    if new and lora_rank is not None:
        raise BadInputError(f"lora_rank: expected none for a control branch, got {lora_rank}. Leave it out.")
    named = tuple(name for name in dict.fromkeys(conditions) if name != "none")
    if not new and "mask" not in named:
        dataset = without_labels(dataset)
    pace = make_plan(dataset, conditions=conditions, device=device)
    steered = _all_conditions(base, pace.denoiser.conditions)
    foreign, knows = "pipeline" in config.training, _knows_classes(base)  # a pipeline knows nothing of scans
    control: Literal["mask", "edge"] | None = None
    if new:
        control = "mask" if new[0] == "mask" else "edge"
    return dataclasses.replace(
        pace,
        name=f"{config.name}-{new[0]}" if new else f"{config.name}-{pace.name}",
        channel_names=pace.channel_names if foreign else dict(config.channel_names),
        # Names are kept where the scans bring none: label maps may steer by their outlines.
        class_names=dict(config.class_names if knows or len(pace.class_names) == 1 else pace.class_names),
        size=_size(base, pace) if foreign else tuple(config.size),
        spacing=pace.spacing if foreign else config.spacing,
        orientation=config.orientation,
        normalization=pace.normalization if foreign else config.normalization,
        image_dtype=pace.image_dtype if foreign else config.image_dtype,
        autoencoder=_autoencoder(base),
        denoiser=dataclasses.replace(
            pace.denoiser,
            objective=config.objective,
            conditions=steered,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            # What was tuned to scans goes on gently.
            learning_rate=pace.denoiser.learning_rate if new else _TUNING_RATE,
        ),
        label=None,
        control=control,
        tuning=None if new else TuningPlan(lora_rank, conditions=named),
    )


def check_base(base: Generator, plan: Plan, dataset: Dataset) -> None:
    """Make sure that a plan, which may have been edited, fits the finished model that it goes on from.

    Args:
        base: The model.
        plan: The plan.
        dataset: The scans that it is to be followed on.

    Raises:
        BadInputError: If the model lacks a class of the plan or of the scans, or what steers in the plan.
    """
    config = base.config
    if _knows_classes(base):
        found = learned_from(plan, dataset).class_names
        unknown = {value: name for value, name in found.items() if value not in config.class_names}
        if unknown:
            raise BadInputError(
                f"{dataset.root}: expected the classes {config.class_names}, which the networks of the base "
                f"'{config.name}' are built for, got {unknown} too. Take another base, or remap the labels."
            )
        if plan.class_names.keys() != config.class_names.keys():
            raise BadInputError(
                f"class_names: expected the classes {config.class_names}, which the networks of the base "
                f"'{config.name}' are built for, got {plan.class_names} in the plan. Put them back, or take another "
                "base."
            )
    lacking = [name for name in plan.denoiser.conditions.names if name not in (*base.conditions, plan.control)]
    if lacking:
        raise BadInputError(
            f"denoiser.conditions: expected what steers the base '{config.name}' "
            f"({', '.join(base.conditions) or 'none'}), got {', '.join(lacking)} too in the plan. Take it out, or take "
            "another base."
        )


def _knows_classes(base: Generator) -> bool:
    """Whether a network of the model reads or makes label maps, which binds it to their classes."""
    return "mask" in base.conditions or base.label_denoiser is not None


def _all_conditions(base: Generator, wanted: ConditionsPlan) -> ConditionsPlan:
    """What steers the model and is wanted; a branch takes along what steers its base."""
    config, text = base.config, None
    if base.text_encoder is not None:
        text = TextPlan(template=config.text_template, length=base.text_encoder.length, width=base.text_encoder.width)
    return ConditionsPlan(
        mask=wanted.mask or "mask" in base.conditions,
        mask_form=config.mask_form if "mask" in base.conditions else wanted.mask_form,
        edge=config.edge or wanted.edge,
        text=text,
        attributes=dict(config.attributes),
        drop_all=wanted.drop_all,
    )


def _autoencoder(base: Generator) -> AutoencoderPlan | None:
    """As much of the model's autoencoder as its latents depend on."""
    if base.autoencoder is None:
        return None
    return AutoencoderPlan(
        channels=(1,) * (1 + int(math.log2(base.compression))),
        latent_channels=base.denoiser.config["in_channels"],
        patch_size=(base.compression,) * base.config.spatial_dims,
        adversarial_weight=0.0,
        feature_weight=0.0,
    )


def _size(base: Generator, pace: Plan) -> tuple[int, ...]:
    """Size of the scans, not above that of the base, in whole blocks."""
    unit = base.compression * 8
    return tuple(max(unit, min(n, most) // unit * unit) for n, most in zip(pace.size, base.config.size, strict=True))
