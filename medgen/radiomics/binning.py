"""Gray levels of a region: one discretization that all texture classes and the histogram features share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from medgen.types import BadInputError

# More edges than this are surely a bin width in the wrong units; the table of edges alone would take 80 MB.
_MAX_BINS = 10_000_000


@dataclass(frozen=True, eq=False)
class Region:
    """The voxels of one region in one image, discretized, with a border of background around its box.

    Attributes:
        ranks: ``(Z, Y, X)`` int32: 0 outside the region, else 1 + index into `levels`; with a border of 0 along
            every axis of more than one voxel.
        index: ``(N,)`` int64 flat positions of the region's voxels in `ranks`, in array order.
        values: ``(N,)`` float64 intensities at `index`.
        levels: ``(R,)`` float64 gray levels that occur, ascending, counted from 1.
        counts: ``(R,)`` int64 voxels of each level.
        size: Voxels of the box along z, y, x, without the border.
    """

    ranks: np.ndarray
    index: np.ndarray
    values: np.ndarray
    levels: np.ndarray
    counts: np.ndarray
    size: tuple[int, int, int]


def bin_edges(values: np.ndarray, *, bin_width: float = 25.0, bin_count: int | None = None) -> np.ndarray:
    """Edges of the gray level bins, as PyRadiomics places them.

    With a width, edges are multiples of it from the largest one below the minimum; with a count, that many equal bins
    span the range.

    Args:
        values: ``(N,)`` float64 intensities of the region.
        bin_width: Width of a bin, in intensity units.
        bin_count: Number of bins; takes precedence over the width.

    Returns:
        ``(bins + 1,)`` ascending float64; a value belongs to the last edge that does not exceed it.

    Raises:
        BadInputError: If there are more bins than a table can hold, or than numbers between the intensities.
    """
    low, high = float(values.min()), float(values.max())
    if bin_count is not None:
        if bin_count > _MAX_BINS:
            raise BadInputError(f"binCount: expected at most {_MAX_BINS} bins, got {bin_count}. Lower binCount.")
        try:
            edges = np.histogram_bin_edges(values, bin_count).astype(np.float64)
        except ValueError as error:
            raise BadInputError(
                f"binCount: expected intensities that can be cut into {bin_count} bins, got {low:.17g} to {high:.17g}, "
                "with fewer numbers in between. Lower binCount, or subtract a constant from the image."
            ) from error
        edges[-1] += 1  # the maximum belongs to the last bin, not to one of its own
        return edges
    if low + bin_width == low or high + bin_width == high:
        raise BadInputError(
            f"binWidth: expected a width that is not lost in the rounding of the intensities {low:g} to {high:g}, got "
            f"{bin_width:g}. Raise binWidth, or subtract a constant from the image."
        )
    if (high - low) / bin_width > _MAX_BINS:
        raise BadInputError(
            f"binWidth: expected a width that cuts the intensities {low:g} to {high:g} into at most {_MAX_BINS} bins, "
            f"got {bin_width:g}. Raise binWidth, or normalize the image."
        )
    # The rounding of these three steps decides where values on an edge fall, so they stay as PyRadiomics takes them.
    edges = np.arange(low - low % bin_width, high + 2 * bin_width, bin_width)
    return edges if len(edges) > 1 else np.asarray([edges[0] - 0.5, edges[0] + 0.5])


def discretize(
    image: np.ndarray, mask: np.ndarray, *, bin_width: float = 25.0, bin_count: int | None = None, margin: int = 1
) -> Region:
    """Discretize the region of an image.

    Args:
        image: ``(Z, Y, X)`` float64, cut to the box of the region.
        mask: ``(Z, Y, X)`` bool with at least one voxel.
        bin_width: See :func:`bin_edges`.
        bin_count: See :func:`bin_edges`.
        margin: Width of the border in voxels: the largest distance between neighbors.

    Returns:
        The discretized region.

    Raises:
        BadInputError: If an intensity in the region is not finite, or there are too many bins.
    """
    values = image[mask]
    if not np.isfinite(values).all():
        raise BadInputError(
            "image: expected finite intensities in the region, got NaN or infinity. Repair or leave out the scan."
        )
    edges = bin_edges(values, bin_width=bin_width, bin_count=bin_count)
    levels, counts = assign_levels(values, edges)
    present = np.flatnonzero(counts)
    rank = np.zeros(len(counts), dtype=np.int32)
    rank[present] = np.arange(1, len(present) + 1)
    # An axis of one voxel has no neighbors, and needs no border.
    margins = [margin if size > 1 else 0 for size in image.shape]
    padded = np.zeros([size + 2 * edge for size, edge in zip(image.shape, margins, strict=True)], dtype=np.int32)
    return Region(
        ranks=padded,
        index=_place(np.ascontiguousarray(mask), rank, levels, margins[0], margins[1], margins[2], padded),
        values=values,
        levels=present.astype(np.float64),
        counts=counts[present].astype(np.int64),
        size=(image.shape[0], image.shape[1], image.shape[2]),
    )


@njit(cache=True, nogil=True)
def assign_levels(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``numpy.digitize`` for nearly equal steps, and how often each level occurs.

    A level is guessed by division and corrected against the edges themselves.

    Args:
        values: ``(N,)`` float64.
        edges: ``(E,)`` ascending float64, not above the smallest value.

    Returns:
        ``(N,)`` int32 levels from 1, and ``(E + 1,)`` int64 values of each level.
    """
    last = len(edges) - 1
    scale = last / (edges[last] - edges[0])
    levels = np.empty(len(values), dtype=np.int32)
    counts = np.zeros(len(edges) + 1, dtype=np.int64)
    for position in range(len(values)):
        value = values[position]
        guess = min(max(int((value - edges[0]) * scale), 0), last)
        while guess > 0 and value < edges[guess]:
            guess -= 1
        while guess < last and value >= edges[guess + 1]:
            guess += 1
        levels[position] = guess + 1
        counts[guess + 1] += 1
    return levels, counts


@njit(cache=True, nogil=True)
def _place(
    mask: np.ndarray, rank: np.ndarray, levels: np.ndarray, edge_z: int, edge_y: int, edge_x: int, padded: np.ndarray
) -> np.ndarray:
    """Write the rank of every voxel of the region into the padded box; return their flat positions there."""
    index = np.empty(len(levels), dtype=np.int64)
    flat = padded.ravel()
    number = 0
    for z in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            start = ((z + edge_z) * padded.shape[1] + y + edge_y) * padded.shape[2] + edge_x
            for x in range(mask.shape[2]):
                if mask[z, y, x]:
                    index[number] = start + x
                    flat[start + x] = rank[levels[number]]
                    number += 1
    return index
