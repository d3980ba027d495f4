"""Features of one scan: image and mask in, named numbers out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage

from medgen.radiomics import filters, firstorder, region, shape
from medgen.radiomics.binning import assign_levels, discretize
from medgen.radiomics.compilation import announce
from medgen.radiomics.parameters import Parameters
from medgen.radiomics.texture import margin, texture
from medgen.types import BadInputError, Spacing

Array = np.ndarray | torch.Tensor
# Recommendation ITU-R BT.709, as scikit-image and frd-score weigh colors.
LUMINANCE = (0.2125, 0.7154, 0.0721)
_ROUNDING_SHIFT = 0.6180339887498949
_LARGEST = 1e70


def extract(
    image: Array,
    mask: Array | None = None,
    *,
    spacing: Sequence[float] | None = None,
    parameters: Parameters | str | Path | Mapping[str, Any] | None = None,
    label: int | None = None,
    diagnostics: bool = False,
    engine: Literal["medgen", "pyradiomics"] = "medgen",
    **settings: Any,
) -> dict[str, float]:
    """Radiomic features of one region, as PyRadiomics defines and names them.

    Volumes are taken in the order (x, y, z), as nibabel reads them; images as rows and columns. Names of wavelets run
    x, y, z in both: ``wavelet-LH`` of an image is the high band along its rows axis (y). An image is filtered in its
    plane, whatever ``force2D`` says, and its LoG is two-dimensional.

    Args:
        image: ``(H, W)`` or ``(X, Y, Z)`` intensities of one channel; see :func:`luminance` for colors.
        mask: Label map of the same shape, or None for the whole image.
        spacing: Voxel edges in mm, in the order of the axes; None stands for 1 mm.
        parameters: Parameters, a PyRadiomics parameter file, or its content. None takes PyRadiomics's defaults.
        label: Value of the one region in the mask. None takes the setting ``label``, which is 1 if not set.
        diagnostics: Whether to add mean, minimum and maximum of the image, and voxels and parts of the mask, before
            and after resampling, as numbers named ``diagnostics_...``.
        engine: ``pyradiomics`` has an installed PyRadiomics compute the same call.
        **settings: PyRadiomics settings that override those of `parameters`, such as ``binWidth=5``. Of SimpleITK's
            interpolators, ``interpolator`` may be sitkNearestNeighbor, sitkLinear or sitkBSpline (cubic); the engine
            ``pyradiomics`` takes all of them.

    Returns:
        Values by name, such as ``wavelet-LH_glcm_Contrast``. A feature that the region has no voxel pair for is NaN,
        or the 0 or 1 that PyRadiomics gives it.

    Raises:
        BadInputError: If shapes differ, an intensity is not finite, the region is empty or too small, a setting is
            unknown, the label is not one whole number, or the spacing is not positive.
    """
    chosen = as_parameters(parameters, settings)
    value = _label(chosen.settings.get("label", 1) if label is None else label)
    return extract_labels(
        image, mask, [value], spacing=spacing, parameters=chosen, diagnostics=diagnostics, engine=engine
    )[value]


def extract_labels(
    image: Array,
    mask: Array | None = None,
    labels: Iterable[int] | None = None,
    *,
    spacing: Sequence[float] | None = None,
    parameters: Parameters | str | Path | Mapping[str, Any] | None = None,
    diagnostics: bool = False,
    engine: Literal["medgen", "pyradiomics"] = "medgen",
    **settings: Any,
) -> dict[int, dict[str, float]]:
    """Radiomic features of several regions of one scan; filtered images are shared where no region cuts its own.

    Args:
        image: As in :func:`extract`.
        mask: As in :func:`extract`.
        labels: Values of the regions; None takes every value of the mask above 0.
        spacing: As in :func:`extract`.
        parameters: As in :func:`extract`.
        diagnostics: As in :func:`extract`.
        engine: As in :func:`extract`.
        **settings: As in :func:`extract`.

    Returns:
        For each label its values by name.

    Raises:
        BadInputError: As :func:`extract`; one bad region refuses the scan.
    """
    chosen = as_parameters(parameters, settings)
    found, skipped = extract_with_notes(
        image, mask, labels, spacing=spacing, parameters=chosen, diagnostics=diagnostics, engine=engine
    )
    for name, reason in skipped.items():
        warnings.warn(f"{name} is left out: {reason}", stacklevel=3)
    return found


def extract_with_notes(
    image: Array,
    mask: Array | None,
    labels: Iterable[int] | None,
    *,
    spacing: Sequence[float] | None,
    parameters: Parameters,
    diagnostics: bool = False,
    engine: Literal["medgen", "pyradiomics"] = "medgen",
) -> tuple[dict[int, dict[str, float]], dict[str, str]]:
    """As :func:`extract_labels`, with the images that were left out as a result in place of warnings: for threads.

    Args:
        image: As in :func:`extract`.
        mask: As in :func:`extract`.
        labels: As in :func:`extract_labels`.
        spacing: As in :func:`extract`.
        parameters: What to extract.
        diagnostics: As in :func:`extract`.
        engine: As in :func:`extract`.

    Returns:
        For each label its values by name; and the reason for each derived image that this scan is too small for.

    Raises:
        BadInputError: As :func:`extract_labels`.
    """
    chosen = parameters
    pixels, regions, steps = _arrays(image, mask, labels, spacing)
    if engine == "medgen":
        announce(assign_levels)
    skipped: dict[str, str] = {}
    if engine == "pyradiomics":
        from medgen.radiomics.reference import extract as by_pyradiomics

        reference = {
            value: by_pyradiomics(pixels, inside, steps, chosen, diagnostics=diagnostics)
            for value, inside in regions.items()
        }
        return reference, skipped
    if engine != "medgen":
        raise BadInputError(f"engine: expected medgen or pyradiomics, got {engine!r}.")
    if pixels.ndim == 2:
        # A plane has no axis to leave out; PyRadiomics would filter along one axis only.
        chosen = chosen.with_settings(force2D=False)
    options = chosen.settings
    found: dict[int, dict[str, float]] = {value: {} for value in regions}
    if diagnostics:
        for value, inside in regions.items():
            found[value].update(_image_facts(pixels, "original") | _mask_facts(inside, "original"))
    if options.get("normalize", False):
        scale, outliers = options.get("normalizeScale", 1), options.get("removeOutliers")
        pixels = region.normalize(pixels, scale=scale, outliers=outliers)
    if not region.crops(options):
        _measure(pixels, regions, steps, chosen, found, skipped)
        return found, skipped
    for value, inside in regions.items():
        part, part_mask, part_steps = region.cut(pixels, inside, steps, options)
        if diagnostics and options.get("resampledPixelSpacing") is not None:
            found[value].update(_image_facts(part, "interpolated") | _mask_facts(part_mask, "interpolated", part))
        _measure(part, {value: part_mask}, part_steps, chosen, found, skipped)
    return found, skipped


def luminance(image: Array) -> Array:
    """Gray image of a color image.

    Args:
        image: ``(3, H, W)`` red, green, blue.

    Returns:
        ``(H, W)``, the sum weighed by ``LUMINANCE``.

    Raises:
        BadInputError: If the first axis is not three colors.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise BadInputError(f"image: expected colors (3, H, W), got shape {tuple(image.shape)}.")
    return sum(weight * channel for weight, channel in zip(LUMINANCE, image, strict=True))  # type: ignore[return-value]


