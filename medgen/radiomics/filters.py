"""Images derived from an image before its features are taken, as PyRadiomics defines and names them.

Arrays are in SimpleITK's array order, ``(z, y, x)`` or ``(y, x)``, and so are spacings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medgen.radiomics.lbp import LBP_METHODS, lbp_2d, lbp_3d
from medgen.radiomics.recursive_gaussian import MIN_VOXELS, laplacian_of_gaussian
from medgen.radiomics.resampling import check_layout
from medgen.radiomics.wavelet import wavelet_bands
from medgen.types import BadInputError, Shape, Spacing

Settings = Mapping[str, Any]
Derived = Iterator[tuple[str, np.ndarray]]
Deriver = Callable[[np.ndarray, np.ndarray, Spacing, Settings], Derived]


def derive(
    image: np.ndarray, mask: np.ndarray, spacing: Spacing, image_type: str, settings: Settings
) -> Iterator[tuple[str, np.ndarray]]:
    """The images of one type that PyRadiomics derives from an image, in its order.

    What cannot be derived from an image this small or flat is left out; :func:`skipped` names it beforehand. LoG and
    Gradient values are rounded to single precision, as SimpleITK gives them.

    Args:
        image: ``(z, y, x)`` or ``(y, x)`` float64, C-contiguous.
        mask: Boolean, of the image's shape; LBP3D is computed inside it only and is 0 elsewhere.
        spacing: Voxel edge lengths in mm, in array order.
        image_type: One of :data:`IMAGE_TYPES`.
        settings: PyRadiomics's settings; keys that do not concern the type are ignored.

    Yields:
        Name (``wavelet-LLH``, ``log-sigma-2-0-mm-3D``, ...) and derived image, float64, of the image's shape.

    Raises:
        BadInputError: The image type is unknown, a setting is outside its range, or the arrays do not fit.
    """
    check_layout(image, mask)
    skipped(image.shape, spacing, image_type, settings)
    yield from _DERIVERS[image_type](image, mask, spacing, settings)


def skipped(shape: Shape, spacing: Spacing, image_type: str, settings: Settings) -> dict[str, str]:
    """What :func:`derive` leaves out for an image of this shape, and why; PyRadiomics only logs it.

    Args:
        shape: Voxels per axis.
        spacing: Voxel edge lengths in mm, in array order.
        image_type: One of :data:`IMAGE_TYPES`.
        settings: PyRadiomics's settings.

    Returns:
        Reason per name of an image that is left out; empty where nothing is.

    Raises:
        BadInputError: The image type is unknown, or a setting is outside its range.
    """
    if image_type not in _DERIVERS:
        raise BadInputError(f"expected an image type out of {', '.join(IMAGE_TYPES)}, got {image_type!r}")
    if len(spacing) != len(shape) or not all(edge > 0 for edge in spacing):
        raise BadInputError(f"expected {len(shape)} voxel edge lengths above 0 mm, one per axis, got {tuple(spacing)}")
    if image_type == "LoG":
        return {
            _log_name(sigma): reason for sigma in _sigmas(settings) if (reason := _log_too_small(shape, spacing, sigma))
        }
    if image_type == "LBP3D" and len(shape) != 3:
        levels, _, _ = _lbp_3d_settings(settings)
        names = [f"lbp-3D-m{level + 1}" for level in range(levels)] + ["lbp-3D-k"]
        return dict.fromkeys(
            names, "LBP3D needs a volume, and the image is a plane. Take LBP3D out of the image types."
        )
    return {}


def _original(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """The image itself."""
    yield "original", image


def _wavelet(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """Bands of the stationary wavelet transform; the letters run x, y, z."""
    axes = list(reversed(range(image.ndim)))
    if settings.get("force2D", False):
        axes.remove(_plane_axis(settings, image.ndim))
    start_level = _whole(settings, "start_level", 0, at_least=0)
    level = _whole(settings, "level", 1, at_least=1)
    yield from wavelet_bands(image, settings.get("wavelet", "coif1"), axes, start_level, level)


def _log(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """Laplacians of Gaussian."""
    for sigma in _sigmas(settings):
        if not _log_too_small(image.shape, spacing, sigma):
            yield _log_name(sigma), laplacian_of_gaussian(image, spacing, sigma)


def _square(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """``(x / √max|x|)²``, 0 for an image of zeros."""
    largest = np.abs(image).max()
    yield "square", (1 / np.sqrt(largest) * image) ** 2 if largest > 0 else np.zeros_like(image)


def _square_root(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """``±√(|x| max|x|)``, with the sign of x."""
    magnitude = np.abs(image)
    yield "squareroot", np.copysign(np.sqrt(magnitude * magnitude.max()), image)


def _logarithm(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """``±c log(|x| + 1)`` with the sign of x and the image's largest magnitude; 0 for an image of zeros."""
    magnitude = np.abs(image)
    logarithm = np.log(magnitude + 1)
    largest = logarithm.max()
    yield "logarithm", np.copysign(logarithm, image) * (magnitude.max() / largest if largest > 0 else 1.0)


