"""Resampling of the surroundings of a region, on the grid that PyRadiomics lays and to the last bit as ITK does it.

Image and mask share one grid, so its origin and direction play no part: everything happens in voxel indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from numba import njit

from medgen.types import BadInputError, Spacing

INTERPOLATORS = ("sitkNearestNeighbor", "sitkLinear", "sitkBSpline", "sitkBSpline3")

# Pole of the recursive filter that turns samples into cubic B-spline coefficients.
_POLE = np.sqrt(3.0) - 2.0
# Where the mirrored line before the first sample is cut off: the pole's powers are below 1e-10 there.
_HORIZON = int(np.ceil(np.log(1e-10) / np.log(abs(_POLE))))


def resample(
    image: np.ndarray,
    mask: np.ndarray,
    spacing: Spacing,
    new_spacing: Sequence[float],
    *,
    interpolator: str = "sitkBSpline",
    pad_distance: int = 5,
) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """The region and its surroundings at another spacing.

    New voxels are aligned with the outer border of the old grid, not with its first center. Image and mask are 0 where
    a new center lies on the far border or beyond it. Where the spacing stays, image and mask are only cropped.

    Args:
        image: ``(z, y, x)`` or ``(y, x)`` float64, C-contiguous.
        mask: Boolean, of the image's shape.
        spacing: Voxel edge lengths in mm, in array order.
        new_spacing: Wanted ones; 0 keeps an axis, and an axis along which the region is one voxel thick is always kept.
        interpolator: One of :data:`INTERPOLATORS`, for the image; the mask takes the nearest voxel, halves upward.
        pad_distance: Voxels kept around the region's box, counted in new voxels, as far as the image goes.

    Returns:
        Image, mask and spacing, in the same layout.

    Raises:
        BadInputError: An argument is outside its range, or the mask is empty.
    """
    _check(image, mask, spacing, new_spacing, interpolator, pad_distance)
    box = [np.flatnonzero(mask.any(axis=tuple(set(range(mask.ndim)) - {axis})))[[0, -1]] for axis in range(mask.ndim)]
    low, high = np.array(box, dtype=np.int64).T
    size = np.array(image.shape)
    old = np.array(spacing, dtype=np.float64)
    new = np.array(new_spacing, dtype=np.float64)
    new = np.where((new == 0) | (low == high), old, new)
    if np.allclose(old, new):
        window = tuple(
            slice(max(int(a) - pad_distance, 0), int(b) + pad_distance + 1) for a, b in zip(low, high, strict=True)
        )
        return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window]), tuple(old.tolist())
    ratio = old / new
    first = np.maximum(np.floor((low - 0.5) * ratio - pad_distance), 0)
    last = np.minimum(np.ceil((high + 0.5) * ratio + pad_distance), np.ceil(size * ratio) - 1)
    origin = old * (0.5 * (new - old) / old + first / ratio)
    counts = (last - first + 1).astype(int)
    points = [
        _centers(float(old[axis]), float(new[axis]), float(origin[axis]), int(counts[axis]), axis == image.ndim - 1)
        for axis in range(image.ndim)
    ]
    inside = [(point >= -0.5) & (point < n - 0.5) for point, n in zip(points, size, strict=True)]
    nearest = [np.clip(np.floor(point + 0.5), 0, n - 1).astype(int) for point, n in zip(points, size, strict=True)]
    kept = reduce(np.logical_and.outer, inside)
    values = {
        "sitkNearestNeighbor": lambda: image[np.ix_(*nearest)],
        "sitkLinear": lambda: _linear(image, points),
        "sitkBSpline": lambda: _cubic(image, points),
        "sitkBSpline3": lambda: _cubic(image, points),  # another name for the same
    }[interpolator]()
    return np.where(kept, values, 0.0), mask[np.ix_(*nearest)] & kept, tuple(new.tolist())


def check_layout(image: np.ndarray, mask: np.ndarray) -> None:
    """Refuse arrays that the kernels cannot read.

    Args:
        image: Expected to be ``(z, y, x)`` or ``(y, x)`` float64, C-contiguous.
        mask: Expected to be boolean, of the image's shape.

    Raises:
        BadInputError: If they are not.
    """
    if image.ndim not in (2, 3) or image.dtype != np.float64 or not image.flags.c_contiguous:
        raise BadInputError(
            f"expected a C-contiguous float64 image of 2 or 3 axes, got {image.dtype} of shape {image.shape}: "
            "pass numpy.ascontiguousarray(image, dtype=float)"
        )
    if mask.shape != image.shape or mask.dtype != np.bool_:
        raise BadInputError(
            f"expected a boolean mask of the image's shape {image.shape}, got {mask.dtype} of shape {mask.shape}"
        )


def _check(
    image: np.ndarray,
    mask: np.ndarray,
    spacing: Spacing,
    new_spacing: Sequence[float],
    interpolator: str,
    pad_distance: int,
) -> None:
    """Raise for arguments outside their range."""
    check_layout(image, mask)
    if not mask.any():
        raise BadInputError("expected a mask with a region, got an empty one: nothing says where to resample")
    if len(spacing) != image.ndim or not all(edge > 0 for edge in spacing):
        raise BadInputError(f"spacing: expected {image.ndim} edge lengths above 0 mm, got {tuple(spacing)}")
    if len(new_spacing) != image.ndim or not all(0 <= edge < np.inf for edge in new_spacing):
        raise BadInputError(
            f"resampledPixelSpacing: expected {image.ndim} edge lengths in mm, 0 for an axis to keep, "
            f"got {tuple(new_spacing)}"
        )
    if interpolator not in INTERPOLATORS:
        raise BadInputError(
            f"interpolator: expected one of {', '.join(INTERPOLATORS)}, got {interpolator!r}. "
            "Choose one of these, or pass engine='pyradiomics', which takes all of SimpleITK's."
        )
    if pad_distance < 0 or pad_distance != int(pad_distance):
        raise BadInputError(f"padDistance: expected a whole number of voxels of at least 0, got {pad_distance!r}")


def _centers(old: float, new: float, origin: float, count: int, scanline: bool) -> np.ndarray:
    """``(count,)``: centers of the new voxels along one axis, as old voxel indices.

    ITK goes through mm, and along x it divides the way between the first and the last center. Both round, and the
    rounding decides on which side of a border a center falls that lies right on it.
    """
    per_mm = 1.0 / old
    if not scanline:
        return (origin + new * np.arange(count)) * per_mm
    start, end = origin * per_mm, (origin + new * count) * per_mm
    return start + np.arange(count) / count * (end - start)


def _linear(image: np.ndarray, points: Sequence[np.ndarray]) -> np.ndarray:
    """Linear interpolation at the grid of points, x first; constant beyond the outermost centers."""
    for axis in reversed(range(image.ndim)):
        n = image.shape[axis]
        before = np.clip(np.floor(points[axis]), 0, n - 1).astype(int)
        way = np.maximum(points[axis] - before, 0.0).reshape((-1,) + (1,) * (image.ndim - 1 - axis))
        start = image.take(before, axis)
        image = start + (image.take(np.minimum(before + 1, n - 1), axis) - start) * way
    return image


def _cubic(image: np.ndarray, points: Sequence[np.ndarray]) -> np.ndarray:
    """Cubic B-spline interpolation at the grid of points; lines are mirrored at their outermost centers.

    References:
        M. Unser, "Splines: a perfect fit for signal and image processing", IEEE Signal Process. Mag. 16, 1999.
    """
    coefficients = image.copy()
    for axis in reversed(range(image.ndim)):
        n = image.shape[axis]
        if n > 1:
            lines = (int(np.prod(image.shape[:axis])), n, int(np.prod(image.shape[axis + 1 :])))
            _to_coefficients(coefficients.reshape(lines), _POLE, _HORIZON)
    supports = [_support(point, n) for point, n in zip(points, image.shape, strict=True)]
    if image.ndim == 2:
        coefficients = coefficients[None]
        supports.insert(0, (np.zeros((1, 1), dtype=np.int64), np.ones((1, 1))))
    (iz, wz), (iy, wy), (ix, wx) = supports
    out = np.zeros((iz.shape[1], iy.shape[1], ix.shape[1]))
    _interpolate(coefficients, iz, wz, iy, wy, ix, wx, out)
    return out.reshape(tuple(len(point) for point in points))


def _support(points: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``(4, points)`` each: the voxels that a cubic B-spline at each point touches, and their weights."""
    # ITK rounds to single precision before it rounds down, which moves points a hair below a center onto it.
    base = np.floor(points.astype(np.float32)).astype(np.float64)
    index = base.astype(np.int64) + np.arange(-1, 3)[:, None]
    # Points lie at most half a voxel outside, so one reflection at each end does, but for an axis of two voxels: there
    # it takes another, which ITK leaves out, and reads outside its image.
    index = np.abs(index)
    index = np.abs(np.where(index > n - 1, 2 * (n - 1) - index, index)) if n > 1 else np.zeros_like(index)
    way = points - base
    last = (1.0 / 6.0) * way * way * way
    first = (1.0 / 6.0) + 0.5 * way * (way - 1.0) - last
    third = way + first - 2.0 * last
    return index, np.stack([first, 1.0 - first - third - last, third, last])