def as_parameters(
    parameters: Parameters | str | Path | Mapping[str, Any] | None, settings: Mapping[str, Any] | None = None
) -> Parameters:
    """Parameters from any of the forms that :func:`extract` takes.

    Args:
        parameters: Parameters, a file, its content, or None for the defaults.
        settings: PyRadiomics settings that override.

    Returns:
        The parameters.

    Raises:
        BadInputError: If something in them is unknown to PyRadiomics.
    """
    if parameters is None:
        parameters = Parameters()
    elif isinstance(parameters, (str, Path)):
        parameters = Parameters.from_file(parameters)
    elif not isinstance(parameters, Parameters):
        parameters = Parameters.from_dict(parameters)
    return parameters.with_settings(**settings) if settings else parameters


def _arrays(
    image: Array, mask: Array | None, labels: Iterable[int] | None, spacing: Sequence[float] | None
) -> tuple[np.ndarray, dict[int, np.ndarray], Spacing]:
    """Image, regions by label and spacing in the order (z, y, x) or (y, x), checked."""
    image, mask = _plain(image), None if mask is None else _plain(mask)
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise BadInputError(
            f"image: expected one channel, (H, W) or (X, Y, Z), got shape {pixels.shape}. Pass channels one by one."
        )
    largest = np.abs(pixels).max()
    if not np.isfinite(largest):
        raise BadInputError("image: expected finite intensities, got NaN or infinity. Repair or leave out the scan.")
    if largest > _LARGEST:
        raise BadInputError(
            f"image: expected intensities up to {_LARGEST:g}, whose fourth powers are finite, got {largest:g}. "
            "Divide the image by a constant."
        )
    steps = (1.0,) * pixels.ndim if spacing is None else tuple(float(step) for step in spacing)
    if len(steps) != pixels.ndim or not all(np.isfinite(step) and step > 0 for step in steps):
        raise BadInputError(
            f"spacing: expected {pixels.ndim} positive lengths in mm, got {steps}. Pass one per axis of the image."
        )
    marked = np.ones(pixels.shape, dtype=np.int64) if mask is None else np.asarray(mask)
    if marked.shape != pixels.shape:
        raise BadInputError(f"mask: expected the shape of the image {pixels.shape}, got {marked.shape}.")
    if not (np.issubdtype(marked.dtype, np.integer) or marked.dtype == bool):
        if not np.isfinite(marked).all():
            raise BadInputError("mask: expected whole numbers, got NaN or infinity. Set voxels without a label to 0.")
        if not np.array_equal(marked, np.round(marked)):
            raise BadInputError("mask: expected whole numbers, got fractions. Threshold it first.")
        marked = marked.astype(np.int64)
    values = [int(v) for v in np.unique(marked) if v > 0] if labels is None else _labels(labels)
    if not values:
        raise BadInputError("mask: expected at least one voxel above 0, got none. Leave the scan out.")
    if pixels.ndim == 3:
        pixels, steps = pixels.transpose(2, 1, 0), steps[::-1]
    regions = {value: marked == value for value in values}
    if pixels.ndim == 3:
        regions = {value: inside.transpose(2, 1, 0) for value, inside in regions.items()}
    regions = {value: np.ascontiguousarray(inside) for value, inside in regions.items()}
    for value, inside in regions.items():
        if not inside.any():
            present = [int(v) for v in np.unique(marked) if v != 0]
            raise BadInputError(f"mask: expected voxels of label {value}, got none; it holds {present or 'only 0'}.")
    return np.ascontiguousarray(pixels), regions, steps