def _exponential(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """``exp(x log(m) / m)`` with ``m = max|x|``; 1, as wherever x is 0, for an image of zeros."""
    largest = np.abs(image).max()
    yield "exponential", np.exp(np.log(largest) / largest * image) if largest > 0 else np.ones_like(image)


def _gradient(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """Length of the gradient: central differences, the border voxels repeated beyond the border."""
    squares = np.zeros_like(image)
    for axis in reversed(range(image.ndim)):
        weight = 0.5 / spacing[axis] if settings.get("gradientUseSpacing", True) else 0.5
        padding = [(1, 1) if other == axis else (0, 0) for other in range(image.ndim)]
        padded = np.moveaxis(np.pad(image, padding, "edge"), axis, 0)
        squares += np.moveaxis(padded[2:] * weight - padded[:-2] * weight, 0, axis) ** 2
    yield "gradient", np.sqrt(squares).astype(np.float32).astype(np.float64)


def _lbp_2d(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """Local binary patterns, plane by plane."""
    method = settings.get("lbp2DMethod", "uniform")
    if method not in LBP_METHODS:
        raise BadInputError(f"lbp2DMethod: expected one of {', '.join(LBP_METHODS)}, got {method!r}")
    radius = _positive(settings, "lbp2DRadius", 1)
    samples = _whole(settings, "lbp2DSamples", 8, at_least=1)
    axis = _plane_axis(settings, image.ndim) if image.ndim == 3 else None
    yield "lbp-2D", lbp_2d(image, radius, samples, method, axis)


def _lbp_3d(image: np.ndarray, mask: np.ndarray, spacing: Spacing, settings: Settings) -> Derived:
    """Local binary patterns on spheres, by level, and the kurtosis of the samples."""
    if image.ndim != 3:
        return
    levels, radius, subdivisions = _lbp_3d_settings(settings)
    *maps, kurtosis = lbp_3d(image, mask, levels, radius, subdivisions)
    for level, derived in enumerate(maps, start=1):
        yield f"lbp-3D-m{level}", derived
    yield "lbp-3D-k", kurtosis


def _log_name(sigma: float) -> str:
    """PyRadiomics's name of a LoG image, which keeps the digits as they were given."""
    return f"log-sigma-{str(sigma).replace('.', '-')}-mm-3D"


def _log_too_small(shape: Shape, spacing: Spacing, sigma: float) -> str:
    """Why an image of this shape has no LoG of this width, or an empty string."""
    for n, edge in zip(shape, spacing, strict=True):
        needed = max(math.ceil(sigma / edge) + 1, MIN_VOXELS)
        if n < needed:
            return (
                f"the image, as it is filtered, has {n} voxels of {edge:g} mm along one axis, and a LoG (Laplacian of "
                f"Gaussian) of sigma {sigma} mm needs at least {needed}. Extract from single slices as 2D images, "
                "choose a smaller sigma, or take LoG out of the image types."
            )
    return ""


def _sigmas(settings: Settings) -> Sequence[float]:
    """The setting ``sigma``, checked."""
    sigmas = settings.get("sigma")
    listed = list(sigmas) if isinstance(sigmas, list | tuple | np.ndarray) else []
    if not listed or not all(_is_number(sigma) and sigma > 0 for sigma in listed):
        raise BadInputError(f"sigma: LoG expects a list of widths above 0 mm, such as [2.0, 3.0], got {sigmas!r}")
    return listed


def _lbp_3d_settings(settings: Settings) -> tuple[int, float, int]:
    """Levels, radius and subdivisions of LBP3D, checked."""
    return (
        _whole(settings, "lbp3DLevels", 2, at_least=1),
        _positive(settings, "lbp3DIcosphereRadius", 1),
        _whole(settings, "lbp3DIcosphereSubdivision", 1, at_least=0),
    )


def _plane_axis(settings: Settings, axes: int) -> int:
    """The setting ``force2Ddimension``, checked: the array axis that is out of plane."""
    axis = _whole(settings, "force2Ddimension", 0, at_least=0)
    if axis >= axes:
        raise BadInputError(f"force2Ddimension: expected an axis below {axes} of this image, got {axis}")
    return axis


def _whole(settings: Settings, key: str, default: int, *, at_least: int) -> int:
    """A setting that is a whole number."""
    value = settings.get(key, default)
    if not _is_number(value) or value != int(value) or value < at_least:
        raise BadInputError(f"{key}: expected a whole number of at least {at_least}, got {value!r}")
    return int(value)


def _positive(settings: Settings, key: str, default: float) -> float:
    """A setting that is a length."""
    value = settings.get(key, default)
    if not _is_number(value) or value <= 0:
        raise BadInputError(f"{key}: expected a number above 0, got {value!r}")
    return float(value)


def _is_number(value: object) -> bool:
    """Whether a setting is a finite number; True and False are not."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


_DERIVERS: dict[str, Deriver] = {
    "Original": _original,
    "Wavelet": _wavelet,
    "LoG": _log,
    "Square": _square,
    "SquareRoot": _square_root,
    "Logarithm": _logarithm,
    "Exponential": _exponential,
    "Gradient": _gradient,
    "LBP2D": _lbp_2d,
    "LBP3D": _lbp_3d,
}
IMAGE_TYPES = tuple(_DERIVERS)