@njit(cache=True, nogil=True)
def _to_coefficients(lines, pole, horizon):  # type: ignore[no-untyped-def]
    """Turn samples ``(outer, n, inner)`` into B-spline coefficients along n, in place."""
    outer, n, inner = lines.shape
    gain = (1.0 - pole) * (1.0 - 1.0 / pole)
    for a in range(outer):
        for i in range(n):
            for c in range(inner):
                lines[a, i, c] *= gain
        # The first causal value sums the mirrored line; a short line is summed over its whole period.
        if horizon < n:
            power = pole
            for i in range(1, horizon):
                for c in range(inner):
                    lines[a, 0, c] += power * lines[a, i, c]
                power *= pole
        else:
            power = pole
            mirrored = pole ** (n - 1.0)
            for c in range(inner):
                lines[a, 0, c] += mirrored * lines[a, n - 1, c]
            mirrored *= mirrored * (1.0 / pole)
            for i in range(1, n - 1):
                for c in range(inner):
                    lines[a, 0, c] += (power + mirrored) * lines[a, i, c]
                power *= pole
                mirrored *= 1.0 / pole
            for c in range(inner):
                lines[a, 0, c] /= 1.0 - power * power
        for i in range(1, n):
            for c in range(inner):
                lines[a, i, c] += pole * lines[a, i - 1, c]
        for c in range(inner):
            lines[a, n - 1, c] = (pole / (pole * pole - 1.0)) * (pole * lines[a, n - 2, c] + lines[a, n - 1, c])
        for i in range(n - 2, -1, -1):
            for c in range(inner):
                lines[a, i, c] = pole * (lines[a, i + 1, c] - lines[a, i, c])


