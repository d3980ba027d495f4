"""The kinds of arrays that training loops hand around: MetaTensor, tensor, NumPy array, image of TorchIO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import ImageMetaKey, MetaKeys

from medgen.types import BadInputError

SYNTHETIC = "synthetic"


@dataclass(frozen=True, eq=False)
class Carried:
    """What an array of any kind carries.

    Attributes:
        array: The voxels; a copy only where they lay on another device.
        affine: Voxel index to mm, or None where this kind has none.
        file: File that it came from; empty where it does not say.
        space: In which the affine leads, as MONAI names it; empty where it does not say.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    file: str = ""
    space: str = ""


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
    if _is_torchio(value):
        return Carried(value.data.numpy(), np.asarray(value.affine), str(value.path or ""))
    if isinstance(value, MetaTensor):
        file, space = value.meta.get(ImageMetaKey.FILENAME_OR_OBJ, ""), value.meta.get(MetaKeys.SPACE, "")
        affine = value.affine.detach().cpu().numpy()
        return Carried(value.as_tensor().detach().cpu().numpy(), affine, str(file), str(getattr(space, "value", space)))
    if isinstance(value, torch.Tensor):
        return Carried(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray):
        return Carried(value)
    raise BadInputError(
        f"{name}: expected an array, a tensor or an image of TorchIO, got {type(value).__name__}. Load the file before."
    )


def wrap_like(value: Any, carried: Carried) -> Any:
    """Other contents in the kind, type and device of an array.

    Args:
        value: As for :func:`unwrap`.
        carried: The contents; a MetaTensor takes all of them, and is marked as synthetic.

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
    value = value.data if _is_torchio(value) else value
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return not np.issubdtype(value.dtype, np.inexact)


def _is_torchio(value: Any) -> bool:
    return hasattr(value, "set_data") and hasattr(value, "affine") and hasattr(value, "data")
