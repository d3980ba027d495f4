"""Features of the neighborhood gray tone difference matrix (Amadasun & King 1989), as PyRadiomics defines them."""

from __future__ import annotations

import numpy as np
from numba import njit

NAMES = ("Busyness", "Coarseness", "Complexity", "Contrast", "Strength")
_COARSEST = 1e6  # stands for an infinite coarseness, of a region without differences


@njit(cache=True, nogil=True)
def features(counts: np.ndarray, differences: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """All features.

    Args:
        counts: ``(R,)`` float64 voxels of each gray level, all above 0.
        differences: ``(R,)`` float64 sum over them of ``|level - mean level of the neighbors|``.
        levels: ``(R,)`` float64 gray levels.

    Returns:
        ``(5,)`` float64 in the order of ``NAMES``.
    """
    size = len(levels)
    voxels = counts.sum()
    total = differences.sum()
    weighted = 0.0
    for i in range(size):
        weighted += counts[i] / voxels * differences[i]
    spread = busy = complexity = strength = 0.0
    for i in range(size):
        p_i = counts[i] / voxels
        for j in range(i):
            p_j = counts[j] / voxels
            distance = levels[i] - levels[j]
            spread += p_i * p_j * distance * distance
            busy += abs(levels[i] * p_i - levels[j] * p_j)
            complexity += distance * (p_i * differences[i] + p_j * differences[j]) / (p_i + p_j)
            strength += (p_i + p_j) * distance * distance
    out = np.empty(5)
    out[0] = weighted / (2 * busy) if busy != 0 else 0.0
    out[1] = 1 / weighted if weighted != 0 else _COARSEST
    out[2] = 2 * complexity / voxels
    out[3] = 2 * spread * total / voxels / (size * (size - 1)) if size > 1 else 0.0
    out[4] = 2 * strength / total if total != 0 else 0.0
    return out
