"""Features of the gray level co-occurrence matrix (Haralick et al. 1973), as PyRadiomics defines them."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

NAMES = (
    "Autocorrelation",
    "ClusterProminence",
    "ClusterShade",
    "ClusterTendency",
    "Contrast",
    "Correlation",
    "DifferenceAverage",
    "DifferenceEntropy",
    "DifferenceVariance",
    "Id",
    "Idm",
    "Idmn",
    "Idn",
    "Imc1",
    "Imc2",
    "InverseVariance",
    "JointAverage",
    "JointEnergy",
    "JointEntropy",
    "MCC",
    "MaximumProbability",
    "SumAverage",
    "SumEntropy",
    "SumSquares",
)
_EPSILON = float(np.spacing(1))
# Directions of the correlation matrix whose strength is this close to the second one are told apart together.
_NEAR = 1e-3


@njit(cache=True, nogil=True)
def features(table: np.ndarray, levels: np.ndarray, symmetrical: bool) -> np.ndarray:
    """All features but MCC of one direction.

    Sums over both levels are taken over the distributions of ``i + j`` and ``|i - j|``, which are marginals of the
    matrix, so that it is read only once.

    Args:
        table: ``(R + 1, R + 1)`` counts or weights; row and column 0 are not read.
        levels: ``(R,)`` float64 gray levels, whole numbers from 1.
        symmetrical: Whether each pair counts in both orders.

    Returns:
        ``(24,)`` float64 in the order of ``NAMES``, 0 in the place of MCC; all NaN where there is no pair.
    """
    size = len(levels)
    highest = int(levels[size - 1])
    sums, differences = np.zeros(2 * highest + 1), np.zeros(highest)
    rows, columns = np.zeros(size), np.zeros(size)
    energy = entropy = largest = 0.0
    for i in range(size):
        level = int(levels[i])
        for j in range(i if symmetrical else 0, size):
            value = float(table[i + 1, j + 1])
            times = 1.0
            if symmetrical:
                value += table[j + 1, i + 1]
                times = 1.0 if i == j else 2.0
            if value == 0:
                continue
            other = int(levels[j])
            sums[level + other] += times * value
            differences[abs(level - other)] += times * value
            rows[i] += value
            columns[j] += value
            if times == 2:
                rows[j] += value
                columns[i] += value
            energy += times * value * value
            entropy += times * value * math.log2(value)
            largest = max(largest, value)
    total = rows.sum()
    out = np.zeros(24)
    if total == 0:
        out[:] = np.nan
        return out
    joint_entropy = math.log2(total) - entropy / total
    mean_x = (rows * levels).sum() / total
    mean_y = (columns * levels).sum() / total
    variance_x = (rows * (levels - mean_x) ** 2).sum() / total
    variance_y = (columns * (levels - mean_y) ** 2).sum() / total
    sum_average = sum_squared = tendency = shade = prominence = sum_entropy = 0.0
    for k in range(2, 2 * highest + 1):
        if sums[k] == 0:
            continue
        p = sums[k] / total
        centered = k - mean_x - mean_y
        square = p * centered * centered
        sum_average += p * k
        sum_squared += p * k * k
        tendency += square
        shade += square * centered
        prominence += square * centered * centered
        sum_entropy -= p * math.log2(p)
    average = contrast = difference_entropy = inverse = 0.0
    for k in range(highest):
        if differences[k] == 0:
            continue
        p = differences[k] / total
        average += p * k
        contrast += p * k * k
        difference_entropy -= p * math.log2(p)
        out[9] += p / (1 + k)
        out[10] += p / (1 + k * k)
        out[11] += p / (1 + k * k / (highest * highest))
        out[12] += p / (1 + k / highest)
        if k > 0:
            inverse += p / (k * k)
    entropy_x = entropy_y = 0.0
    for i in range(size):
        if rows[i] > 0:
            entropy_x -= rows[i] / total * math.log2(rows[i] / total)
        if columns[i] > 0:
            entropy_y -= columns[i] / total * math.log2(columns[i] / total)
    deviations = math.sqrt(variance_x) * math.sqrt(variance_y)
    covariance = (tendency - (contrast - (mean_x - mean_y) ** 2)) / 4
    # Of independent levels the entropy would be that of both marginals together: HXY1 and HXY2 are one number.
    independent = entropy_x + entropy_y
    widest = max(entropy_x, entropy_y)
    out[0] = (sum_squared - contrast) / 4
    out[1] = prominence
    out[2] = shade
    out[3] = tendency
    out[4] = contrast
    out[5] = 1.0 if deviations == 0 else covariance / (deviations + 2.220446049250313e-16)
    out[6] = average
    out[7] = difference_entropy
    for k in range(highest):
        out[8] += differences[k] / total * (k - average) ** 2
    out[13] = 0.0 if widest == 0 else (joint_entropy - independent) / widest
    out[14] = math.sqrt(max(0.0, 1 - math.exp(-2 * max(0.0, independent - joint_entropy))))
    out[15] = inverse
    out[16] = mean_x
    out[17] = energy / (total * total)
    out[18] = joint_entropy
    out[20] = largest / total
    out[21] = sum_average
    out[22] = sum_entropy
    out[23] = variance_x
    return out


def mcc(table: np.ndarray) -> float:
    """Maximal correlation coefficient of one direction: root of the second largest eigenvalue of Haralick's Q.

    Q is similar to ``B B^T`` with ``B_ij = p_ij / sqrt(p_x(i) p_y(j))``, which is symmetric. PyRadiomics adds a
    rounding unit to the denominators of Q, which moves the eigenvalues of rare levels; to first order, that shift is
    what Q itself gives for the eigenvectors of ``B B^T``.

    Args:
        table: ``(R, R)`` float64 counts or weights, not all zero.

    Returns:
        The coefficient, 0 to 1; 1 for a single gray level.
    """
    if len(table) < 2:
        return 1.0
    p = table / table.sum()
    px, py = p.sum(1), p.sum(0)
    used_x, used_y = px > 0, py > 0
    root_x = np.sqrt(np.where(used_x, px, 1))
    scaled = p / root_x[:, None] / np.sqrt(np.where(used_y, py, 1))
    strengths, vectors = np.linalg.eigh(scaled @ scaled.T)
    near = vectors[:, (strengths >= strengths[-2] * (1 - _NEAR)) | (np.arange(len(p)) >= len(p) - 2)]
    left = (near * root_x[:, None]).T @ (p / (px[:, None] * py + _EPSILON))
    right = (near / root_x[:, None]).T @ p
    second = np.sort(np.linalg.eigvals(left @ right.T).real)[-2]
    return float(np.sqrt(max(second, 0.0)))
