"""The kinds of arrays that training loops hand around: MetaTensor, tensor, NumPy array, image of TorchIO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import ImageMetaKey, MetaKeys

from medgen.types import BadInputError, Shape

SYNTHETIC = "synthetic"


@dataclass(frozen=True, eq=False)
class Carried:
    """What an array of any kind carries.

    Attributes:
        array: The voxels; a copy only where they lay on another device.
        affine: Voxel index to mm, or None where this kind has none.
        file: File that it came from; empty where it does not say.
        space: In which the affine leads, as MONAI names it; empty where it does not say.
        original_affine: Of the file, before any transform; None where it does not say, as with pictures.
        spatial_shape: Voxels of the file, without the channels; None where it does not say.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    file: str = ""
    space: str = ""
    original_affine: np.ndarray | None = None
    spatial_shape: Shape | None = None


def unwrap(value: Any, name: str) -> Carried:
    """Take out what an array carries.

    Args:
        value: MetaTensor, tensor, NumPy array, or an image of TorchIO.
        name: What it is, for messages.

    Returns:
        Its contents.

    Raises:
        BadInputError: If it is none of these, such as the name of a file that was not loaded.
    """
    read_shape(value, name)
    affine = read_affine(value)
    if _is_torchio(value):
        return Carried(value.data.numpy(), affine, read_file(value))
    if isinstance(value, MetaTensor):
        space, original = value.meta.get(MetaKeys.SPACE, ""), value.meta.get(MetaKeys.ORIGINAL_AFFINE)
        shape = value.meta.get(MetaKeys.SPATIAL_SHAPE)
        return Carried(
            value.as_tensor().detach().cpu().numpy(),
            affine,
            read_file(value),
            str(getattr(space, "value", space)),
            None if original is None else np.array(original, dtype=np.float64),
            None if shape is None else tuple(int(count) for count in shape),
        )
    return Carried(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)


def read_shape(value: Any, name: str) -> Shape:
    """How many voxels an array has, without a look at them.

    Args:
        value: As for :func:`unwrap`.
        name: What it is, for messages.

    Returns:
        Its shape.

    Raises:
        BadInputError: As :func:`unwrap`.
    """
    if not isinstance(value, torch.Tensor | np.ndarray) and not _is_torchio(value):
        raise BadInputError(
            f"{name}: expected an array, a tensor or an image of TorchIO, got {type(value).__name__}. Load the file "
            "before."
        )
    return tuple(value.shape)


def read_affine(value: Any) -> np.ndarray | None:
    """Where the voxels of an array lie.

    Args:
        value: As for :func:`unwrap`.

    Returns:
        Voxel index to mm, or None where this kind has none.
    """
    if _is_torchio(value):
        return np.asarray(value.affine)
    return value.affine.detach().cpu().numpy() if isinstance(value, MetaTensor) else None


def read_dtype(value: Any) -> Any:
    """The type of the numbers of an array.

    Args:
        value: As for :func:`unwrap`.

    Returns:
        A type of PyTorch or of NumPy.
    """
    return value.data.dtype if _is_torchio(value) else value.dtype


def read_file(value: Any) -> str:
    """The file that an array came from.

    Args:
        value: As for :func:`unwrap`.

    Returns:
        Its name; empty where the array does not say.
    """
    if _is_torchio(value):
        return str(value.path or "")
    return str(value.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "")) if isinstance(value, MetaTensor) else ""


def wrap_like(value: Any, carried: Carried) -> Any:
    """Other contents in the kind, type and device of an array.

    Args:
        value: As for :func:`unwrap`.
        carried: The contents; a MetaTensor takes all of them, as if it had been loaded from their file, and is marked
            as synthetic.

    Returns:
        A new array; nothing is shared with the contents.
    """
    if _is_torchio(value):
        return type(value)(tensor=torch.tensor(carried.array, dtype=value.data.dtype), affine=carried.affine)
    if not isinstance(value, torch.Tensor):
        return np.array(carried.array, dtype=value.dtype)
    tensor = torch.tensor(carried.array, dtype=value.dtype, device=value.device)
    if not isinstance(value, MetaTensor):
        return tensor
    meta = {ImageMetaKey.FILENAME_OR_OBJ: carried.file, SYNTHETIC: True}
    meta |= {MetaKeys.SPACE: carried.space} if carried.space else {}
    # Without it an identity is what MONAI gives where a file has no affine (medgen.generator.scans.affine_of).
    meta |= {} if carried.original_affine is None else {MetaKeys.ORIGINAL_AFFINE: carried.original_affine.copy()}
    meta |= {} if carried.spatial_shape is None else {MetaKeys.SPATIAL_SHAPE: np.array(carried.spatial_shape)}
    return MetaTensor(tensor, affine=torch.tensor(carried.affine), meta=meta)


def mark_real(value: Any) -> Any:
    """Mark a scan that stays, so that a batch keeps the mark of those that do not.

    Args:
        value: As for :func:`unwrap`.

    Returns:
        The same; of a MetaTensor a view with metadata of its own.
    """
    if not isinstance(value, MetaTensor) or SYNTHETIC in value.meta:
        return value
    marked = value.view_as(value)
    marked.meta = {**value.meta, SYNTHETIC: False}
    return marked


def is_whole(value: Any) -> bool:
    """Whether an array is of a type that holds whole numbers only.

    Args:
        value: As for :func:`unwrap`.

    Returns:
        True for integers and booleans.
    """
    dtype = read_dtype(value)
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex)
    return not np.issubdtype(dtype, np.inexact)


def limits(value: Any) -> tuple[float, float]:
    """The numbers that the type of an array can hold.

    Args:
        value: As for :func:`unwrap`; of a real type.

    Returns:
        The lowest and the highest.
    """
    dtype = read_dtype(value)
    if dtype in (torch.bool, np.bool_):
        return 0.0, 1.0
    library: Any = torch if isinstance(dtype, torch.dtype) else np
    found = library.iinfo(dtype) if is_whole(value) else library.finfo(dtype)
    return float(found.min), float(found.max)


def _is_torchio(value: Any) -> bool:
    return hasattr(value, "set_data") and hasattr(value, "affine") and hasattr(value, "data")
