"""Edits of real scans: made anew inside a region and kept bit for bit elsewhere, or translated as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from medgen.conditions.attributes import SPACING
from medgen.conditions.condition import Condition
from medgen.conditions.edge import check_edges
from medgen.data.geometry import Placement, from_model, place, to_model
from medgen.data.intensity import IntensityMap
from medgen.diffusion.sampler import sample
from medgen.generator import Generator
from medgen.precision import autocast, exact_fp32, memory_format
from medgen.provenance import sha256_array
from medgen.seeding import seeded_noise
from medgen.synthesis.inputs import check_grid
from medgen.synthesis.labels import LabelledGrid
from medgen.synthesis.plan import SampleSpec, SamplingSettings
from medgen.synthesis.steering import (
    batch_condition,
    check_settings,
    check_steering,
    control_uses,
    guide,
    require_conditions,
    resolve_scales,
)
from medgen.types import BadInputError, Grid, Spacing


@dataclass(frozen=True, eq=False)
class Edited:
    """A scan after an edit.

    Attributes:
        image: ``(C, H, W[, D])`` in source units, of the type of the input.
        label: ``(H, W[, D])`` label after the edit; None where there was none.
        region: ``(H, W[, D])`` bool, where the scan was made anew.
        record: How, as JSON values: settings, conditions, and SHA-256 of image, region and label.
    """

    image: torch.Tensor
    label: torch.Tensor | None
    region: torch.Tensor
    record: dict[str, Any]


def edit(
    generator: Generator,
    image: torch.Tensor,
    label: torch.Tensor | None = None,
    *,
    grid: Grid,
    region: torch.Tensor | None = None,
    new_label: torch.Tensor | None = None,
    text: str | None = None,
    facts: Mapping[str, str] | None = None,
    edge: torch.Tensor | None = None,
    seed: int,
    strength: float = 1.0,
    band: int = 3,
    margin: int = 2,
    settings: SamplingSettings | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Edited:
    """Make part of a scan anew, for the label, text or facts that it is to have.

    A lesion comes in or goes out with a ``new_label`` that has it or has it no more (:func:`replace_label`); without
    one the region is painted anew for the label as it is. While sampling, all of the scan outside the region is known
    at each noise level (:func:`medgen.diffusion.sampler.sample`), so that what is made joins on to it.

    Outside the region widened by ``band`` the result is bit-identical to the scan. Inside the region it is the model's,
    within the intensities that the model's normalization keeps of the scan, rounded for integer types. In the band the
    two are mixed with weights that are linear in the distance to the region.

    Args:
        generator: The model, on its device.
        image: ``(C, H, W[, D])`` in source units, integer or float, on the CPU.
        label: ``(H, W[, D])`` values as in files: the label before the edit.
        grid: Grid of both; it decides how they are turned and resampled to the model's grid and back.
        region: ``(H, W[, D])`` bool, where the scan may change; None takes where ``label`` and ``new_label`` differ,
            widened by ``margin``.
        new_label: ``(H, W[, D])`` label after the edit, which the result gets as it is; None keeps ``label``.
        text: What the scan should show, in words.
        facts: Value of each attribute that is to steer it. A voxel size that is not given is that of the model grid.
        edge: ``(1, H, W[, D])`` edge strength in [0, 1] that it should follow.
        seed: Seed of its noise.
        strength: Share in (0, 1] of the noise process that is run: 1 makes the region from noise, less keeps more of
            what is there.
        band: Width of the blending band around the region, in voxels.
        margin: Voxels by which a region that is not given exceeds the difference of the labels: the border of a
            structure shows beyond its voxels.
        settings: How to sample; its guidance scale is the model's own where None.
        on_step: Called with the number of finished network steps.

    Returns:
        The scan, its label, and the region.

    Raises:
        BadInputError: If shapes differ, the scan is constant or does not fit the model, the region is empty or the
            labels differ outside of it, a number is out of range, the model lacks a condition that is asked for, or the
            settings do not go together.
    """
    config, settings = generator.config, settings or SamplingSettings()
    _check_arrays(generator, image, grid, label=label, new_label=new_label)
    if not 0 < strength <= 1:
        raise BadInputError(f"strength: expected a share in (0, 1], got {strength}. 1 makes the region from noise.")
    for name, width in (("band", band), ("margin", margin)):
        if width < 0:
            raise BadInputError(f"{name}: expected a width of 0 voxels or more, got {width}.")
    if new_label is not None:
        require_conditions(generator, {"mask": "new_label"})
    if region is None:
        region = _changed(label, new_label, margin)
    _check_region(region, grid, label, new_label)
    intensity = config.normalization.fit(image.float())
    placement = place(
        grid,
        spacing=config.spacing,
        orientation=config.orientation,
        min_size=config.size,
        divisor=generator.divisor,
    )
    after = label if new_label is None else new_label
    steered = None if "mask" not in generator.conditions else after
    item = _steered(generator, placement, steered, text=text, facts=facts or {}, edge=edge, seed=seed)
    settings = replace(
        settings,
        guidance_scale=resolve_scales(generator, settings.guidance_scale),
        temperature=config.temperature if settings.temperature is None else settings.temperature,
    )
    check_settings(generator, settings, generate=False)
    made, evaluations = _run_networks(generator, item, image, region, intensity, settings, strength, on_step)
    record = {
        "strength": float(strength),
        "band": band,
        "seed": seed,
        "voxels": int(region.sum()),
        "conditions": item.conditions,
        "edge_sha256": None if edge is None else sha256_array(edge),
        "settings": asdict(settings),
        "network_evaluations": evaluations,
        "model": config.name,
        "model_hash": generator.weights_hash,
        "image_sha256": sha256_array(image),
        "region_sha256": sha256_array(region),
        "label_sha256": None if after is None else sha256_array(after),
    }
    blended = _blend(image, made, region, band)
    return Edited(blended, None if after is None else after.clone(), region.clone(), record)


def translate(
    generator: Generator,
    image: torch.Tensor,
    label: torch.Tensor | None = None,
    *,
    grid: Grid,
    strength: float,
    seed: int,
    text: str | None = None,
    facts: Mapping[str, str] | None = None,
    edge: torch.Tensor | None = None,
    settings: SamplingSettings | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Edited:
    """Make a whole scan anew from itself, for other words or facts; its label stays (SDEdit, arXiv:2108.01073).

    Args:
        generator: As for :func:`edit`, like all that follow.
        image: The scan.
        label: Its label, which steers it where the model knows label maps.
        grid: Grid of both.
        strength: Share in (0, 1] of the noise process that is run: little keeps the scan, 1 forgets it.
        seed: Seed of its noise.
        text: What it should show.
        facts: Attributes that it should have.
        edge: Edges that it should follow.
        settings: How to sample.
        on_step: Called with the number of finished network steps.

    Returns:
        The scan and its label; the region is all of it.

    Raises:
        BadInputError: As for :func:`edit`.
    """
    everywhere = torch.ones(grid.shape, dtype=torch.bool)
    return edit(
        generator,
        image,
        label,
        grid=grid,
        region=everywhere,
        text=text,
        facts=facts,
        edge=edge,
        seed=seed,
        strength=strength,
        band=0,
        settings=settings,
        on_step=on_step,
    )


def replace_label(
    label: torch.Tensor,
    value: int,
    by: int | None = None,
    *,
    within: torch.Tensor | None = None,
    spacing: Spacing | None = None,
) -> torch.Tensor:
    """Label map in which a class, or part of it, has become another: what is left when a lesion goes.

    Args:
        label: ``(H, W[, D])`` integer values.
        value: Class that goes.
        by: Class that takes its place; None gives each voxel the class of the nearest voxel of another class, so that a
            lesion becomes the organ that it lies in.
        within: ``(H, W[, D])`` bool, where it goes; None is everywhere.
        spacing: Voxel edge lengths in mm, in array order, for what is nearest; None measures in voxels.

    Returns:
        The label map, as ``label``.

    Raises:
        BadInputError: If there is no voxel of the class, or no other class to take its place.
    """
    if within is not None and (within.shape != label.shape or within.dtype != torch.bool):
        raise BadInputError(
            f"within: expected bool {tuple(label.shape)}, got {within.dtype} {tuple(within.shape)}. Give it on the "
            "grid of the label."
        )
    gone = (label == value) if within is None else (label == value) & within
    if not gone.any():
        values = sorted(label.unique().tolist())
        raise BadInputError(f"value: expected a class of the label there, got {value}; the label has {values}.")
    if by == value:
        raise BadInputError(f"by: expected another class than {value}, got the same.")
    if by is not None:
        return torch.where(gone, torch.tensor(by, dtype=label.dtype), label)
    own = (label == value).numpy()
    if own.all():
        raise BadInputError(f"label: expected a class besides {value}, got none. Give the class that takes its place.")
    nearest = ndimage.distance_transform_edt(own, sampling=spacing, return_distances=False, return_indices=True)
    return torch.where(gone, label[tuple(torch.from_numpy(axis).long() for axis in nearest)], label)


def _check_arrays(generator: Generator, image: torch.Tensor, grid: Grid, **labels: torch.Tensor | None) -> None:
    config = generator.config
    check_grid(Path("grid"), grid, config, kind="scan")
    wanted = (len(config.channel_names), *grid.shape)
    if tuple(image.shape) != wanted:
        raise BadInputError(
            f"image: expected shape {wanted} (the channels of the model '{config.name}', then the grid), got "
            f"{tuple(image.shape)}."
        )
    for name, label in labels.items():
        if label is not None and (tuple(label.shape) != grid.shape or label.is_floating_point()):
            raise BadInputError(
                f"{name}: expected integers of the shape of the scan {grid.shape}, got {label.dtype} "
                f"{tuple(label.shape)}. Resample it to the scan by nearest neighbor first."
            )


def _check_region(region: torch.Tensor, grid: Grid, label: torch.Tensor | None, new_label: torch.Tensor | None) -> None:
    if tuple(region.shape) != grid.shape or region.dtype != torch.bool:
        raise BadInputError(
            f"region: expected bool of the shape of the scan {grid.shape}, got {region.dtype} {tuple(region.shape)}."
        )
    if not region.any():
        raise BadInputError("region: expected voxels that may change, got none. Mark some, or give another new_label.")
    if label is not None and new_label is not None:
        outside = int(((label.long() != new_label.long()) & ~region).sum())
        if outside:
            raise BadInputError(
                f"new_label: expected the label outside of the region, where the scan stays, got {outside} other "
                "voxels. Widen the region, or leave it out."
            )


def _changed(label: torch.Tensor | None, new_label: torch.Tensor | None, margin: int) -> torch.Tensor:
    """Where two labels differ, and `margin` voxels around."""
    if label is None or new_label is None:
        raise BadInputError("region: expected one, or label and new_label, which differ in it, got neither. Give one.")
    changed = (label.long() != new_label.long()).numpy()
    if not changed.any():
        raise BadInputError("new_label: expected a label that differs from label, got the same. Give a region.")
    return torch.from_numpy(ndimage.distance_transform_edt(~changed) <= margin)


def _steered(
    generator: Generator,
    placement: Placement,
    label: torch.Tensor | None,
    *,
    text: str | None,
    facts: Mapping[str, str],
    edge: torch.Tensor | None,
    seed: int,
) -> LabelledGrid:
    """What steers the edit, checked, on the model's grid."""
    config = generator.config
    spec = SampleSpec("edit", 0, seed, "none" if label is None else "files", text=text, attributes=dict(facts))
    check_steering(generator, [spec])
    facts = dict(facts)
    if SPACING in config.attributes and SPACING not in facts and placement.source.known:
        facts[SPACING] = json.dumps(list(placement.grid.spacing))
    index = None
    if label is not None:
        index = to_model(generator.label_to_index(label.contiguous()), placement, mode="nearest", padding="constant")
    if edge is not None:
        require_conditions(generator, {"edge": "edge"})
        check_edges(edge, placement.source.shape)
        edge = to_model(edge, placement, mode="linear", padding="constant").clamp_(0, 1)
    return LabelledGrid(spec, placement, label, index, {}, edge=edge, facts=facts)