def _label(value: Any) -> int:
    """One label, checked."""
    if not isinstance(value, (int, float, np.number)) or not float(value).is_integer():
        raise BadInputError(f"label: expected one whole number, got {value!r}. Use extract_labels for several labels.")
    return int(value)


def _labels(values: Any) -> list[int]:
    """Several labels, checked."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise BadInputError(f"labels: expected whole numbers, such as [1, 2], got {values!r}. Put one label in a list.")
    return [_label(value) for value in values]


def _plain(array: Any) -> np.ndarray:
    """An array in the memory of the CPU."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().double().numpy()
    if not hasattr(array, "shape"):
        raise BadInputError(
            f"image and mask: expected arrays, got {type(array).__name__}. Read files first, for example with nibabel."
        )
    return np.asarray(array)


def _measure(
    image: np.ndarray,
    regions: Mapping[int, np.ndarray],
    spacing: Spacing,
    parameters: Parameters,
    found: dict[int, dict[str, float]],
    skipped: dict[str, str],
) -> None:
    """Add the features of each region of one image to what was found, and what is left out to what was skipped."""
    options = parameters.settings
    inner: dict[int, np.ndarray] = {}
    for value, mask in regions.items():
        region.check(mask, options)
        inner[value] = region.resegment(image, mask, options)
        if inner[value] is not mask:
            region.check(inner[value], options)
    boxes = {value: region.bounding_box(mask) for value, mask in inner.items()}
    for value, mask in (inner if options.get("resegmentShape", False) else regions).items():
        # PyRadiomics cuts the outline to the box of the resegmented region in either case.
        found[value].update(_shape(mask[boxes[value]], spacing, parameters))
    for image_type, own in parameters.image_types.items():
        combined = {**options, **own}
        skipped.update(filters.skipped(image.shape, spacing, image_type, combined))
        # Only this type looks at the mask; the images of all others serve every region.
        together = [[value] for value in inner] if image_type == "LBP3D" else [list(inner)]
        for targets in together:
            for name, derived in filters.derive(image, inner[targets[0]], spacing, image_type, combined):
                for target in targets:
                    box = boxes[target]
                    values = _intensities(derived[box], inner[target][box], spacing, parameters, combined)
                    found[target].update({f"{name}_{key}": number for key, number in values.items()})


