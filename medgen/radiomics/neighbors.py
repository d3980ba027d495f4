"""One pass over the neighbor pairs of a region in one direction: what all five texture classes are counted from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numba import njit

from medgen.radiomics.binning import Region


def directions(size: Sequence[int], distances: Sequence[int], *, force_2d_axis: int | None = None) -> np.ndarray:
    """Offsets to the neighbors at the given distances, one of each opposite pair.

    Args:
        size: Voxels of the region's box along z, y, x.
        distances: Distances in voxels, in the infinity norm.
        force_2d_axis: Axis along which no offset may move, or None.

    Returns:
        ``(A, 3)`` int64; an offset that reaches out of the box from everywhere is left out.
    """
    reach = max(distances)
    ranges = [
        range(1) if axis == force_2d_axis else range(-min(reach, length - 1), min(reach, length - 1) + 1)
        for axis, length in enumerate(size)
    ]
    found = [
        offset
        for offset in itertools.product(*ranges)
        if offset > (0, 0, 0) and max(abs(step) for step in offset) in distances
    ]
    return np.asarray(found, dtype=np.int64).reshape(-1, 3)


@njit(cache=True, nogil=True)
def count_pairs(ranks: np.ndarray, index: np.ndarray, step: int, table: np.ndarray) -> None:
    """Count the gray level pairs of voxels `step` apart: the co-occurrence matrix of one direction.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` positions of the region's voxels.
        step: Flat offset of the direction.
        table: ``(R + 1, R + 1)`` float64, zeros; pairs that leave the region are counted in row or column 0.
    """
    flat = table.ravel()
    width = table.shape[1]
    for position in index:
        flat[ranks[position] * width + ranks[position + step]] += 1


@njit(cache=True, nogil=True)
def count_runs(ranks: np.ndarray, index: np.ndarray, step: int, table: np.ndarray) -> None:
    """Count the runs of equal gray level: the run length matrix of one direction.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` positions of the region's voxels.
        step: Flat offset of the direction.
        table: ``(R + 1, longest + 1)`` float64, zeros; row 0 and column 0 stay empty.
    """
    for position in index:
        rank = ranks[position]
        if ranks[position - step] == rank:
            continue
        length = 1
        ahead = position + step
        while ranks[ahead] == rank:
            length += 1
            ahead += step
        table[rank, length] += 1


@njit(cache=True, nogil=True)
def sum_neighbors(
    ranks: np.ndarray,
    index: np.ndarray,
    steps: np.ndarray,
    levels: np.ndarray,
    tolerance: float,
    table: np.ndarray,
    dependence: np.ndarray,
) -> None:
    """Compare each voxel with its whole neighborhood: the tone difference and the dependence matrix.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` positions of the region's voxels.
        steps: ``(A,)`` flat offsets, one of each opposite pair.
        levels: ``(R + 1,)`` float64 gray level of each rank, 0 for rank 0.
        tolerance: Largest difference of gray levels that still is dependence.
        table: ``(R + 1,)`` float64, zeros: gets the sum of differences from the neighborhood's mean.
        dependence: ``(R + 1, 2 A + 1)`` float64, zeros: gets the number of voxels per count of dependent neighbors.
    """
    for position in index:
        rank = ranks[position]
        level = levels[rank]
        total, count, dependent = 0.0, 0, 0
        for step in steps:
            for neighbor in (ranks[position + step], ranks[position - step]):
                if neighbor > 0:
                    count += 1
                    total += levels[neighbor]
                    if abs(levels[neighbor] - level) <= tolerance:
                        dependent += 1
        if count > 0:
            table[rank] += abs(level - total / count)
        dependence[rank, dependent] += 1


@njit(cache=True, nogil=True)
def find_zones(ranks: np.ndarray, index: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected zones of equal gray level, by union-find.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` ascending positions of the region's voxels.
        steps: ``(A,)`` positive flat offsets, one of each opposite pair.

    Returns:
        ``(Z,)`` int64 rank and ``(Z,)`` int64 voxels of each zone.
    """
    parent = np.empty(len(ranks), dtype=np.int32)
    size = np.zeros(len(ranks), dtype=np.int32)
    zones = 0
    for position in index:
        rank = ranks[position]
        root = -1
        for step in steps:
            back = position - step
            if ranks[back] != rank:
                continue
            other = parent[back]
            while parent[other] != other:
                parent[other] = parent[parent[other]]
                other = parent[other]
            if root < 0:
                root = other
            elif root != other:
                if size[root] < size[other]:
                    root, other = other, root
                parent[other] = root
                size[root] += size[other]
                size[other] = 0
                zones -= 1
        if root < 0:
            root = position
            parent[position] = position
            zones += 1
        else:
            parent[position] = root
        size[root] += 1
    zone_ranks = np.empty(zones, dtype=np.int64)
    zone_sizes = np.empty(zones, dtype=np.int64)
    zone = 0
    for position in index:
        if size[position] > 0:
            zone_ranks[zone] = ranks[position]
            zone_sizes[zone] = size[position]
            zone += 1
    return zone_ranks, zone_sizes


def crosses_twice(region: Region, offset: np.ndarray) -> bool:
    """Whether some line in this direction meets the region in two voxels or more, however far apart.

    Args:
        region: The discretized region.
        offset: ``(3,)`` steps of -1, 0 or 1 along z, y, x.

    Returns:
        False where the region is flat across the direction, so that runs of length 1 mean nothing.
    """
    voxels = np.stack(np.unravel_index(region.index, region.ranks.shape), axis=1)
    moving = int(np.flatnonzero(offset)[0])
    lines = voxels - (voxels[:, [moving]] * offset[moving]) * offset
    return len(np.unique(lines, axis=0)) < len(lines)