@njit(cache=True, nogil=True)
def _interpolate(coefficients, iz, wz, iy, wy, ix, wx, out):  # type: ignore[no-untyped-def]
    """Add to ``out`` the products of coefficients and weights, in ITK's order: x runs fastest."""
    taps_z, taps_y, taps_x = iz.shape[0], iy.shape[0], ix.shape[0]
    # The planes in use, with what each tap along x reads put side by side, so that the inner loop runs over whole rows.
    read = np.empty((taps_z, taps_x, coefficients.shape[1], out.shape[2]))
    held = np.full(taps_z, -1)
    for z in range(out.shape[0]):
        for kz in range(taps_z):
            plane = iz[kz, z]
            if held[kz] != plane:
                held[kz] = plane
                for kx in range(taps_x):
                    for y in range(coefficients.shape[1]):
                        for x in range(out.shape[2]):
                            read[kz, kx, y, x] = coefficients[plane, y, ix[kx, x]]
        for y in range(out.shape[1]):
            for kz in range(taps_z):
                for ky in range(taps_y):
                    row, weight_y, weight_z = iy[ky, y], wy[ky, y], wz[kz, z]
                    for kx in range(taps_x):
                        for x in range(out.shape[2]):
                            out[z, y, x] += wx[kx, x] * weight_y * weight_z * read[kz, kx, row, x]
