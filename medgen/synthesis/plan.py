"""What a run will make: a fixed list of samples, known before the first one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medgen.data.dataset import Rejection, load_label, read_labels, require_orientation
from medgen.data.geometry import place
from medgen.generator import GeneratorConfig
from medgen.provenance import hide_folder, sha256_file
from medgen.seeding import derive_seed
from medgen.types import BadInputError, Grid

LabelSource = Literal["files", "deform", "generate"]

# Between these factors labels are resampled to the model's voxel size; beyond them the structures that the model
# learned to draw would be lost or invented.
_SPACING_FACTOR = 2.0


@dataclass(frozen=True)
class LabelFile:
    """A label map of the user's that fits the model.

    Attributes:
        path: The file.
        sha256: Digest of its bytes.
    """

    path: Path
    sha256: str


@dataclass(frozen=True)
class SampleSpec:
    """One sample to make, complete: it does not depend on the rest of the run.

    Attributes:
        case: Identifier.
        index: Position in the plan.
        seed: Seed of all its draws.
        source: Where its label comes from.
        file: Label map that is taken or deformed; None for ``generate``.
    """

    case: str
    index: int
    seed: int
    source: LabelSource
    file: LabelFile | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """What decides the voxels besides the plan.

    Attributes:
        sampler: Name of the sampler.
        sampler_spacing: Name of its timestep spacing.
        num_inference_steps: Network steps.
        guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond); None is the model's own.
        temperature: Factor on the noise that an image starts from; None is the model's own.
        precision: ``"fp32"`` or ``"bf16"``.
        max_memory_gb: Bound for decoding; None decodes in one piece.
    """

    sampler: str = "dpm++2m"
    sampler_spacing: str = "default"
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    temperature: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    max_memory_gb: float | None = None


def plan_samples(
    num_samples: int, *, seed: int = 0, source: LabelSource = "generate", files: Sequence[LabelFile] = ()
) -> list[SampleSpec]:
    """List the samples of a run; label files are taken in turn, each time with a new seed.

    Args:
        num_samples: How many.
        seed: Root seed; a sample's own seed depends on this and on its position only.
        source: Where the labels come from.
        files: Label maps for ``files`` and ``deform``.

    Returns:
        The plan. A longer one begins with the same samples.

    Raises:
        BadInputError: If there is nothing to do, or the source and the files do not go together.
    """
    if num_samples < 1:
        raise BadInputError(f"num_samples: expected at least 1, got {num_samples}.")
    if (source == "generate") == bool(files):
        needs = "no label files" if source == "generate" else "label files"
        raise BadInputError(
            f"label_source '{source}': expected {needs}, got {len(files)}. Give --labels FOLDER with 'files' or "
            "'deform', and none with 'generate'."
        )
    return [
        SampleSpec(
            case=f"synthetic_{index:05d}",
            index=index,
            seed=derive_seed(seed, index),
            source=source,
            file=files[index % len(files)] if files else None,
        )
        for index in range(num_samples)
    ]


def find_labels(
    folder: Path, config: GeneratorConfig, *, skip_bad: bool = False
) -> tuple[list[LabelFile], list[Rejection]]:
    """List the label maps of a folder, each read and checked against the model before any time is spent on sampling.

    Args:
        folder: Folder of label maps.
        config: What the model was trained for.
        skip_bad: Leave out maps that do not fit instead of stopping at the first.

    Returns:
        Maps that fit, by name, and those left out with the reason.

    Raises:
        BadInputError: If a map does not fit the model (or none does).
    """
    accepted: list[LabelFile] = []
    rejected: list[Rejection] = []
    for case, path in read_labels(folder):
        try:
            check_grid(path, load_label(path, config.class_names).grid, config)
        except BadInputError as error:
            if not skip_bad:
                raise
            rejected.append(Rejection(case, hide_folder(str(error), path.parent)))
            continue
        accepted.append(LabelFile(path, sha256_file(path)))
    if not accepted:
        raise BadInputError(f"{folder}: expected label maps that fit the model, got none. First: {rejected[0].reason}")
    return accepted, rejected


def check_grid(path: Path, grid: Grid, config: GeneratorConfig) -> None:
    """Refuse a label map whose voxels are not those that the model works on.

    Args:
        path: Its file, for the message.
        grid: Its voxel grid.
        config: What the model was trained for.

    Raises:
        BadInputError: If dimension, orientation or spacing do not fit.
    """
    if grid.spatial_dims != config.spatial_dims:
        raise BadInputError(
            f"{path}: expected a {config.spatial_dims}D label map for the model '{config.name}', got "
            f"{grid.spatial_dims}D of shape {grid.shape}. Choose another model or other labels."
        )
    require_orientation(path, grid, config.orientation)
    if config.spacing is None:
        return
    model = " x ".join(f"{value:.3g}" for value in config.spacing)
    if not grid.known:
        raise BadInputError(
            f"{path}: expected a label map that states its voxel size (the model works at {model} mm), got a format "
            "without one. Give it as NIfTI."
        )
    axes = place(grid, orientation=config.orientation).axes[0]
    own = [grid.spacing[axis] for axis in axes]
    factors = [mine / wanted for mine, wanted in zip(own, config.spacing, strict=True)]
    if max(factors) > _SPACING_FACTOR or min(factors) < 1 / _SPACING_FACTOR:
        got = " x ".join(f"{value:.3g}" for value in own)
        raise BadInputError(
            f"{path}: expected voxels within a factor {_SPACING_FACTOR:g} of the model's {model} mm, got {got} mm. "
            "Resample the label map, or train a model on scans of this spacing."
        )
