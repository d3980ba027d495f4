"""Edits of real scans: made anew inside a region and kept bit for bit elsewhere, or translated as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import ndimage

from medgen.conditions.edge import check_edges
from medgen.data.geometry import to_model
from medgen.generator import Generator
from medgen.provenance import sha256_array
from medgen.synthesis.inpainting import BAND, MARGIN, Inpainting, changed_region, check_labels
from medgen.synthesis.inputs import check_grid
from medgen.synthesis.labels import LabelledGrid, place_on_model, steering_facts
from medgen.synthesis.plan import SampleSpec, SamplingSettings
from medgen.synthesis.sampling import SyntheticSample, sample_batch
from medgen.synthesis.steering import check_settings, check_steering, require_conditions, resolve_scales
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
    band: int = BAND,
    margin: int = MARGIN,
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
    item, after = _plan(
        generator,
        image,
        label,
        grid=grid,
        region=region,
        new_label=new_label,
        text=text,
        facts=facts,
        edge=edge,
        seed=seed,
        strength=strength,
        band=band,
        margin=margin,
    )
    settings = _resolve(generator, settings)
    made = sample_batch(generator, [item], settings, on_step=on_step)[0]
    return _edited(generator, item, made, after, edge, settings)


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


def translate_batch(
    generator: Generator,
    images: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor | None],
    *,
    grids: Sequence[Grid],
    strength: float,
    seeds: Sequence[int],
    texts: Sequence[str | None] | None = None,
    facts: Sequence[Mapping[str, str]] | None = None,
    edges: Sequence[torch.Tensor | None] | None = None,
    settings: SamplingSettings | None = None,
) -> list[Edited]:
    """Make whole scans anew from themselves, side by side in the networks.

    Each is what :func:`translate` makes of it alone, to the last bit where it is the only one, else within rounding.

    Args:
        generator: As for :func:`translate`, like all that follow.
        images: The scans.
        labels: Their labels.
        grids: Grid of each.
        strength: Share in (0, 1] of the noise process that is run, of all of them.
        seeds: Seed of the noise of each.
        texts: What each should show; None is nothing in words.
        facts: Attributes that each should have.
        edges: Edges that each should follow.
        settings: How to sample.

    Returns:
        The scans and their labels, in order.

    Raises:
        BadInputError: As for :func:`edit`.
    """
    planned = []
    nothing = [None] * len(images)
    rows = zip(images, labels, grids, seeds, texts or nothing, facts or nothing, edges or nothing, strict=True)
    for index, (image, label, grid, seed, text, known, edge) in enumerate(rows):
        everywhere = torch.ones(grid.shape, dtype=torch.bool)
        item, after = _plan(
            generator,
            image,
            label,
            grid=grid,
            region=everywhere,
            text=text,
            facts=known,
            edge=edge,
            seed=seed,
            strength=strength,
            band=0,
        )
        planned.append((replace(item, spec=replace(item.spec, index=index)), after, edge))
    settings = _resolve(generator, settings)
    made = sample_batch(generator, [item for item, _, _ in planned], settings, edits_together=True)
    return [
        _edited(generator, item, sample, after, edge, settings)
        for (item, after, edge), sample in zip(planned, made, strict=True)
    ]


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


def _plan(
    generator: Generator,
    image: torch.Tensor,
    label: torch.Tensor | None,
    *,
    grid: Grid,
    region: torch.Tensor | None,
    new_label: torch.Tensor | None = None,
    text: str | None,
    facts: Mapping[str, str] | None,
    edge: torch.Tensor | None,
    seed: int,
    strength: float,
    band: int,
    margin: int = MARGIN,
) -> tuple[LabelledGrid, torch.Tensor | None]:
    """An edit before it is made, checked; and the label that the scan will have."""
    config = generator.config
    check_grid(Path("grid"), grid, config, kind="scan")
    _check_shapes(grid, image, label=label, new_label=new_label)
    if margin < 0:
        raise BadInputError(f"margin: expected a width of 0 voxels or more, got {margin}.")
    if new_label is not None:
        require_conditions(generator, {"mask": "new_label"})
    if region is None:
        if label is None or new_label is None:
            raise BadInputError(
                "region: expected one, or label and new_label, which differ in it, got neither. Give one."
            )
        region = changed_region(label, new_label, margin=margin)
    scan = Inpainting.fit(image, region, config, strength=strength, band=band)
    if label is not None and new_label is not None:
        check_labels(label, new_label, region)
    after = label if new_label is None else new_label
    steered = None if "mask" not in generator.conditions else after
    item = steered_scan(generator, grid, steered, text=text, facts=facts or {}, edge=edge, seed=seed)
    return replace(item, scan=scan), after


def _resolve(generator: Generator, settings: SamplingSettings | None) -> SamplingSettings:
    """Settings with the model's own where none are given, checked."""
    settings = settings or SamplingSettings()
    settings = replace(
        settings,
        guidance_scale=resolve_scales(generator, settings.guidance_scale),
        temperature=generator.config.temperature if settings.temperature is None else settings.temperature,
    )
    check_settings(generator, settings, generate=False)
    return settings


