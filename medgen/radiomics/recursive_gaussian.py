"""The Laplacian of Gaussian by recursive filters, to the last bit as ITK computes it.

Along one axis a Gaussian of width σ and its second derivative are each the sum of a causal and an anticausal recursive
filter of order four (Deriche). Its impulse response is a pair of damped waves, ``Σ (aᵢ cos ωᵢn/σ + bᵢ sin ωᵢn/σ)
e^{λᵢn/σ}``, fitted to the Gaussian and its derivatives by Farnebäck and Westin, whose table this module holds.

References:
    R. Deriche, "Recursively implementing the Gaussian and its derivatives", INRIA research report 1893, 1993.
    G. Farnebäck, C.-F. Westin, "Improving Deriche-style recursive Gaussian filters", J. Math. Imaging Vis. 26, 2006.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from medgen.types import BadInputError, Spacing

# Fewer voxels along an axis do not hold the four start values of the recursion.
MIN_VOXELS = 4

# The two waves: ω and λ, shared by all derivatives; a and b of the Gaussian and of its second derivative.
_OMEGA = (0.6681, 2.0787)
_LAMBDA = (-1.3932, -1.3732)
_GAUSSIAN = ((1.3530, 1.8151), (-0.3531, 0.0902))
_SECOND_DERIVATIVE = ((-1.3563, 5.2318), (0.3446, -2.2355))

# Lines filtered side by side: eight doubles fill a cache line, and the recursion then runs on whole vectors.
_LINES = 8


def laplacian_of_gaussian(image: np.ndarray, spacing: Spacing, sigma: float) -> np.ndarray:
    """The Laplacian of an image smoothed by a Gaussian, times σ², as ITK's recursive filter gives it.

    ITK keeps its images between the passes in single precision (the recursion along a line is double); so does this
    function, and its values are single-precision numbers held in float64.

    Args:
        image: ``(y, x)`` or ``(z, y, x)`` float64, at least :data:`MIN_VOXELS` along each axis.
        spacing: Voxel edge lengths in mm, in array order.
        sigma: Width of the Gaussian in mm.

    Returns:
        An array of the image's shape, in its units.

    Raises:
        BadInputError: An axis is too short.
    """
    if min(image.shape) < MIN_VOXELS:
        raise BadInputError(
            f"LoG: expected {MIN_VOXELS} voxels or more along each axis, got {image.shape}. "
            "Filter single slices as 2D images, or leave LoG out."
        )
    total = np.zeros_like(image)
    # ITK counts axes from x, the last one here, and the order decides the rounding.
    axes = tuple(reversed(range(image.ndim)))
    for axis in axes:
        term = _filter_axis(image, axis, _coefficients(float(sigma), float(spacing[axis]), True))
        for other in axes:
            if other != axis:
                term = _filter_axis(term, other, _coefficients(float(sigma), float(spacing[other]), False))
        total = (total + term * (1.0 / spacing[axis] ** 2)).astype(np.float32).astype(np.float64)
    return total


def _filter_axis(image: np.ndarray, axis: int, coefficients: np.ndarray) -> np.ndarray:
    """The image filtered along one axis."""
    out = np.empty(image.size)
    _filter_lines(image.reshape(-1), image.shape[axis], int(np.prod(image.shape[axis + 1 :])), coefficients, out)
    return out.reshape(image.shape)


@lru_cache(maxsize=256)
def _coefficients(sigma: float, spacing: float, derivative: bool) -> np.ndarray:
    """``(20,)``: causal n0..n3, recursive d1..d4, anticausal m1..m4, then the start values' bn1..bn4 and bm1..bm4."""
    width = sigma / spacing
    decay = [np.exp(rate / width) for rate in _LAMBDA]
    cosine = [np.cos(rate / width) for rate in _OMEGA]
    d = np.array(
        [
            -2 * (decay[1] * cosine[1] + decay[0] * cosine[0]),
            4 * cosine[1] * cosine[0] * decay[0] * decay[1] + (decay[0] ** 2 + decay[1] ** 2),
            -2 * cosine[0] * decay[0] * decay[1] ** 2 + -2 * cosine[1] * decay[1] * decay[0] ** 2,
            decay[0] ** 2 * decay[1] ** 2,
        ]
    )
    # Moments of the two polynomials: sum, sum of k, sum of k².
    sd, dd, ed = 1 + d.sum(), d @ np.arange(1, 5), d @ np.arange(1, 5) ** 2
    n = _numerator(_GAUSSIAN, width)
    if derivative:
        # A little of the Gaussian is mixed in so that a constant has no second derivative; then x²/2 has one of 1.
        second = _numerator(_SECOND_DERIVATIVE, width)
        n = second - (2 * second.sum() - sd * second[0]) / (2 * n.sum() - sd * n[0]) * n
        sn, dn, en = n.sum(), n @ np.arange(4), n @ np.arange(4) ** 2
        n *= sigma**2 / ((en * sd * sd - ed * sn * sd - 2 * dn * dd * sd + 2 * dd * dd * sn) / sd**3)
    else:
        n *= 1 / (2 * n.sum() / sd - n[0])
    m = np.append(n[1:], 0.0) - d * n[0]
    # Beyond its ends a line goes on with its first and last value, to which the recursion has long settled.
    return np.concatenate([n, d, m, d * n.sum() / sd, d * m.sum() / sd])


