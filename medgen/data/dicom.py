"""One DICOM series as one volume, or one DICOM file as one picture.

DICOM states positions in LPS mm (PS3.3, C.7.6.2); medgen's affines are RAS mm, so the first two rows change sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut

from medgen.types import BadInputError, Grid

# Where dark means much signal; the rest of DICOM has no fixed sense of black and white.
_PROJECTIONS = ("CR", "DX", "MG", "RG", "RF", "XA", "IO", "PX")


def read_series(path: Path) -> tuple[np.ndarray, Grid]:
    """Read the voxels of a series.

    Several slices give ``(X, Y, Z)``: columns, rows, then slices along their normal. A single slice gives a picture
    ``(rows, columns)``. Radiographs that are stored with white as 0 (MONOCHROME1) are inverted: bright is white.

    Args:
        path: Folder of one series, or one file.

    Returns:
        Image ``(C, H, W[, D])`` in rescaled units (HU for CT), and its grid.

    Raises:
        BadInputError: If the files are not one complete and evenly spaced series.
    """
    slices, grid = _load(path, pixels=True)
    pictures = [_pixels(file, dataset) for file, dataset in slices]
    if grid.spatial_dims == 2:
        return np.moveaxis(pictures[0], -1, 0), grid
    # (rows, columns, C) per slice -> (C, X, Y, Z)
    return np.stack(pictures, axis=-1).transpose(2, 1, 0, 3), grid


def read_grid(path: Path) -> Grid:
    """Read where the voxels of a series lie, without the voxels.

    Args:
        path: Folder of one series, or one file.

    Returns:
        The grid that :func:`read_series` would give.

    Raises:
        BadInputError: If the files are not one complete and evenly spaced series.
    """
    return _load(path, pixels=False)[1]


def _load(path: Path, *, pixels: bool) -> tuple[list[tuple[Path, Any]], Grid]:
    """Slices in order of position, and their grid."""
    files = sorted(_files(path)) if path.is_dir() else [path]
    if not files:
        raise BadInputError(f"{path}: expected a folder with DICOM files, got none. Check the path.")
    slices = [(file, _dataset(file, pixels)) for file in files]
    for file, dataset in slices:
        if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            raise BadInputError(f"{file}: expected one slice per file, got a multi-frame file. Convert it to NIfTI.")
    _require_same(path, slices, "SeriesInstanceUID", str, "one series", "Put each series into a folder of its own.")
    for name in ("Rows", "Columns", "SamplesPerPixel"):
        _require_same(path, slices, name, int, f"one value of {name}", "Take scouts and other pictures out.")
    if len(slices) == 1:
        return slices, _picture_grid(*slices[0])
    return _volume(path, slices)


def _files(folder: Path) -> list[Path]:
    found = []
    for file in folder.iterdir():
        if not file.is_file() or file.name.startswith(".") or file.name.upper() == "DICOMDIR":
            continue
        named = file.suffix.lower() in (".dcm", ".ima", ".dicom")
        if not named:
            with open(file, "rb") as handle:
                named = handle.read(132)[128:] == b"DICM"
        if named:
            found.append(file)
    return found


def _dataset(file: Path, pixels: bool) -> Any:
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels)
    except InvalidDicomError as error:
        raise BadInputError(
            f"{file}: expected a DICOM file, got another kind. Take it out or copy it again."
        ) from error
    for name in ("Rows", "Columns"):
        if not dataset.get(name):
            raise BadInputError(f"{file}: expected a DICOM picture, got no {name}. Take it out or copy it again.")
    return dataset


def _require_same(
    path: Path,
    slices: Sequence[tuple[Path, Any]],
    name: str,
    kind: Callable[[Any], Any],
    expected: str,
    remedy: str,
) -> None:
    values = sorted({kind(dataset[name].value) for _, dataset in slices if name in dataset})
    if len(values) > 1:
        shown = ", ".join(str(value) for value in values[:3])
        raise BadInputError(f"{path}: expected {expected}, got {len(values)} ({shown}). {remedy}")


def _numbers(file: Path, dataset: Any, name: str, count: int) -> np.ndarray:
    value = dataset.get(name)
    if value is None or len(value) != count:
        raise BadInputError(f"{file}: expected {name} with {count} numbers, got {value}. Convert the series to NIfTI.")
    return np.array([float(number) for number in value])


def _directions(file: Path, dataset: Any) -> np.ndarray:
    """``(3, 3)`` LPS unit vectors as columns: along columns, along rows, and the normal of the slice."""
    cosines = _numbers(file, dataset, "ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(cosines, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(cosines[0] @ cosines[1]) > 1e-2:
        raise BadInputError(
            f"{file}: expected an ImageOrientationPatient of two perpendicular unit vectors, got {cosines.tolist()}. "
            "Repair the header."
        )
    columns, rows = cosines / lengths[:, None]
    return np.stack([columns, rows, np.cross(columns, rows)], axis=1)


def _picture_grid(file: Path, dataset: Any) -> Grid:
    shape = (int(dataset.Rows), int(dataset.Columns))
    if dataset.get("PixelSpacing") is None:
        return Grid(shape=shape, affine=np.eye(4), known=False)
    row_step, column_step = _positive(file, _numbers(file, dataset, "PixelSpacing", 2))
    placed = dataset.get("ImageOrientationPatient") is not None and dataset.get("ImagePositionPatient") is not None
    directions = _directions(file, dataset) if placed else np.eye(3)
    affine = np.eye(4)
    thickness = float(dataset.get("SliceThickness") or 1)
    affine[:3, :3] = directions[:, [1, 0, 2]] * [row_step, column_step, thickness]
    if placed:
        affine[:3, 3] = _numbers(file, dataset, "ImagePositionPatient", 3)
    return Grid(shape=shape, affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _positive(file: Path, spacing: np.ndarray) -> np.ndarray:
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise BadInputError(f"{file}: expected a positive PixelSpacing, got {spacing.tolist()}. Repair the header.")
    return spacing


def _volume(path: Path, slices: list[tuple[Path, Any]]) -> tuple[list[tuple[Path, Any]], Grid]:
    first_file, first = slices[0]
    directions = _directions(first_file, first)
    row_step, column_step = _positive(first_file, _numbers(first_file, first, "PixelSpacing", 2))
    for file, dataset in slices[1:]:
        if not np.allclose(_directions(file, dataset), directions, atol=1e-3):
            raise BadInputError(f"{file}: expected the direction of {first_file.name}, got another. Split the folder.")
        if not np.allclose(_numbers(file, dataset, "PixelSpacing", 2), [row_step, column_step], rtol=1e-3):
            raise BadInputError(f"{file}: expected the spacing of {first_file.name}, got another. Split the folder.")
    # Instance numbers may run either way or repeat: only positions along the normal tell the order.
    placed = sorted(
        ((_numbers(file, dataset, "ImagePositionPatient", 3), file, dataset) for file, dataset in slices),
        key=lambda item: float(item[0] @ directions[:, 2]),
    )
    positions = np.stack([position for position, _, _ in placed])
    step = _slice_step(path, positions, directions[:, 2], [file.name for _, file, _ in placed])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([directions[:, 0] * column_step, directions[:, 1] * row_step, step], axis=1)
    affine[:3, 3] = positions[0]
    shape = (int(first.Columns), int(first.Rows), len(placed))
    grid = Grid(shape=shape, affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    return [(file, dataset) for _, file, dataset in placed], grid


def _slice_step(path: Path, positions: np.ndarray, normal: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """LPS mm from one slice to the next, the same for all or an error."""
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    if gaps.min() < 0.01 * max(usual, 1e-3):
        index = int(gaps.argmin())
        one, other = sorted(names[index : index + 2])  # which lies lower is a matter of rounding
        raise BadInputError(
            f"{path}: expected one slice per position, got {one} and {other} at the same one. "
            "Split echoes or time points into folders."
        )
    # Headers round positions to some hundredths of a mm.
    uneven = np.abs(gaps - usual) > 0.02 * usual + 0.02
    if uneven.any():
        index = int(np.abs(gaps - usual).argmax())
        missing = "a missing slice" if gaps[index] > 1.5 * usual else "uneven gaps"
        raise BadInputError(
            f"{path}: expected slices every {usual:g} mm, got {missing}: {gaps[index]:g} mm between {names[index]} and "
            f"{names[index + 1]}. Complete the series or resample it."
        )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    drift = np.abs(positions - positions[0] - np.outer(np.arange(len(positions)), step)).max()
    if drift > 0.02 * usual + 0.05 or abs(step @ normal) < 0.999 * np.linalg.norm(step):
        raise BadInputError(
            f"{path}: expected slices stacked along their normal, got a sheared stack (gantry tilt). "
            "Convert the series to NIfTI with tilt correction."
        )
    return np.asarray(step)


def _pixels(file: Path, dataset: Any) -> np.ndarray:
    """``(rows, columns, C)`` in rescaled units."""
    try:
        stored = dataset.pixel_array
    except Exception as error:  # pydicom and its decoders raise many kinds
        reason = " ".join(str(error).split())
        raise BadInputError(
            f"{file}: expected readable pixels, got an error ({reason}). Copy it again, or decompress it first."
        ) from error
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise BadInputError(f"{file}: expected gray or RGB pixels, got a color palette. Convert it.")
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        if dataset.get("Modality") not in _PROJECTIONS:
            raise BadInputError(f"{file}: expected MONOCHROME2, got MONOCHROME1 (white is 0). Convert it.")
        ends = np.array([0, 2 ** int(dataset.BitsStored) - 1])
        if int(dataset.get("PixelRepresentation", 0)):
            ends = ends - 2 ** (int(dataset.BitsStored) - 1)
        values = np.asarray(apply_modality_lut(ends, dataset)).sum() - values
    return values if values.ndim == 3 else values[..., None]
