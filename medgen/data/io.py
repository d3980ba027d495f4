"""Scans and label maps on disk: NIfTI, DICOM series, and PNG or TIFF, gray or RGB, with 8 or 16 bits.

NIfTI and DICOM volumes are ``(X, Y, Z)`` in the order of the file; flat pictures are ``(rows, columns)``. What cannot
be read exactly as it is meant is refused, with the name of the file.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
from pathlib import Path
from typing import Any, Literal, cast, get_args

import nibabel as nib
import numpy as np
import tifffile
import torch
from PIL import Image

from medgen.data import dicom, raster
from medgen.provenance import write_bytes
from medgen.types import BadInputError, Grid

ImageDtype = Literal["uint8", "uint16", "int16", "float32"]
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".dcm", ".png", ".tif", ".tiff")

_MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
# NIfTI keeps 80 bytes for `descrip`, the last one for the end of the text.
_DESCRIPTION_LENGTH = 79


def read_image(path: str | Path) -> tuple[torch.Tensor, Grid]:
    """Read one scan.

    A NIfTI with a last axis beyond the third gives channels; one with a single slice along the third axis is 2D.
    A palette picture gives its RGB colors. An alpha channel that is opaque throughout is dropped; any other is refused.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.png``, ``.tif``, ``.tiff`` or ``.dcm`` file, or the folder of one DICOM series.

    Returns:
        Image ``(C, H, W[, D])`` float32 in source units (DICOM: after rescale, so HU for CT), and its grid.

    Raises:
        BadInputError: If the file is missing, damaged, of an unsupported kind, or holds NaN or infinity.
    """
    array, grid = _read(Path(path), label=False)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is refused just below
        image = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    if not bool(torch.isfinite(image).all()):
        count = int((~torch.isfinite(image)).sum())
        raise BadInputError(f"{path}: expected finite intensities, got {count} NaN or infinite. Repair the file.")
    return image, grid


def read_label(path: str | Path) -> tuple[torch.Tensor, Grid]:
    """Read one label map.

    Args:
        path: As for :func:`read_image`; a palette picture gives its palette indices.

    Returns:
        Label ``(H, W[, D])`` int16 class indices, and its grid.

    Raises:
        BadInputError: If the file is missing, damaged, of an unsupported kind, has several channels, or holds anything
            but integers from 0 to 32767.
    """
    array, grid = _read(Path(path), label=True)
    if array.shape[0] != 1:
        raise BadInputError(
            f"{path}: expected a label map with one channel, got {array.shape[0]}. Save class indices, not colors."
        )
    values = array[0]
    if values.dtype.kind == "f":
        # A header's slope may leave rounding errors; half-way values are interpolated labels and no class.
        with np.errstate(invalid="ignore"):
            rounded = np.round(values)
            whole = np.isfinite(values) & (np.abs(values - rounded) < 1e-4)
        if not whole.all():
            raise BadInputError(
                f"{path}: expected integer class indices, got {values[~whole].flat[0]:g}. "
                "Resample labels by nearest neighbor."
            )
        values = rounded
    low, high = (int(values.min()), int(values.max()))
    if low < 0 or high > np.iinfo(np.int16).max:
        raise BadInputError(f"{path}: expected classes from 0 to 32767, got {low} to {high}. Renumber the classes.")
    return torch.from_numpy(np.require(values, np.int16, ["C", "W"])), grid


def read_grid(path: str | Path) -> Grid:
    """Read where the voxels of a scan lie, from its header alone.

    Args:
        path: As for :func:`read_image`.

    Returns:
        The grid that :func:`read_image` would give.

    Raises:
        BadInputError: If the file is missing, its header is damaged, or it is of an unsupported kind.
    """
    path = Path(path)
    kind = _kind(path)
    try:
        if kind == "dicom":
            return dicom.read_grid(path)
        if kind == "nifti":
            return _nifti_grid(path, nib.load(path))
        if kind == "tiff":
            with tifffile.TiffFile(path) as file:
                page = file.pages.first
                return _flat_grid((page.imagelength, page.imagewidth))
        with Image.open(path, formats=["PNG"]) as picture:
            return _flat_grid((picture.height, picture.width))
    except (BadInputError, MemoryError):
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise _unreadable(path, error) from error


def stored_dtype(path: str | Path) -> ImageDtype:
    """Type that holds the intensities of a scan as :func:`read_image` gives them.

    Args:
        path: As for :func:`read_image`.

    Returns:
        The type of the file where :func:`write_image` knows it; else ``int16`` or ``uint16`` for integers that fit, and
        ``float32``, also for integers that the header scales.
    """
    array, _ = _read(Path(path), label=False)
    if array.dtype.name in get_args(ImageDtype):
        return cast("ImageDtype", array.dtype.name)
    if array.dtype.kind not in "iu":
        return "float32"
    low, high = int(array.min()), int(array.max())
    kinds: tuple[ImageDtype, ...] = ("int16", "uint16")
    return next((kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), "float32")


def write_image(path: str | Path, image: torch.Tensor, grid: Grid, *, dtype: ImageDtype, description: str = "") -> None:
    """Write one scan, whole or not at all.

    Args:
        path: ``.nii``, ``.nii.gz`` (one channel) or ``.png`` (2D; gray, or RGB for three channels).
        image: ``(C, H, W[, D])`` in source units; integer types round, and clip to their range.
        grid: Grid of the image; NIfTI stores its affine in mm, PNG stores no geometry.
        dtype: Type on disk; PNG holds ``uint8`` and ``uint16``.
        description: Up to 79 ASCII characters that stay in the file: NIfTI field ``descrip``, PNG text ``Description``.

    Raises:
        ValueError: If image, grid, dtype and the kind of file do not fit together, the image is not finite, or the
            description does not fit.
        BadInputError: If the disk is full; no part of the file remains.
    """
    path = Path(path)
    if tuple(image.shape[1:]) != tuple(grid.shape):
        raise ValueError(f"{path}: expected an image (C, {grid.shape}), got shape {tuple(image.shape)}.")
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"{path}: expected finite intensities, got NaN or infinity.")
    if dtype not in ("uint8", "uint16", "int16", "float32"):
        raise ValueError(f"{path}: expected dtype uint8, uint16, int16 or float32, got {dtype!r}.")
    array = image.detach().cpu().float().numpy()
    if dtype != "float32":
        limits = np.iinfo(dtype)
        array = np.clip(np.round(array), limits.min, limits.max).astype(dtype)
    write_bytes(path, _encode(path, array, grid, description))


def write_label(path: str | Path, label: torch.Tensor, grid: Grid, *, description: str = "") -> None:
    """Write one label map, whole or not at all, with 8 bits where the classes fit and 16 where not.

    Args:
        path: ``.nii``, ``.nii.gz`` or ``.png`` (2D).
        label: ``(H, W[, D])`` integer class indices from 0.
        grid: Grid of the label map.
        description: As for :func:`write_image`.

    Raises:
        ValueError: If label, grid and the kind of file do not fit together, or the description does not fit.
        BadInputError: If the disk is full; no part of the file remains.
    """
    path = Path(path)
    if tuple(label.shape) != tuple(grid.shape):
        raise ValueError(f"{path}: expected a label map {grid.shape}, got shape {tuple(label.shape)}.")
    low, high = int(label.min()), int(label.max())
    if label.is_floating_point() or low < 0 or high > np.iinfo(np.int16).max:
        raise ValueError(f"{path}: expected integer classes from 0 to 32767, got {label.dtype} from {low} to {high}.")
    array = label.detach().cpu().numpy()[None].astype(np.uint8 if high < 256 else np.uint16)
    write_bytes(path, _encode(path, array, grid, description))


def _kind(path: Path) -> Literal["nifti", "dicom", "png", "tiff"]:
    if not path.exists():
        raise BadInputError(f"{path}: expected a file, got nothing there. Check the path.")
    name = path.name.lower()
    if path.is_dir() or name.endswith(".dcm"):
        return "dicom"
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith(".png"):
        return "png"
    if name.endswith((".tif", ".tiff")):
        return "tiff"
    raise BadInputError(
        f"{path}: expected a DICOM folder or a file that ends in {', '.join(IMAGE_SUFFIXES)}, "
        f"got {path.suffix or 'no ending'}. Convert it."
    )


def _unreadable(path: Path, error: BaseException) -> BadInputError:
    # Without addresses in memory, the same file gives the same message.
    reason = " ".join(re.sub(r"<\S+ object at 0x\w+>", "", str(error)).split()) or type(error).__name__
    return BadInputError(
        f"{path}: expected a readable {_kind(path)} file, got an error ({reason}). It may be truncated: copy it again."
    )


def _read(path: Path, *, label: bool) -> tuple[np.ndarray, Grid]:
    """Channels first, in the type of the file where that is exact."""
    kind = _kind(path)
    try:
        if kind == "dicom":
            array, grid = dicom.read_series(path)
        elif kind == "nifti":
            array, grid = _read_nifti(path)
        else:
            content = path.read_bytes()
            flat = (raster.read_png if kind == "png" else raster.read_tiff)(path, content, label=label)
            flat = flat[..., None] if flat.ndim == 2 else flat
            array, grid = np.moveaxis(flat, -1, 0), _flat_grid(flat.shape[:2])
    except (BadInputError, MemoryError):
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise _unreadable(path, error) from error
    if 0 in array.shape:
        raise BadInputError(f"{path}: expected at least one voxel, got shape {array.shape}. Leave the file out.")
    return array, grid


def _flat_grid(shape: tuple[int, ...]) -> Grid:
    return Grid(shape=(int(shape[0]), int(shape[1])), affine=np.eye(4), known=False)


def _read_nifti(path: Path) -> tuple[np.ndarray, Grid]:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)  # to the very end, so that its checksum speaks
    kind = nib.Nifti2Image if content[:4] in (struct.pack("<i", 540), struct.pack(">i", 540)) else nib.Nifti1Image
    image = kind.from_bytes(content)
    grid = _nifti_grid(path, image)
    stored = image.get_data_dtype()
    if stored.fields is not None or stored.kind == "c":
        raise BadInputError(f"{path}: expected real voxels, got type {stored}. Save colors as a fourth axis.")
    stated = image.dataobj.offset + math.prod(image.shape) * stored.itemsize
    if stated > len(content):  # before nibabel sets that much memory aside
        raise EOFError(f"{len(content)} of {stated} bytes")
    array = np.asanyarray(image.dataobj)  # integers stay integers where the header has no slope
    while array.ndim > 3 and array.shape[3] == 1:
        array = array[:, :, :, 0]
    if array.ndim > 4:
        raise BadInputError(f"{path}: expected at most one axis of channels, got shape {image.shape}. Split the file.")
    channels = np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]
    return channels.reshape(channels.shape[0], *grid.shape), grid


def _nifti_grid(path: Path, image: Any) -> Grid:
    shape = tuple(int(n) for n in image.shape[:3])
    if len(shape) < 2:
        raise BadInputError(f"{path}: expected 2 or 3 axes, got shape {image.shape}. Leave the file out.")
    header = image.header
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    affine[:3] *= _MM_PER_UNIT[header.get_xyzt_units()[0]]
    known = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or columns.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-3:
        raise BadInputError(f"{path}: expected an invertible affine, got {affine[:3].tolist()}. Repair the header.")
    return Grid(shape=shape[:2] if len(shape) == 3 and shape[2] == 1 else shape, affine=affine, known=known)


def _encode(path: Path, array: np.ndarray, grid: Grid, description: str) -> bytes:
    name = path.name.lower()
    if len(description) > _DESCRIPTION_LENGTH or not (description.isascii() and description.isprintable()):
        raise ValueError(
            f"{path}: expected a description of at most {_DESCRIPTION_LENGTH} printable ASCII characters, "
            f"got {len(description)}: {description!r}."
        )
    if name.endswith(".png"):
        if grid.spatial_dims != 2 or array.shape[0] not in (1, 3) or array.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"{path}: expected a 2D picture with 1 or 3 channels of uint8 or uint16, "
                f"got shape {array.shape} of {array.dtype}. Write NIfTI instead."
            )
        return raster.encode_png(array, description=description)
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii, .nii.gz or .png, got {path.name}.")
    if array.shape[0] != 1:
        raise ValueError(f"{path}: expected one channel per NIfTI file, got {array.shape[0]}. Write one file each.")
    volume = array[0] if grid.spatial_dims == 3 else array[0][..., None]
    image = nib.Nifti1Image(volume, None, dtype=volume.dtype)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    if grid.known:
        affine = np.asarray(grid.affine, dtype=np.float64)
        unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        # The quaternion form cannot hold shear: a reader that prefers it must not find a wrong one.
        sheared = not np.allclose(unit.T @ unit, np.eye(3), atol=1e-4)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=0 if sheared else 1)
    else:
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)
        image.header.set_zooms(np.linalg.norm(np.asarray(grid.affine)[:3, :3], axis=0))
    content = image.to_bytes()
    # No time stamp: the same voxels give the same file.
    return gzip.compress(content, compresslevel=4, mtime=0) if name.endswith(".gz") else content
