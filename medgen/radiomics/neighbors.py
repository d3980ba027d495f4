"""Neighbor pairs of a region: what all five texture classes are counted from."""

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
        table: ``(R + 1, R + 1)`` int32, zeros; pairs that leave the region are counted in row or column 0.
    """
    flat = table.ravel()
    width = table.shape[1]
    for position in index:
        flat[ranks[position] * width + ranks[position + step]] += 1


@njit(cache=True, nogil=True)
def count_runs(
    ranks: np.ndarray, index: np.ndarray, steps: np.ndarray, counts: np.ndarray, longest: int, dependence: np.ndarray
) -> np.ndarray:
    """Count the runs of equal gray level in every direction, and the equal neighbors of every voxel.

    Equal neighbors are few in a textured region, so they are listed first, without a branch, and only they are
    followed. A voxel that is the k-th of its run tells that there is a run of at least k, so no ends are searched.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` ascending positions of the region's voxels.
        steps: ``(A,)`` positive flat offsets of the directions.
        counts: ``(R,)`` int64 voxels of each rank.
        longest: Longest possible run.
        dependence: Flat int32 zeros like `ranks`: gets the number of equal neighbors of each voxel; empty if not
            wanted.

    Returns:
        ``(A, R, longest)`` int64 number of runs per direction, rank and length.
    """
    runs = np.zeros((len(steps), len(counts), longest), dtype=np.int64)
    depth = np.zeros(len(ranks), dtype=np.int32)  # place in the run, above a base that grows with the direction
    equal = np.empty(len(index) + 1, dtype=np.int32)
    for direction in range(len(steps)):
        step = steps[direction]
        base = direction * longest
        number = 0
        for position in index:
            equal[number] = position
            number += ranks[position] == ranks[position - step]
        at_least = runs[direction]
        at_least[:, 0] = counts
        for position in equal[:number]:
            rank = ranks[position] - 1
            place = max(depth[position - step], base) + 1
            depth[position] = place
            at_least[rank, place - base] += 1
            at_least[rank, 0] -= 1
        if len(dependence):
            for position in equal[:number]:
                dependence[position] += 1
                dependence[position - step] += 1
        # From "at least k" to "exactly k".
        for rank in range(len(counts)):
            for length in range(longest - 1):
                at_least[rank, length] -= at_least[rank, length + 1]
    return runs


@njit(cache=True, nogil=True)
def find_zones(ranks: np.ndarray, voxels: int, lines: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected zones of equal gray level: runs along x, united where runs of neighboring lines touch.

    Args:
        ranks: ``(Z, Y, X)`` int32 ranks with their border, 0 outside the region.
        voxels: Number of voxels of the region.
        lines: ``(L, 2)`` offsets along z and y to the lines before a line that it is connected with.
        reach: 1 where neighbors along x are connected, also across lines; 0 where they are not.

    Returns:
        ``(Z,)`` int64 rank and ``(Z,)`` int64 voxels of each zone.
    """
    depth, height, width = ranks.shape
    first = np.zeros(depth * height + 1, dtype=np.int64)  # run with which each line begins
    start, end = np.empty(voxels, dtype=np.int32), np.empty(voxels, dtype=np.int32)
    value, parent = np.empty(voxels, dtype=np.int32), np.empty(voxels, dtype=np.int32)
    number = 0
    for z in range(depth):
        for y in range(height):
            previous = 0
            for x in range(width):
                rank = ranks[z, y, x]
                if rank > 0:
                    if rank == previous and reach > 0:
                        end[number - 1] = x
                    else:
                        start[number], end[number] = x, x
                        value[number], parent[number] = rank, number
                        number += 1
                previous = rank
            line = z * height + y
            first[line + 1] = number
            for dz, dy in lines:
                if z + dz < 0 or not 0 <= y + dy < height:
                    continue
                other = (z + dz) * height + y + dy
                i, j = first[line], first[other]
                while i < number and j < first[other + 1]:
                    if end[j] + reach < start[i]:
                        j += 1
                    elif end[i] + reach < start[j]:
                        i += 1
                    else:
                        if value[i] == value[j]:
                            _unite(parent, i, j)
                        if end[j] < end[i]:
                            j += 1
                        else:
                            # Of two runs that end together, each may still touch the one after the other.
                            after = j + 1
                            touches = end[i] == end[j] and after < first[other + 1] and start[after] <= end[i] + reach
                            if touches and value[i] == value[after]:
                                _unite(parent, i, after)
                            i += 1
    size = np.zeros(number, dtype=np.int64)
    for run in range(number):
        size[_find(parent, run)] += end[run] - start[run] + 1
    roots = np.flatnonzero(size)
    return value[roots].astype(np.int64), size[roots]


@njit(cache=True, nogil=True, inline="always")
def _find(parent: np.ndarray, run: int) -> int:
    """Root of a zone, halving the path to it."""
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@njit(cache=True, nogil=True, inline="always")
def _unite(parent: np.ndarray, first: int, second: int) -> None:
    """Merge two zones under the root that comes first."""
    a, b = _find(parent, first), _find(parent, second)
    if a < b:
        parent[b] = a
    elif b < a:
        parent[a] = b


@njit(cache=True, nogil=True)
def count_dependences(
    ranks: np.ndarray,
    index: np.ndarray,
    steps: np.ndarray,
    levels: np.ndarray,
    tolerance: float,
    dependence: np.ndarray,
) -> None:
    """Count for each voxel the neighbors whose gray level differs by no more than a tolerance.

    Args:
        ranks: Flat int32 ranks with their border, 0 outside the region.
        index: ``(N,)`` positions of the region's voxels.
        steps: ``(A,)`` flat offsets, one of each opposite pair.
        levels: ``(R + 1,)`` float64 gray level of each rank, 0 for rank 0.
        tolerance: Largest difference of gray levels.
        dependence: Flat int32 zeros like `ranks`: gets the counts.
    """
    for position in index:
        level = levels[ranks[position]]
        for step in steps:
            for neighbor in (ranks[position + step], ranks[position - step]):
                if neighbor > 0 and abs(levels[neighbor] - level) <= tolerance:
                    dependence[position] += 1


@njit(cache=True, nogil=True)
def tone_differences(
    ranks: np.ndarray, index: np.ndarray, totals: np.ndarray, counts: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Sum over the voxels of each rank of the difference between their level and the mean of their neighbors.

    Args:
        ranks: Flat int32 ranks with their border.
        index: ``(N,)`` positions of the region's voxels.
        totals: Flat sum of the gray levels of all neighbors inside the region.
        counts: Flat number of them.
        levels: ``(R + 1,)`` float64 gray level of each rank, 0 for rank 0.

    Returns:
        ``(R,)`` float64.
    """
    found = np.zeros(len(levels) - 1)
    for position in index:
        if counts[position] > 0:
            rank = ranks[position]
            found[rank - 1] += abs(levels[rank] - totals[position] / counts[position])
    return found


def neighborhood_sums(region: Region, distances: Sequence[int], flat_axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of gray levels and number of the neighbors at the given distances, for every place of the padded box.

    A shell at distance d is a cube of radius d less the cube within, and a cube is summed axis by axis.

    Args:
        region: The discretized region, with a border as wide as the largest distance.
        distances: Distances in voxels, in the infinity norm.
        flat_axis: Axis along which no neighbor lies, or None.

    Returns:
        Two int64 arrays of the shape of ``region.ranks``.
    """
    # Level and count go through the sums together, in the two halves of one number.
    packed = np.concatenate([[0], region.levels.astype(np.int64) + (1 << 32)])
    values = packed[region.ranks]
    total = np.zeros_like(values)
    for distance in sorted(set(distances)):
        total += _cube(values, distance, region.size, flat_axis) - _cube(values, distance - 1, region.size, flat_axis)
    return total & 0xFFFFFFFF, total >> 32


def _cube(values: np.ndarray, radius: int, size: Sequence[int], flat_axis: int | None) -> np.ndarray:
    """Sum over the cube around every voxel; nothing lies beyond the border."""
    for axis in range(3):
        # An axis of one voxel and its border has no neighbor on it.
        if radius > 0 and axis != flat_axis and size[axis] > 1:
            shape = values.shape
            whole = (int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :])))
            values = _sum_along(values.reshape(whole), radius).reshape(shape)
    return values


@njit(cache=True, nogil=True)
def _sum_along(values: np.ndarray, radius: int) -> np.ndarray:
    """Sum over ``2 radius + 1`` places along the middle axis of ``(A, B, C)``."""
    outer, size, inner = values.shape
    total = np.zeros_like(values)
    if inner == 1:  # the last axis: whole rows are added to themselves, shifted
        for a in range(outer):
            for shift in range(-radius, radius + 1):
                for b in range(max(0, -shift), min(size, size - shift)):
                    total[a, b, 0] += values[a, b + shift, 0]
        return total
    for a in range(outer):
        for b in range(size):
            for other in range(max(0, b - radius), min(size, b + radius + 1)):
                for c in range(inner):
                    total[a, b, c] += values[a, other, c]
    return total


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