def _numerator(waves: tuple[tuple[float, float], tuple[float, float]], width: float) -> np.ndarray:
    """``(4,)``: the numerator of the causal filter whose impulse response is the two waves."""
    (a1, b1), (a2, b2) = waves
    e1, e2 = (np.exp(rate / width) for rate in _LAMBDA)
    s1, s2 = (np.sin(rate / width) for rate in _OMEGA)
    c1, c2 = (np.cos(rate / width) for rate in _OMEGA)
    return np.array(
        [
            a1 + a2,
            e2 * (b2 * s2 - (a2 + 2 * a1) * c2) + e1 * (b1 * s1 - (a1 + 2 * a2) * c1),
            ((a1 + a2) * c2 * c1 - (b1 * c2 * s1 + b2 * c1 * s2)) * (2 * e1 * e2) + (a2 * e1 * e1 + a1 * e2 * e2),
            e2 * e1 * e1 * (b2 * s2 - a2 * c2) + e1 * e2 * e2 * (b1 * s1 - a1 * c1),
        ]
    )


@njit(cache=True, nogil=True)
def _filter_lines(image, n, inner, coefficients, out):  # type: ignore[no-untyped-def]
    """Filter a flat ``(outer, n, inner)`` image along n into ``out``, eight lines at a time."""
    count = image.size // n
    begin = np.empty(_LINES, np.int64)
    n0, n1, n2, n3 = coefficients[0], coefficients[1], coefficients[2], coefficients[3]
    d1, d2, d3, d4 = coefficients[4], coefficients[5], coefficients[6], coefficients[7]
    m1, m2, m3, m4 = coefficients[8], coefficients[9], coefficients[10], coefficients[11]
    data = np.empty(n * _LINES)
    causal = np.empty(n * _LINES)
    anticausal = np.empty(n * _LINES)
    # Lines are numbered over outer and inner together, so that a last axis (inner 1) fills its blocks too.
    for first in range(0, count, _LINES):
        for b in range(_LINES):
            line = min(first + b, count - 1)
            begin[b] = line // inner * n * inner + line % inner
        for i in range(n):
            for b in range(_LINES):
                data[i * _LINES + b] = image[begin[b] + i * inner]
        for i in range(4):
            j = n - 1 - i
            for b in range(_LINES):
                start, end = data[b], data[(n - 1) * _LINES + b]
                forward = backward = 0.0
                for k in range(4):
                    forward += data[max(i - k, 0) * _LINES + b] * coefficients[k]
                    backward += data[min(j + k + 1, n - 1) * _LINES + b] * coefficients[8 + k]
                forward_past = backward_past = 0.0
                for k in range(1, 5):
                    if k <= i:
                        forward_past += causal[(i - k) * _LINES + b] * coefficients[3 + k]
                        backward_past += anticausal[(j + k) * _LINES + b] * coefficients[3 + k]
                    else:
                        forward_past += start * coefficients[11 + k]
                        backward_past += end * coefficients[15 + k]
                causal[i * _LINES + b] = forward - forward_past
                anticausal[j * _LINES + b] = backward - backward_past
        # One step along the lines is eight places in these blocks.
        for i in range(4, n):
            o = i * _LINES
            for b in range(_LINES):
                forward = data[o + b] * n0 + data[o - 8 + b] * n1 + data[o - 16 + b] * n2 + data[o - 24 + b] * n3
                causal[o + b] = forward - (
                    causal[o - 8 + b] * d1 + causal[o - 16 + b] * d2 + causal[o - 24 + b] * d3 + causal[o - 32 + b] * d4
                )
        for i in range(n - 5, -1, -1):
            o = i * _LINES
            for b in range(_LINES):
                backward = data[o + 8 + b] * m1 + data[o + 16 + b] * m2 + data[o + 24 + b] * m3 + data[o + 32 + b] * m4
                anticausal[o + b] = backward - (
                    anticausal[o + 8 + b] * d1
                    + anticausal[o + 16 + b] * d2
                    + anticausal[o + 24 + b] * d3
                    + anticausal[o + 32 + b] * d4
                )
        for i in range(n):
            for b in range(_LINES):
                out[begin[b] + i * inner] = np.float32(causal[i * _LINES + b] + anticausal[i * _LINES + b])
