"""Shape features of a mask, by PyRadiomics's definitions and names; they do not look at the image."""

from __future__ import annotations

import numpy as np

from medgen.radiomics.mesh import diameter_2d, diameters, surface
from medgen.radiomics.region import bounding_box
from medgen.types import BadInputError, Spacing

# PyRadiomics takes eigenvalues between this and 0 for rounding, and gives NaN below.
_ROUNDING = -1e-10


def shape_features(mask: np.ndarray, spacing: Spacing, *, deprecated: bool = False) -> dict[str, float]:
    """Size and form of a volume.

    Args:
        mask: ``(z, y, x)`` bool with at least one voxel.
        spacing: Voxel edge lengths in mm, in array order.
        deprecated: Also Compactness1, Compactness2 and SphericalDisproportion, which follow from Sphericity.

    Returns:
        Value per feature: lengths in mm, areas in mm², volumes in mm³. A flat mask has LeastAxisLength and Flatness 0;
        a single voxel has no axes, so Elongation and Flatness are NaN there.

    Raises:
        BadInputError: The mask is empty or not boolean, or its axes do not fit the spacing.
    """
    mask = _bordered(mask, spacing, 3)
    area, volume = surface(mask, spacing)
    across_z, across_y, across_x, overall = diameters(mask, spacing)
    least, minor, major = _axis_variances(mask, spacing)
    ball = (36 * np.pi * volume**2) ** (1 / 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        features = {
            "MeshVolume": volume,
            "VoxelVolume": np.count_nonzero(mask) * np.prod(spacing),
            "SurfaceArea": area,
            "SurfaceVolumeRatio": np.divide(area, volume),
            "Sphericity": ball / area,
            "Compactness1": volume / (area**1.5 * np.sqrt(np.pi)),
            "Compactness2": 36 * np.pi * volume**2 / area**3,
            "SphericalDisproportion": np.divide(area, ball),
            "Maximum3DDiameter": overall,
            "Maximum2DDiameterSlice": across_z,
            "Maximum2DDiameterColumn": across_y,
            "Maximum2DDiameterRow": across_x,
            "MajorAxisLength": 4 * np.sqrt(major),
            "MinorAxisLength": 4 * np.sqrt(minor),
            "LeastAxisLength": 4 * np.sqrt(least),
            "Elongation": np.sqrt(minor / major),
            "Flatness": np.sqrt(least / major),
        }
    hidden = () if deprecated else ("Compactness1", "Compactness2", "SphericalDisproportion")
    return {name: float(value) for name, value in features.items() if name not in hidden}


def shape2d_features(mask: np.ndarray, spacing: Spacing, *, deprecated: bool = False) -> dict[str, float]:
    """Size and form of a region in the plane.

    Args:
        mask: ``(y, x)`` bool with at least one pixel.
        spacing: Pixel edge lengths in mm, in array order.
        deprecated: Also SphericalDisproportion, the inverse of Sphericity.

    Returns:
        Value per feature: lengths in mm, areas in mm². A line has MinorAxisLength and Elongation 0; Elongation of a
        single pixel is NaN.

    Raises:
        BadInputError: The mask is empty or not boolean, or its axes do not fit the spacing.
    """
    mask = _bordered(mask, spacing, 2)
    height, width = spacing
    perimeter, area = _outline(mask, height, width)
    minor, major = _axis_variances(mask, spacing)
    sphericity = 2 * np.sqrt(np.pi * area) / perimeter
    with np.errstate(invalid="ignore"):
        features = {
            "MeshSurface": area,
            "PixelSurface": np.count_nonzero(mask) * height * width,
            "Perimeter": perimeter,
            "PerimeterSurfaceRatio": perimeter / area,
            "Sphericity": sphericity,
            "SphericalDisproportion": 1 / sphericity,
            "MaximumDiameter": diameter_2d(mask, spacing),
            "MajorAxisLength": 4 * np.sqrt(major),
            "MinorAxisLength": 4 * np.sqrt(minor),
            "Elongation": np.sqrt(minor / major),
        }
    hidden = () if deprecated else ("SphericalDisproportion",)
    return {name: float(value) for name, value in features.items() if name not in hidden}


def _bordered(mask: np.ndarray, spacing: Spacing, axes: int) -> np.ndarray:
    """The mask cut to its region, with a border of one voxel outside around it."""
    if mask.ndim != axes or mask.dtype != np.bool_ or not mask.any():
        raise BadInputError(
            f"expected a boolean mask of {axes} axes with a region in it, got {mask.dtype} of shape {mask.shape} "
            f"with {np.count_nonzero(mask)} voxels: pass mask == label"
        )
    if len(spacing) != axes or not all(edge > 0 for edge in spacing):
        raise BadInputError(f"expected {axes} voxel edge lengths above 0 mm, got {tuple(spacing)}")
    return np.pad(mask[bounding_box(mask)], 1)


def _axis_variances(mask: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Variances of the voxel centers along their principal axes in mm², smallest first."""
    axes = mask.ndim
    count = int(np.count_nonzero(mask))
    indices = [np.arange(n) for n in mask.shape]
    covariance = np.empty((axes, axes))
    counts = [mask.sum(axis=tuple(set(range(axes)) - {axis})) for axis in range(axes)]
    sums = [int(indices[axis] @ counts[axis]) for axis in range(axes)]
    for a in range(axes):
        for b in range(a, axes):
            if a == b:
                products = int(indices[a] ** 2 @ counts[a])
            else:
                plane = mask.sum(axis=tuple(set(range(axes)) - {a, b}))
                products = int(indices[a] @ plane @ indices[b])
            # In whole numbers, so that a flat mask has a variance of exactly 0.
            covariance[a, b] = covariance[b, a] = (count * products - sums[a] * sums[b]) / count**2
    covariance *= np.outer(spacing, spacing)
    variances = np.linalg.eigvalsh(covariance)
    variances[(variances < 0) & (variances > _ROUNDING)] = 0
    return np.where(variances < 0, np.nan, variances)


def _outline(mask: np.ndarray, height: float, width: float) -> tuple[float, float]:
    """Length in mm and area in mm² of the outline that marching squares draw through the middles between pixels."""
    corners = mask.astype(np.int64)
    patterns = corners[:-1, :-1] + 2 * corners[:-1, 1:] + 4 * corners[1:, 1:] + 8 * corners[1:, :-1]
    counts = np.bincount(patterns.ravel(), minlength=16)
    # A corner alone, or all but one, is cut off across; two opposite corners are cut off one by one.
    alone, missing = counts[[1, 2, 4, 8]].sum(), counts[[7, 11, 13, 14]].sum()
    opposite = counts[[5, 10]].sum()
    across_rows, across_columns = counts[[3, 12]].sum(), counts[[6, 9]].sum()
    length = (alone + missing + 2 * opposite) * np.hypot(height, width) / 2
    length += across_rows * width + across_columns * height
    eighths = alone + 2 * opposite + 4 * (across_rows + across_columns) + 7 * missing + 8 * counts[15]
    return float(length), float(eighths / 8 * height * width)
