"""First-order features of the intensities of a region, as PyRadiomics defines them."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from medgen.radiomics.binning import Region

NAMES = (
    "10Percentile",
    "90Percentile",
    "Energy",
    "Entropy",
    "InterquartileRange",
    "Kurtosis",
    "Maximum",
    "Mean",
    "MeanAbsoluteDeviation",
    "Median",
    "Minimum",
    "Range",
    "RobustMeanAbsoluteDeviation",
    "RootMeanSquared",
    "Skewness",
    "TotalEnergy",
    "Uniformity",
    "Variance",
    "StandardDeviation",
)


def features(region: Region, voxel_volume: float, shift: float) -> np.ndarray:
    """All features.

    Args:
        region: The discretized region.
        voxel_volume: Volume of a voxel in mm³ (area in mm² in 2D).
        shift: Added to the intensities for energy and root mean square (``voxelArrayShift``).

    Returns:
        ``(19,)`` float64 in the order of ``NAMES``.
    """
    values, counts = region.values, region.counts
    low, lower, median, upper, high = _quantiles(region, (0.1, 0.25, 0.5, 0.75, 0.9))
    mean = float(values.mean())
    out = _moments(values, mean, shift, low, high)
    p = counts / counts.sum()
    out[0], out[1], out[9] = low, high, median
    out[3] = -(p * np.log2(p + np.spacing(1))).sum()
    out[4] = upper - lower
    out[7] = mean
    out[15] = out[2] * voxel_volume
    out[16] = (p * p).sum()
    return out


def _quantiles(region: Region, fractions: tuple[float, ...]) -> list[float]:
    """Quantiles by linear interpolation, with numpy's rounding: exact where neighbors are tied."""
    last = len(region.values) - 1
    places = [fraction * last for fraction in fractions]
    below = [int(place) for place in places]
    above = [min(index + 1, last) for index in below]
    ordered = _order_statistics(region, [*below, *above])
    result = []
    for number, (place, left) in enumerate(zip(places, below, strict=True)):
        a, b, weight = ordered[number], ordered[number + len(below)], place - left
        result.append(a + (b - a) * weight if weight < 0.5 else b - (b - a) * (1 - weight))
    return result


def _order_statistics(region: Region, places: list[int]) -> list[float]:
    """The values at the given places of the ascending order; only the gray levels that hold them are searched."""
    first = np.concatenate([[0], np.cumsum(region.counts)])
    holders = np.searchsorted(first, places, side="right") - 1
    start = np.full(len(region.counts), -1, dtype=np.int64)
    used = np.unique(holders)
    start[used] = np.cumsum(region.counts[used]) - region.counts[used]
    gathered = _gather(region.values, region.ranks.ravel(), region.index, start, int(region.counts[used].sum()))
    found = {}
    for level in used.tolist():
        inside = [place - first[level] for place, holder in zip(places, holders, strict=True) if holder == level]
        bucket = gathered[start[level] : start[level] + region.counts[level]]
        ordered = np.partition(bucket, sorted(set(inside)))
        found.update({first[level] + place: float(ordered[place]) for place in inside})
    return [found[place] for place in places]


@njit(cache=True, nogil=True)
def _gather(values: np.ndarray, ranks: np.ndarray, index: np.ndarray, start: np.ndarray, room: int) -> np.ndarray:
    """The values of each gray level with a start, one level after the other."""
    gathered = np.empty(room)
    filled = start.copy()
    for number in range(len(index)):
        level = ranks[index[number]] - 1
        if filled[level] >= 0:
            gathered[filled[level]] = values[number]
            filled[level] += 1
    return gathered


@njit(cache=True, nogil=True)
def _moments(values: np.ndarray, mean: float, shift: float, low: float, high: float) -> np.ndarray:
    """What sums over the voxels give, in the places of ``NAMES``."""
    count = len(values)
    second = third = fourth = deviation = energy = robust_sum = 0.0
    robust_count = 0
    smallest, largest = values[0], values[0]
    for value in values:
        centered = value - mean
        square = centered * centered
        second += square
        third += square * centered
        fourth += square * square
        deviation += abs(centered)
        energy += (value + shift) * (value + shift)
        smallest = min(smallest, value)
        largest = max(largest, value)
        if low <= value <= high:
            robust_sum += value
            robust_count += 1
    # Of two unequal voxels, none lies between the 10th and the 90th percentile.
    robust_mean = robust_sum / robust_count if robust_count > 0 else math.nan
    robust = 0.0
    for value in values:
        if low <= value <= high:
            robust += abs(value - robust_mean)
    variance = second / count
    out = np.zeros(19)
    out[2] = energy
    out[5] = fourth / count / (variance * variance) if variance != 0 else 0.0
    out[6] = largest
    out[8] = deviation / count
    out[10] = smallest
    out[11] = largest - smallest
    out[12] = robust / robust_count if robust_count > 0 else math.nan
    out[13] = math.sqrt(energy / count)
    out[14] = third / count / variance**1.5 if variance != 0 else 0.0
    out[17] = variance
    out[18] = math.sqrt(variance)
    return out
