"""Samples as transforms work on them, whether they come as a dictionary or as a ``Subject`` of TorchIO."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from monai.data import MetaTensor
from monai.utils import ImageMetaKey, MetaKeys
from torch import Tensor


def open_sample(data: Mapping[Any, Any], keys: Iterable[Hashable | None] = ()) -> dict[Any, Any]:
    """A sample as a dictionary that may be changed.

    Args:
        data: A dictionary, or a ``Subject``.
        keys: Images to take out of the images of TorchIO that hold them; names that are not there are passed over.

    Returns:
        A new dictionary. What was taken out is a MetaTensor ``(C, H, W[, D])`` with the affine; an image of depth 1 is
        one of two axes.
    """
    opened = dict(data)
    for key in keys:
        value: Any = opened.get(key)
        if _is_image(value):
            affine = value.affine
            meta = {ImageMetaKey.FILENAME_OR_OBJ: str(value.path), MetaKeys.ORIGINAL_AFFINE: affine}
            voxels = value.data.squeeze(-1) if value.is_2d() else value.data
            # The affine of an image that was read from no file is the identity for want of a better one.
            opened[key] = MetaTensor(voxels, affine=affine, meta=meta if value.path else None)
    return opened


def close_sample(done: dict[Any, Any], data: Mapping[Any, Any]) -> Any:
    """A sample of the kind that came in.

    Args:
        done: What :func:`open_sample` gave, changed.
        data: What it was given.

    Returns:
        `done`, or a new ``Subject`` with its items; in either, what was taken out is in images of TorchIO again.
    """
    is_subject = hasattr(data, "applied_transforms")
    closed: Any = copy.copy(data) if is_subject else done
    for key, value in done.items():
        image = data.get(key)
        if _is_image(image) and isinstance(value, Tensor):
            voxels = value.as_tensor() if isinstance(value, MetaTensor) else value
            closed[key] = copy.copy(image)
            closed[key].set_data(voxels[..., None] if voxels.ndim == 3 else voxels)
        else:
            closed[key] = value
    if is_subject:
        closed.applied_transforms = list(data.applied_transforms)  # type: ignore[attr-defined]
        closed.update_attributes()  # it also holds its images as attributes
    return closed


def _is_image(value: Any) -> bool:
    return hasattr(value, "set_data") and hasattr(value, "is_2d")
