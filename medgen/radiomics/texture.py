"""Texture features of a discretized region: the five classes from shared neighbor offsets, averaged over directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medgen.radiomics import glcm, ngtdm, sizes
from medgen.radiomics.binning import Region
from medgen.radiomics.neighbors import (
    count_dependences,
    count_pairs,
    count_runs,
    crosses_twice,
    directions,
    find_zones,
    neighborhood_sums,
    tone_differences,
)
from medgen.types import BadInputError

_MOST_LEVELS = 8192  # the matrix of one direction then takes 256 MiB


def margin(settings: dict[str, Any]) -> int:
    """Border in voxels that neighbors at the set distances need."""
    return int(max([1, *settings.get("distances", [1])]))


def texture(
    region: Region, wanted: Mapping[str, Sequence[str]], settings: dict[str, Any], spacing: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Texture features of one region.

    Args:
        region: The discretized region, with a border of :func:`margin` voxels.
        wanted: Feature names per class; classes that are no texture are passed over.
        settings: PyRadiomics settings ``distances``, ``force2D``, ``force2Ddimension``, ``symmetricalGLCM``,
            ``weightingNorm`` and ``gldm_a``.
        spacing: Voxel edges along z, y, x in mm, for the weighting.

    Returns:
        Values per class and name. A feature that a region has no voxel pair for is NaN, or the 0 or 1 that
        PyRadiomics gives it.
    """
    flat_axis = int(settings.get("force2Ddimension", 0)) if settings.get("force2D", False) else None
    distances = [int(distance) for distance in settings.get("distances", [1])]
    offsets = directions(region.size, distances, force_2d_axis=flat_axis)
    adjacent = directions(region.size, [1], force_2d_axis=flat_axis)
    ranks = region.ranks.ravel()
    strides = np.asarray(region.ranks.strides) // region.ranks.itemsize
    norm = settings.get("weightingNorm")
    found: dict[str, dict[str, float]] = {}
    if names := wanted.get("glcm"):
        weights = None if norm is None else np.exp(-(_lengths(offsets, spacing, norm) ** 2))
        found["glcm"] = _glcm(region, offsets @ strides, names, weights, bool(settings.get("symmetricalGLCM", True)))
    tolerance = float(settings.get("gldm_a", 0))
    # Equal neighbors at distance 1 are found for the runs anyhow.
    by_matches = bool(wanted.get("gldm")) and tolerance == 0 and distances == [1]
    dependence = np.zeros(len(ranks) if wanted.get("gldm") else 0, dtype=np.int32)
    if wanted.get("glrlm") or by_matches:
        counted = dependence if by_matches else np.zeros(0, dtype=np.int32)
        runs = count_runs(ranks, region.index, adjacent @ strides, region.counts, max(region.size), counted)
        if names := wanted.get("glrlm"):
            weights = None if norm is None else _lengths(adjacent, spacing, norm)
            found["glrlm"] = _glrlm(region, runs, adjacent, names, weights)
    if names := wanted.get("glszm"):
        before = np.unique(-adjacent[:, :2], axis=0)
        reach = int(bool((adjacent[:, 2] != 0).any()))
        zone_ranks, zone_sizes = find_zones(region.ranks, len(region.index), before[before.any(axis=1)], reach)
        found["glszm"] = _sizes(region, zone_ranks, zone_sizes, sizes.GLSZM, names)
    if names := wanted.get("gldm"):
        if not by_matches:
            levels = np.concatenate([[0.0], region.levels])
            count_dependences(ranks, region.index, offsets @ strides, levels, tolerance, dependence)
        found["gldm"] = _sizes(region, ranks[region.index], dependence[region.index] + 1, sizes.GLDM, names)
    if names := wanted.get("ngtdm"):
        totals, counts = neighborhood_sums(region, distances, flat_axis)
        levels = np.concatenate([[0.0], region.levels])
        differences = tone_differences(ranks, region.index, totals.ravel(), counts.ravel(), levels)
        values = ngtdm.features(region.counts.astype(np.float64), differences, region.levels)
        found["ngtdm"] = {name: float(values[ngtdm.NAMES.index(name)]) for name in names}
    return found


