"""First-order features of the intensities of a region, as PyRadiomics defines them."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

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


def features(values: np.ndarray, counts: np.ndarray, voxel_volume: float, shift: float) -> np.ndarray:
    """All features.

    Args:
        values: ``(N,)`` float64 intensities of the region.
        counts: ``(R,)`` voxels of each gray level that occurs.
        voxel_volume: Volume of a voxel in mm³ (area in mm² in 2D).
        shift: Added to the intensities for energy and root mean square (``voxelArrayShift``).

    Returns:
        ``(19,)`` float64 in the order of ``NAMES``.
    """
    low, lower, median, upper, high = _quantiles(values, (0.1, 0.25, 0.5, 0.75, 0.9))
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


def _quantiles(values: np.ndarray, fractions: tuple[float, ...]) -> list[float]:
    """Quantiles by linear interpolation, with numpy's rounding: exact where neighbors are tied."""
    places = [fraction * (len(values) - 1) for fraction in fractions]
    below = [int(place) for place in places]
    above = [min(index + 1, len(values) - 1) for index in below]
    ordered = np.partition(values, sorted({*below, *above}))
    result = []
    for place, left, right in zip(places, below, above, strict=True):
        a, b, weight = float(ordered[left]), float(ordered[right]), place - left
        result.append(a + (b - a) * weight if weight < 0.5 else b - (b - a) * (1 - weight))
    return result


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
    robust_mean = robust_sum / robust_count
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
    out[12] = robust / robust_count
    out[13] = math.sqrt(energy / count)
    out[14] = third / count / variance**1.5 if variance != 0 else 0.0
    out[17] = variance
    out[18] = math.sqrt(variance)
    return out