def _edited(
    generator: Generator,
    item: LabelledGrid,
    made: SyntheticSample,
    after: torch.Tensor | None,
    edge: torch.Tensor | None,
    settings: SamplingSettings,
) -> Edited:
    scan = item.scan
    if scan is None:
        raise ValueError("item: expected one with a scan, got one without")
    record = {
        "strength": scan.strength,
        "band": scan.band,
        "seed": item.spec.seed,
        "voxels": int(scan.region.sum()),
        "conditions": item.conditions,
        "edge_sha256": None if edge is None else sha256_array(edge),
        "settings": asdict(settings),
        "network_evaluations": made.network_evaluations,
        "model": generator.config.name,
        "model_hash": generator.weights_hash,
        "image_sha256": sha256_array(scan.image),
        "region_sha256": sha256_array(scan.region),
        "label_sha256": None if after is None else sha256_array(after),
    }
    return Edited(made.image, None if after is None else after.clone(), scan.region.clone(), record)


def _check_shapes(grid: Grid, image: torch.Tensor, **labels: torch.Tensor | None) -> None:
    if tuple(image.shape[1:]) != grid.shape:
        raise BadInputError(
            f"image: expected the channels of the model, then the grid {grid.shape}, got shape {tuple(image.shape)}."
        )
    for name, label in labels.items():
        if label is not None and (tuple(label.shape) != grid.shape or label.is_floating_point()):
            raise BadInputError(
                f"{name}: expected integers of the shape of the scan {grid.shape}, got {label.dtype} "
                f"{tuple(label.shape)}. Resample it to the scan by nearest neighbor first."
            )


def steered_scan(
    generator: Generator,
    grid: Grid,
    label: torch.Tensor | None,
    *,
    text: str | None = None,
    facts: Mapping[str, str] | None = None,
    edge: torch.Tensor | None = None,
    seed: int = 0,
) -> LabelledGrid:
    """What steers the making of a scan, checked, on the model's grid.

    Args:
        generator: The model.
        grid: Of the scan.
        label: ``(H, W[, D])`` values as in files; None for none.
        text: What it should show, in words.
        facts: Value of each attribute that is to steer it.
        edge: ``(1, H, W[, D])`` edge strength in [0, 1].
        seed: Of its noise.

    Returns:
        As for :func:`medgen.synthesis.steering.batch_condition`.

    Raises:
        BadInputError: If the model lacks a condition, or one cannot be used.
    """
    spec = SampleSpec("edit", 0, seed, "none" if label is None else "files", text=text, attributes=dict(facts or {}))
    check_steering(generator, [spec])
    placement = place_on_model(grid, generator)
    index = None
    if label is not None:
        index = to_model(generator.label_to_index(label.contiguous()), placement, mode="nearest", padding="constant")
    if edge is not None:
        require_conditions(generator, {"edge": "edge"})
        check_edges(edge, grid.shape)
        edge = to_model(edge, placement, mode="linear", padding="constant").clamp_(0, 1)
    known = steering_facts(spec, placement, generator.config)
    return LabelledGrid(spec, placement, label, index, {}, edge=edge, facts=known)