@torch.inference_mode()
@exact_fp32()
def _run_networks(
    generator: Generator,
    item: LabelledGrid,
    image: torch.Tensor,
    region: torch.Tensor,
    intensity: IntensityMap,
    settings: SamplingSettings,
    strength: float,
    on_step: Callable[[int], object] | None,
) -> tuple[np.ndarray, int]:
    """The scan ``(C, *spatial)`` in source units with its region made anew, and the passes of the denoiser."""
    config, device, placement = generator.config, generator.device, item.placement
    layout = memory_format(config.spatial_dims) if settings.precision == "bf16" else torch.contiguous_format
    generator.to(memory_format=layout)

    uses = control_uses(generator, settings)

    def denoiser(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        with autocast(device, settings.precision):
            return generator.denoise(x, t, condition, controls=uses)

    scan = to_model(intensity.forward(image.float()), placement, mode="linear", padding="reflect")
    # As the scan, so that no mirrored copy of what goes stays known in the padding.
    share = to_model(region.float(), placement, mode="linear", padding="reflect")
    pool = F.max_pool3d if config.spatial_dims == 3 else F.max_pool2d
    latent_region = pool((share > 0).float()[None, None], generator.compression) > 0
    with autocast(device, settings.precision):
        start = generator.encode(scan[None].to(device)).float()
    guided = guide(generator, batch_condition(generator, [item]), settings, denoiser)
    latents = sample(
        guided,
        seeded_noise(generator.latent_shape(placement.shape), [item.spec.seed]).to(device),
        objective=config.objective,
        sampler=settings.sampler,
        spacing=settings.sampler_spacing,
        num_inference_steps=settings.num_inference_steps,
        temperature=1.0 if settings.temperature is None else settings.temperature,
        start=start,
        strength=strength,
        region=latent_region.to(device),
        callback=None if on_step is None else lambda step, _: on_step(step + 1),
    )
    with autocast(device, settings.precision):
        decoded = generator.decode(latents, max_memory_gb=settings.max_memory_gb)[0].float().cpu()
    return intensity.inverse(from_model(decoded, placement, mode="linear")).numpy(), guided.evaluations


def _blend(image: torch.Tensor, made: np.ndarray, region: torch.Tensor, band: int) -> torch.Tensor:
    """`made` inside, `image` beyond the band, and between them a mix by distance; of the type of `image`."""
    before = image.numpy()
    distance = ndimage.distance_transform_edt(~region.numpy())
    weight = np.where(distance <= band, 1 - distance / (band + 1), 0)
    mixed = before.astype(np.float64) * (1 - weight) + made * weight
    if before.dtype.kind in "iu":
        limits = np.iinfo(before.dtype)
        mixed = np.clip(np.round(mixed), limits.min, limits.max)
    return torch.from_numpy(np.where(weight > 0, mixed.astype(before.dtype), before))
