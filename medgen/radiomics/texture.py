"""Texture features of a discretized region: the five classes from shared neighbor offsets, averaged over directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medgen.radiomics import glcm, ngtdm, sizes
from medgen.radiomics.binning import Region
from medgen.radiomics.neighbors import (
    count_pairs,
    count_runs,
    crosses_twice,
    directions,
    find_zones,
    sum_neighbors,
)

CLASSES = ("glcm", "gldm", "glrlm", "glszm", "ngtdm")


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
        Values per class and name. A feature that a region has no voxel pair for is NaN, as in PyRadiomics.
    """
    flat_axis = int(settings.get("force2Ddimension", 0)) if settings.get("force2D", False) else None
    distances = [int(distance) for distance in settings.get("distances", [1])]
    offsets = directions(region.size, distances, force_2d_axis=flat_axis)
    adjacent = directions(region.size, [1], force_2d_axis=flat_axis)
    ranks = region.ranks.ravel()
    strides = np.asarray(region.ranks.strides) // region.ranks.itemsize
    steps, near = offsets @ strides, adjacent @ strides
    norm = settings.get("weightingNorm")
    found: dict[str, dict[str, float]] = {}
    if names := wanted.get("glcm"):
        weights = None if norm is None else np.exp(-(_lengths(offsets, spacing, norm) ** 2))
        found["glcm"] = _glcm(region, ranks, steps, names, weights, bool(settings.get("symmetricalGLCM", True)))
    if names := wanted.get("glrlm"):
        weights = None if norm is None else _lengths(adjacent, spacing, norm)
        found["glrlm"] = _glrlm(region, ranks, adjacent, near, names, weights)
    if names := wanted.get("glszm"):
        table, lengths = _zones(region, ranks, near)
        found["glszm"] = _pick(sizes.features(table, region.levels, lengths), sizes.GLSZM, names)
    if wanted.get("gldm") or wanted.get("ngtdm"):
        count = len(region.levels)
        levels = np.concatenate([[0.0], region.levels])
        differences = np.zeros(count + 1)
        dependence = np.zeros((count + 1, 2 * len(steps) + 1))
        tolerance = float(settings.get("gldm_a", 0))
        sum_neighbors(ranks, region.index, steps, levels, tolerance, differences, dependence)
        if names := wanted.get("gldm"):
            size = np.arange(1.0, dependence.shape[1] + 1)
            found["gldm"] = _pick(sizes.features(dependence[1:], region.levels, size), sizes.GLDM, names)
        if names := wanted.get("ngtdm"):
            values = ngtdm.features(region.counts.astype(np.float64), differences[1:], region.levels)
            found["ngtdm"] = {name: float(values[ngtdm.NAMES.index(name)]) for name in names}
    return found


def _glcm(
    region: Region,
    ranks: np.ndarray,
    steps: np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None,
    symmetrical: bool,
) -> dict[str, float]:
    """Co-occurrence features: of the weighted sum of all directions, or averaged over them."""
    count = len(region.levels)
    buffer = np.zeros((count + 1, count + 1))
    merged = np.zeros((count, count))
    found, correlations = [], []

    def evaluate(table: np.ndarray) -> None:
        if table.any():
            found.append(glcm.features(table, region.levels))
            if "MCC" in names:
                correlations.append(glcm.mcc(table))

    for direction, step in enumerate(steps):
        buffer.fill(0)
        count_pairs(ranks, region.index, int(step), buffer)
        table = buffer[1:, 1:] + buffer[1:, 1:].T if symmetrical else buffer[1:, 1:].copy()
        if weights is None:
            evaluate(table)
        else:
            merged += weights[direction] * table
    if weights is not None:
        evaluate(merged)
    values = np.mean(found, axis=0) if found else np.full(len(glcm.NAMES), np.nan)
    result = dict(zip(glcm.NAMES, values.tolist(), strict=True))
    result["MCC"] = 1.0 if count < 2 else float(np.mean(correlations)) if correlations else float("nan")
    return {name: result[name] for name in names}


def _glrlm(
    region: Region,
    ranks: np.ndarray,
    offsets: np.ndarray,
    steps: np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None,
) -> dict[str, float]:
    """Run length features: of the weighted sum of all directions, or averaged over them."""
    lengths = np.arange(1.0, max(region.size) + 1)
    buffer = np.zeros((len(region.levels) + 1, len(lengths) + 1))
    merged = np.zeros((len(region.levels), len(lengths)))
    found = []
    for direction, step in enumerate(steps):
        buffer.fill(0)
        count_runs(ranks, region.index, int(step), buffer)
        # All runs of length 1: either fine texture, or a region that is only one voxel deep in this direction.
        if not buffer[:, 2:].any() and not crosses_twice(region, offsets[direction]):
            continue
        if weights is None:
            found.append(sizes.features(buffer[1:, 1:], region.levels, lengths))
        else:
            merged += weights[direction] * buffer[1:, 1:]
    if weights is not None and merged.any():
        found.append(sizes.features(merged, region.levels, lengths))
    values = np.mean(found, axis=0) if found else np.full(16, np.nan)
    return _pick(values, sizes.GLRLM, names)


def _zones(region: Region, ranks: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Size zone matrix ``(R, S)`` and the ``(S,)`` sizes that occur."""
    zone_ranks, zone_sizes = find_zones(ranks, region.index, steps)
    present = np.flatnonzero(np.bincount(zone_sizes))
    cells = (zone_ranks - 1) * len(present) + np.searchsorted(present, zone_sizes)
    count = len(region.levels)
    table = np.bincount(cells, minlength=count * len(present)).reshape(count, len(present))
    return table.astype(np.float64), present.astype(np.float64)


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
