"""From a scan and a mask to the voxels that features are taken of: normalization, resampling, cropping, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medgen.radiomics.resampling import resample
from medgen.types import BadInputError, Spacing

Box = tuple[slice, ...]


def normalize(image: np.ndarray, *, scale: float = 1.0, outliers: float | None = None) -> np.ndarray:
    """Z-score of the whole image, times a scale.

    Args:
        image: Float64 intensities.
        scale: Factor after the z-score (``normalizeScale``).
        outliers: Z-score beyond which intensities are cut (``removeOutliers``), or None.

    Returns:
        Float64 of the same shape.

    Raises:
        BadInputError: If the image is constant.
    """
    # As ITK takes them: sums of whole intensities are exact, so that these are normalized to the same last bit, and
    # fall in the same bins.
    total, squares = float(image.sum()), float(np.square(image).sum())
    variance = (squares - total * total / image.size) / max(image.size - 1, 1)
    # A constant image of large intensities has a variance of rounding errors.
    if variance <= 1e-14 * squares / image.size:
        raise BadInputError(
            f"image: expected intensities that vary, got a constant image of {image.flat[0]:g}, which cannot be "
            "normalized. Leave it out, or switch normalize off."
        )
    scores = (image - total / image.size) * (1.0 / np.sqrt(variance))
    if outliers is not None:
        scores = scores.clip(-outliers, outliers)
    return scores * scale


def bounding_box(mask: np.ndarray, margin: int = 0) -> Box:
    """Smallest box that holds the mask.

    Args:
        mask: Bool array with at least one voxel.
        margin: Voxels to add on every side, as far as the array goes.

    Returns:
        One slice per axis.
    """
    box = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, size)))
    return tuple(box)


def crops(settings: Mapping[str, Any]) -> bool:
    """Whether the image is cut around the region before it is filtered, so that each region has filtered images of its
    own.
    """
    return _resamples(settings) or bool(settings.get("preCrop", False))


def cut(
    image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Resample, or cut around the region, as the settings say.

    Args:
        image: ``(Z, Y, X)`` or ``(Y, X)`` float64.
        mask: Bool of the same shape with at least one voxel.
        spacing: Voxel edges in mm, in array order.
        settings: PyRadiomics settings.

    Returns:
        Image, mask and spacing.
    """
    pad = int(settings.get("padDistance", 5))
    if _resamples(settings):
        wanted = tuple(reversed(settings["resampledPixelSpacing"]))
        if len(wanted) == 3 and mask.ndim == 2:
            wanted = wanted[1:]
        if len(wanted) != mask.ndim:
            raise BadInputError(
                f"resampledPixelSpacing: expected {mask.ndim} lengths (x, y{', z' if mask.ndim == 3 else ''}), got "
                f"{len(wanted)}. Give 0 for an axis that keeps its spacing."
            )
        interpolator = settings.get("interpolator", "sitkBSpline")
        return resample(image, mask, spacing, wanted, interpolator=interpolator, pad_distance=pad)
    if settings.get("preCrop", False):
        # PyRadiomics pads here by 0 unless the setting is given; its extractor always gives it.
        box = bounding_box(mask, pad)
        return np.ascontiguousarray(image[box]), np.ascontiguousarray(mask[box]), spacing
    return image, mask, spacing


def check(mask: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Refuse a region that is too small to have features.

    Args:
        mask: Bool array.
        settings: PyRadiomics settings ``minimumROIDimensions`` and ``minimumROISize``.

    Raises:
        BadInputError: If it is empty, a single voxel, or smaller than the settings ask for.
    """
    voxels = int(np.count_nonzero(mask))
    if voxels == 0:
        raise BadInputError("mask: expected at least one voxel of the label, got none. Leave the scan out.")
    dims = sum(part.stop - part.start > 1 for part in bounding_box(mask))
    least = int(settings.get("minimumROIDimensions", 2))
    if dims == 0:
        raise BadInputError("mask: expected more than one voxel, got a single one. Leave the region out.")
    if dims < least:
        raise BadInputError(
            f"mask: expected a region that extends along {least} axes, got {dims}. "
            "Leave it out, or lower minimumROIDimensions."
        )
    size = settings.get("minimumROISize")
    if size is not None and voxels <= size:
        raise BadInputError(
            f"mask: expected more than {size} voxels, got {voxels}. Lower minimumROISize or leave it out."
        )


def resegment(image: np.ndarray, mask: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """The mask without the voxels whose intensity lies outside ``resegmentRange``.

    Args:
        image: Float64 intensities.
        mask: Bool of the same shape.
        settings: PyRadiomics settings ``resegmentRange`` and ``resegmentMode``.

    Returns:
        Bool mask; the same object where no range is set.

    Raises:
        BadInputError: If at most one voxel is left.
    """
    limits = settings.get("resegmentRange")
    if limits is None:
        return mask
    mode = settings.get("resegmentMode", "absolute")
    values = image[mask]
    thresholds = np.sort(np.asarray(limits, dtype=np.float64))
    if mode == "relative":
        thresholds = thresholds * values.max()
    elif mode == "sigma":
        thresholds = values.mean() + values.std() * thresholds
    kept = mask & (image >= thresholds[0])
    if len(thresholds) == 2:
        kept &= image <= thresholds[1]
    if np.count_nonzero(kept) <= 1:
        raise BadInputError(
            f"resegmentRange: expected more than one voxel within {thresholds.tolist()} ({mode}), "
            f"got {np.count_nonzero(kept)} of {len(values)}. Widen the range or leave the scan out."
        )
    return kept


def _resamples(settings: Mapping[str, Any]) -> bool:
    spacing, interpolator = settings.get("resampledPixelSpacing"), settings.get("interpolator", "sitkBSpline")
    return spacing is not None and interpolator is not None