def _intensities(
    image: np.ndarray, mask: np.ndarray, spacing: Spacing, parameters: Parameters, settings: dict[str, Any]
) -> dict[str, float]:
    """Features of all classes but shape, of one image cut to its region."""
    if image.ndim == 2:
        image, mask, spacing = image[None], mask[None], (1.0, *spacing)
    if parameters.quantum:
        # The shift keeps the borders of rounding away from 0, where flat parts of derived images lie.
        image = np.floor(image / parameters.quantum + _ROUNDING_SHIFT) * parameters.quantum
    discrete = discretize(
        image,
        mask,
        bin_width=float(settings.get("binWidth", 25)),
        bin_count=settings.get("binCount"),
        margin=margin(settings),
    )
    classes = [name for name in parameters.feature_classes if not name.startswith("shape")]
    wanted = {name: parameters.features_of(name) for name in classes}
    textures = texture(discrete, wanted, settings, spacing)
    result = {}
    for name in classes:
        if name == "firstorder":
            volume = float(np.prod(spacing))
            shift = float(settings.get("voxelArrayShift", 0))
            values = firstorder.features(discrete, volume, shift)
            named = dict(zip(firstorder.NAMES, values.tolist(), strict=True))
            result.update({f"firstorder_{key}": named[key] for key in wanted[name]})
        else:
            result.update({f"{name}_{key}": number for key, number in textures[name].items()})
    return result


def _shape(mask: np.ndarray, spacing: Spacing, parameters: Parameters) -> dict[str, float]:
    """Features of the form of a region."""
    result = {}
    if mask.ndim == 3 and (names := parameters.features_of("shape")):
        values = shape.shape_features(np.ascontiguousarray(mask), spacing, deprecated=True)
        result.update({f"original_shape_{name}": values[name] for name in names})
    names = parameters.features_of("shape2D")
    if mask.ndim == 3 and not parameters.settings.get("force2D", False):
        names = ()
    if names:
        flat, steps = mask, spacing
        if mask.ndim == 3:
            axis = int(parameters.settings.get("force2Ddimension", 0))
            if flat.shape[axis] > 1:
                raise BadInputError(
                    f"shape2D: expected a mask of one slice across axis {axis} (0 is axial), got {flat.shape[axis]}. "
                    "Extract slice by slice, or leave shape2D out."
                )
            flat = flat.take(0, axis)
            steps = tuple(step for index, step in enumerate(spacing) if index != axis)
        values = shape.shape2d_features(np.ascontiguousarray(flat), steps, deprecated=True)
        result.update({f"original_shape2D_{name}": values[name] for name in names})
    return result


def _image_facts(image: np.ndarray, stage: str) -> dict[str, float]:
    name = f"diagnostics_Image-{stage}"
    return {
        f"{name}_Mean": float(image.mean()),
        f"{name}_Minimum": float(image.min()),
        f"{name}_Maximum": float(image.max()),
    }


def _mask_facts(mask: np.ndarray, stage: str, image: np.ndarray | None = None) -> dict[str, float]:
    name = f"diagnostics_Mask-{stage}"
    parts = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))[1]
    facts = {f"{name}_VoxelNum": float(np.count_nonzero(mask)), f"{name}_VolumeNum": float(parts)}
    if image is not None:
        values = image[mask]
        facts[f"{name}_Mean"] = float(values.mean())
        facts[f"{name}_Minimum"] = float(values.min())
        facts[f"{name}_Maximum"] = float(values.max())
    return facts
