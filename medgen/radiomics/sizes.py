"""Features of matrices that count sizes per gray level: runs (GLRLM), zones (GLSZM) and dependences (GLDM).

All three count how often gray level i occurs with size j, and the features are the same sums under three sets of names.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# What `features` returns, in its order.
SMALL, LARGE, GRAY, GRAY_N, SIZE, SIZE_N, FRACTION, GRAY_VARIANCE, SIZE_VARIANCE, ENTROPY = range(10)
LOW, HIGH, SMALL_LOW, SMALL_HIGH, LARGE_LOW, LARGE_HIGH = range(10, 16)


@njit(cache=True, nogil=True)
def features(table: np.ndarray, levels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """All sums over one matrix.

    Args:
        table: ``(R, S)`` float64 counts or weights, not all zero.
        levels: ``(R,)`` float64 gray levels.
        sizes: ``(S,)`` float64 sizes of the columns.

    Returns:
        ``(16,)`` float64: emphasis of small and large sizes, non-uniformity of gray levels and of sizes (each also
        normalized), number of elements over number of voxels, variance of gray levels and of sizes, entropy, emphasis
        of low and high gray levels, and the four emphases of both together.
    """
    by_level, by_size = np.zeros(len(levels)), np.zeros(len(sizes))
    small_low = small_high = large_low = large_high = entropy = 0.0
    for i in range(len(levels)):
        high = levels[i] * levels[i]
        for j in range(len(sizes)):
            value = table[i, j]
            if value == 0:
                continue
            large = sizes[j] * sizes[j]
            by_level[i] += value
            by_size[j] += value
            entropy += value * math.log2(value)
            small_low += value / (high * large)
            small_high += value * high / large
            large_low += value * large / high
            large_high += value * high * large
    total = by_level.sum()
    mean_level = (by_level * levels).sum() / total
    mean_size = (by_size * sizes).sum() / total
    out = np.empty(16)
    out[0] = (by_size / sizes**2).sum() / total
    out[1] = (by_size * sizes**2).sum() / total
    out[2] = (by_level**2).sum() / total
    out[3] = out[2] / total
    out[4] = (by_size**2).sum() / total
    out[5] = out[4] / total
    out[6] = 1 / mean_size
    out[7] = (by_level * (levels - mean_level) ** 2).sum() / total
    out[8] = (by_size * (sizes - mean_size) ** 2).sum() / total
    out[9] = math.log2(total) - entropy / total
    out[10] = (by_level / levels**2).sum() / total
    out[11] = (by_level * levels**2).sum() / total
    out[12] = small_low / total
    out[13] = small_high / total
    out[14] = large_low / total
    out[15] = large_high / total
    return out


GLRLM = {
    "GrayLevelNonUniformity": GRAY,
    "GrayLevelNonUniformityNormalized": GRAY_N,
    "GrayLevelVariance": GRAY_VARIANCE,
    "HighGrayLevelRunEmphasis": HIGH,
    "LongRunEmphasis": LARGE,
    "LongRunHighGrayLevelEmphasis": LARGE_HIGH,
    "LongRunLowGrayLevelEmphasis": LARGE_LOW,
    "LowGrayLevelRunEmphasis": LOW,
    "RunEntropy": ENTROPY,
    "RunLengthNonUniformity": SIZE,
    "RunLengthNonUniformityNormalized": SIZE_N,
    "RunPercentage": FRACTION,
    "RunVariance": SIZE_VARIANCE,
    "ShortRunEmphasis": SMALL,
    "ShortRunHighGrayLevelEmphasis": SMALL_HIGH,
    "ShortRunLowGrayLevelEmphasis": SMALL_LOW,
}
GLSZM = {
    "GrayLevelNonUniformity": GRAY,
    "GrayLevelNonUniformityNormalized": GRAY_N,
    "GrayLevelVariance": GRAY_VARIANCE,
    "HighGrayLevelZoneEmphasis": HIGH,
    "LargeAreaEmphasis": LARGE,
    "LargeAreaHighGrayLevelEmphasis": LARGE_HIGH,
    "LargeAreaLowGrayLevelEmphasis": LARGE_LOW,
    "LowGrayLevelZoneEmphasis": LOW,
    "SizeZoneNonUniformity": SIZE,
    "SizeZoneNonUniformityNormalized": SIZE_N,
    "SmallAreaEmphasis": SMALL,
    "SmallAreaHighGrayLevelEmphasis": SMALL_HIGH,
    "SmallAreaLowGrayLevelEmphasis": SMALL_LOW,
    "ZoneEntropy": ENTROPY,
    "ZonePercentage": FRACTION,
    "ZoneVariance": SIZE_VARIANCE,
}
GLDM = {
    "DependenceEntropy": ENTROPY,
    "DependenceNonUniformity": SIZE,
    "DependenceNonUniformityNormalized": SIZE_N,
    "DependenceVariance": SIZE_VARIANCE,
    "GrayLevelNonUniformity": GRAY,
    "GrayLevelVariance": GRAY_VARIANCE,
    "HighGrayLevelEmphasis": HIGH,
    "LargeDependenceEmphasis": LARGE,
    "LargeDependenceHighGrayLevelEmphasis": LARGE_HIGH,
    "LargeDependenceLowGrayLevelEmphasis": LARGE_LOW,
    "LowGrayLevelEmphasis": LOW,
    "SmallDependenceEmphasis": SMALL,
    "SmallDependenceHighGrayLevelEmphasis": SMALL_HIGH,
    "SmallDependenceLowGrayLevelEmphasis": SMALL_LOW,
}
