"""What a generator was trained for, and how its control branches are used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from medgen.conditions.attributes import Attribute
from medgen.conditions.edge import EdgeSettings
from medgen.conditions.mask import MaskForm
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator.familiarity import Familiarity
from medgen.types import BadInputError


@dataclass(frozen=True)
class ControlUse:
    """How a control branch takes part in sampling.

    Attributes:
        conditioning_scale: Factor on what it adds; 1 is as trained, 0 switches it off.
        start: Share of the noise process, counted from pure noise, at which it begins. Diffusers has a share of the
            steps in its place, which is another time unless the steps are evenly spaced.
        end: Share at which it ends; 1 is the finished image.
    """

    conditioning_scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            BadInputError: If the scale is negative or not finite, or the shares do not rise within [0, 1].
        """
        if not (math.isfinite(self.conditioning_scale) and self.conditioning_scale >= 0):
            raise BadInputError(
                f"conditioning_scale: expected a finite number of 0 or more, got {self.conditioning_scale}."
            )
        if not 0 <= self.start < self.end <= 1:
            raise BadInputError(
                "control start and end: expected rising shares of the noise process in [0, 1], counted from pure "
                f"noise, got {self.start} and {self.end}. 0 and 1 is all of it."
            )


@dataclass
class GeneratorConfig:
    """What a generator was trained for.

    Attributes:
        name: Name of the model.
        spatial_dims: 2 or 3.
        channel_names: Image channels, in file order.
        class_names: Label value to name; 0 is the background.
        size: Least voxels per axis on the model's grid.
        objective: What the denoiser predicts.
        normalization: How real intensities map to [-1, 1].
        intensity: Map typical of the training set; its inverse gives synthetic scans source-like intensities.
        image_dtype: Number type of synthetic images.
        modality: What the scanner was.
        spacing: Voxel size in mm of the model's grid, or None for any.
        orientation: Axis codes of the model's grid, or None.
        latent_scale: Per latent channel, factor to unit variance.
        latent_shift: Per latent channel, mean before scaling.
        label_objective: What the label denoiser predicts.
        label_stride: Voxels per axis that one voxel of the label generator covers.
        guidance_scale: Default at synthesis.
        guidance_scales: The same of single conditions, where it is another.
        temperature: Default at synthesis, of images; label maps are drawn at 1.
        shapes: Shapes of training scans on the model's grid before padding, to draw new fields of view from.
        constant_classes: Label values that every training case has.
        max_parts: Connected parts of the foreground that 5 % of the training cases exceed at most; 0 sets no limit.
        mask_form: How label maps that steer it are written as numbers.
        edge: How edges were extracted from the training scans; None if edges do not steer it.
        attributes: Facts that steer it, and how they are written as numbers.
        text_template: How its training texts were made of columns of the metadata; None if they were a column.
        text_padding: Whether its text encoder embeds the padding too, as Stable Diffusion's does.
        familiarity: How to tell scans that it knows from others; None where it was not learned.
        training: Summary for the card: data, steps, seeds, versions; also which ControlNet was put beside it.
    """

    name: str
    spatial_dims: int
    channel_names: dict[int, str]
    class_names: dict[int, str]
    size: tuple[int, ...]
    objective: Objective
    normalization: Normalization
    intensity: IntensityMap
    image_dtype: Literal["uint8", "uint16", "int16", "float32"] = "int16"
    modality: str | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = "RAS"
    latent_scale: tuple[float, ...] = (1.0,)
    latent_shift: tuple[float, ...] = (0.0,)
    label_objective: Objective | None = None
    label_stride: int = 1
    guidance_scale: float = 1.5
    guidance_scales: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    shapes: tuple[tuple[int, ...], ...] = ()
    constant_classes: tuple[int, ...] = ()
    max_parts: int = 0
    mask_form: MaskForm = "one_hot"
    edge: EdgeSettings | None = None
    attributes: dict[str, Attribute] = field(default_factory=dict)
    text_template: str | None = None
    text_padding: bool = False
    familiarity: Familiarity | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def edges_are_outlines(self) -> bool:
        """Whether it was trained on edges of 0 and 1; a ControlNet that was put beside it may be on any."""
        return self.edge is not None and self.edge.method == "canny" and "edge_control" not in self.training


def parse_config(values: dict[str, Any], path: Path) -> GeneratorConfig:
    """Settings of a generator from JSON values.

    Args:
        values: As :func:`dataclasses.asdict` gives them.
        path: Their file, for messages.

    Returns:
        The settings.

    Raises:
        BadInputError: If they are not those of a generator.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GeneratorConfig, "config")
    try:
        return parser.instantiate_classes(parser.parse_object({"config": values})).config
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path}: expected settings of a medgen generator, got others ({error}). Copy the model again."
        ) from error