def _glcm(
    region: Region, steps: np.ndarray, names: Sequence[str], weights: np.ndarray | None, symmetrical: bool
) -> dict[str, float]:
    """Co-occurrence features: of the weighted sum of all directions, or averaged over them."""
    size = len(region.levels) + 1
    if size > _MOST_LEVELS:
        raise BadInputError(
            f"glcm: expected at most {_MOST_LEVELS - 1} gray levels, got {size - 1}, whose pairs do not "
            "fit into memory. Raise binWidth, set binCount, or normalize the image."
        )
    tables: Iterator[np.ndarray] = _pairs(region, steps, size)
    if weights is not None:
        merged = np.zeros((size, size))
        for weight, table in zip(weights, tables, strict=True):
            merged += weight * table
        tables = iter([merged])
    rows, correlations = [], []
    for table in tables:
        row = glcm.features(table, region.levels, symmetrical)
        if np.isnan(row[0]):
            continue
        rows.append(row)
        if "MCC" in names:
            inner = table[1:, 1:].astype(np.float64)
            correlations.append(glcm.mcc(inner + inner.T if symmetrical else inner))
    values = np.mean(rows, axis=0) if rows else np.full(len(glcm.NAMES), np.nan)
    result = dict(zip(glcm.NAMES, values.tolist(), strict=True))
    result["MCC"] = float(np.mean(correlations)) if correlations else float("nan")
    if not rows and size == 2:
        # What PyRadiomics's formulas come to for one gray level without a pair.
        result.update({"InverseVariance": 0.0} if _keeps_empty(weights, steps) else {"MCC": 1.0})
    return {name: result[name] for name in names}


def _pairs(region: Region, steps: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Co-occurrence matrix of each direction in turn, in one and the same memory."""
    table = np.zeros((size, size), dtype=np.int32)
    for step in steps:
        table.fill(0)
        count_pairs(region.ranks.ravel(), region.index, int(step), table)
        yield table


def _glrlm(
    region: Region, runs: np.ndarray, offsets: np.ndarray, names: Sequence[str], weights: np.ndarray | None
) -> dict[str, float]:
    """Run length features: of the weighted sum of all directions, or averaged over them."""
    lengths = np.arange(1.0, runs.shape[2] + 1)
    # All runs of length 1: either fine texture, or a region that is only one voxel deep in this direction.
    used = [
        direction
        for direction, table in enumerate(runs)
        if table[:, 1:].any() or crosses_twice(region, offsets[direction])
    ]
    if weights is None:
        rows = [sizes.features(runs[direction], region.levels, lengths) for direction in used]
    else:
        merged = sum((weights[direction] * runs[direction] for direction in used), start=np.zeros(runs.shape[1:]))
        rows = [sizes.features(merged, region.levels, lengths)] if merged.any() else []
    values = np.mean(rows, axis=0) if rows else np.full(16, np.nan)
    if not rows and _keeps_empty(weights, offsets):
        values[[sizes.SIZE_VARIANCE, sizes.ENTROPY]] = 0.0  # PyRadiomics's sums over no run length
    return _pick(values, sizes.GLRLM, names)


def _keeps_empty(weights: np.ndarray | None, directions: np.ndarray) -> bool:
    """Whether PyRadiomics keeps a matrix that counts nothing: it drops empty directions only if there are several."""
    return weights is not None or len(directions) == 1


def _sizes(
    region: Region, ranks: np.ndarray, counted: np.ndarray, order: dict[str, int], names: Sequence[str]
) -> dict[str, float]:
    """Features of the matrix that counts elements of rank and size, for the sizes that occur."""
    present = np.flatnonzero(np.bincount(counted))
    column = np.zeros(present[-1] + 1, dtype=np.int64)
    column[present] = np.arange(len(present))
    count = len(region.levels)
    cells = (ranks.astype(np.int64) - 1) * len(present) + column[counted]
    table = np.bincount(cells, minlength=count * len(present)).reshape(count, len(present))
    return _pick(sizes.features(table, region.levels, present.astype(np.float64)), order, names)


def _pick(values: np.ndarray, order: dict[str, int], names: Sequence[str]) -> dict[str, float]:
    return {name: float(values[order[name]]) for name in names}


def _lengths(offsets: np.ndarray, spacing: Sequence[float], norm: str) -> np.ndarray:
    """Length of each offset in mm; with no weighting wanted, a length that weighs all directions alike."""
    steps = np.abs(offsets) * np.asarray(spacing, dtype=np.float64)
    if norm == "infinity":
        return steps.max(axis=1)
    if norm == "euclidean":
        return np.sqrt((steps**2).sum(axis=1))
    if norm == "manhattan":
        return steps.sum(axis=1)
    return np.ones(len(steps))
