"""Label maps as tensors that a network can read (one-hot) or generate (truncated signed distances)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from medgen.types import BadInputError, Spacing

MaskForm = Literal["one_hot", "signed_distance"]


def one_hot(label: torch.Tensor, num_classes: int, *, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Label maps as one channel per class, background included.

    All channels are zero outside ``valid``: padding then differs from background, and an all-zero tensor is the null
    mask of an unconditional pass.

    Args:
        label: ``(B, H, W[, D])`` integer class indices in ``[0, num_classes)``.
        num_classes: K, number of classes with background.
        valid: ``(B, H, W[, D])`` bool, True inside the field of view; None means everywhere.

    Returns:
        ``(B, K, H, W[, D])`` float32 of zeros and ones, on the device of ``label``.

    Raises:
        BadInputError: If the label has no integer type, holds a value outside the classes, or ``valid`` differs from it
            in shape.
    """
    _check_label(label, num_classes)
    classes = torch.arange(num_classes, device=label.device).view(1, -1, *[1] * (label.ndim - 1))
    channels = label.unsqueeze(1) == classes
    if valid is not None:
        if valid.shape != label.shape:
            raise BadInputError(
                f"valid: expected the label's shape {tuple(label.shape)}, got {tuple(valid.shape)}. "
                "Pass one field-of-view mask per label map."
            )
        channels &= valid.to(device=label.device, dtype=torch.bool).unsqueeze(1)
    return channels.to(torch.float32)


def signed_distance(
    label: torch.Tensor, num_classes: int, *, truncation: float = 8.0, spacing: Spacing | None = None
) -> torch.Tensor:
    """Truncated signed distance of every voxel centre to the surface of each foreground class.

    The surface lies half way between neighboring voxel centres, so that the two sides of a face get the same distance
    with opposite signs and no voxel is ever exactly zero. An absent class is -1 everywhere.

    Args:
        label: ``(H, W[, D])`` integer class indices in ``[0, num_classes)``.
        num_classes: K, number of classes with background.
        truncation: Distance that becomes 1, in voxels, or in mm where ``spacing`` is given; larger ones are clipped.
        spacing: Voxel edge lengths in mm, in array order; None measures in voxels.

    Returns:
        ``(K - 1, H, W[, D])`` float32 in [-1, 1], positive inside; channel ``k - 1`` is class ``k``. On the CPU.

    Raises:
        BadInputError: If the label is not integer or holds a value outside the classes, or truncation or spacing is not
            positive or of the wrong length.
    """
    _check_label(label, num_classes)
    if not (math.isfinite(truncation) and truncation > 0):
        raise BadInputError(f"truncation: expected a positive distance, got {truncation}. Pass for example 8.0.")
    step = (1.0,) * label.ndim if spacing is None else tuple(float(value) for value in spacing)
    if len(step) != label.ndim or not all(math.isfinite(value) and value > 0 for value in step):
        raise BadInputError(
            f"spacing: expected {label.ndim} positive lengths in mm, got {spacing}. Pass one length per label axis."
        )
    array = label.detach().cpu().numpy()
    distance = np.full((num_classes - 1, *array.shape), -1.0, dtype=np.float32)
    margins = [math.ceil(truncation / value) + 1 for value in step]
    for index, box in enumerate(ndimage.find_objects(array.astype(np.int32), max_label=num_classes - 1)):
        if box is None:
            continue
        # Beyond this margin everything is clipped to -1, so that large volumes with small organs stay cheap.
        crop = tuple(slice(max(part.start - m, 0), part.stop + m) for part, m in zip(box, margins, strict=True))
        inside = array[crop] == index + 1
        if inside.all():
            distance[index][crop] = 1.0
            continue
        within = ndimage.distance_transform_edt(inside, sampling=step)
        beyond = ndimage.distance_transform_edt(~inside, sampling=step)
        # Centre-to-centre distances are at least the finest spacing: taking off half of it keeps the sign right.
        signed = within - beyond - np.where(inside, 0.5, -0.5) * min(step)
        distance[index][crop] = np.clip(signed / truncation, -1.0, 1.0)
    return torch.from_numpy(distance)


def class_distances(label: torch.Tensor, num_classes: int, *, truncation: float = 8.0) -> torch.Tensor:
    """Signed distances of every class, the background included.

    The background's own channel is what keeps touching classes together when a network draws the distances: without
    it, two small errors at a common border open a gap.

    Args:
        label: ``(H, W[, D])`` integer class indices in ``[0, num_classes)``.
        num_classes: K, number of classes with background.
        truncation: Distance in voxels that becomes 1.

    Returns:
        ``(K, H, W[, D])`` float32 in [-1, 1], positive inside.
    """
    background = -signed_distance((label > 0).to(torch.int16), 2, truncation=truncation)
    return torch.cat([background, signed_distance(label, num_classes, truncation=truncation)])


def encode_mask(
    label: torch.Tensor, num_classes: int, form: MaskForm = "one_hot", *, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """A label map as a denoiser is steered by it; all zeros is the null of an unconditional pass.

    Args:
        label: ``(*spatial)`` integer class indices in ``[0, num_classes)``.
        num_classes: K, number of classes with background.
        form: `one_hot` (:func:`one_hot`) or `signed_distance` (:func:`class_distances`), which tells each voxel how far
            off every border lies, up to 8 voxels.
        valid: ``(*spatial)`` bool, True inside the field of view, beyond which all is zero; None means everywhere.

    Returns:
        ``(1, K, *spatial)`` float32, on the CPU for distances.

    Raises:
        BadInputError: If the label has no integer type or holds a value outside the classes, or ``valid`` differs from
            it in shape.
    """
    if form == "one_hot":
        return one_hot(label[None], num_classes, valid=None if valid is None else valid[None])
    inside = torch.ones_like(label, dtype=torch.bool) if valid is None else valid.bool()
    if inside.shape != label.shape:
        raise BadInputError(
            f"valid: expected the label's shape {tuple(label.shape)}, got {tuple(inside.shape)}. "
            "Pass one field-of-view mask per label map."
        )
    return (class_distances(label, num_classes) * inside.cpu())[None]


def from_class_distances(distance: torch.Tensor) -> torch.Tensor:
    """Label maps from signed distances; the inverse of :func:`class_distances`.

    Args:
        distance: ``(B, K, H, W[, D])`` floating point, positive inside; for one map use ``distance[None]``.

    Returns:
        ``(B, H, W[, D])`` int16: the class of the largest distance.

    Raises:
        BadInputError: If there is no class channel or a value is NaN.
    """
    if distance.ndim < 4 or distance.shape[1] < 2:
        raise BadInputError(
            f"distance: expected shape (B, K, H, W[, D]) with at least two classes, got {tuple(distance.shape)}. "
            "Add the batch axis with distance[None]."
        )
    if torch.isnan(distance).any():
        raise BadInputError("distance: expected finite values, got NaN. Check the network that made it.")
    return distance.argmax(dim=1).to(torch.int16)


def _check_label(label: torch.Tensor, num_classes: int) -> None:
    """Refuse labels that are not class indices."""
    if num_classes < 2:
        raise BadInputError(f"num_classes: expected at least 2 (background and one class), got {num_classes}.")
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise BadInputError(
            f"label: expected integer class indices, got {label.dtype}. Convert with label.to(torch.int16)."
        )
    if label.numel() == 0:
        raise BadInputError(f"label: expected at least one voxel, got shape {tuple(label.shape)}.")
    low, high = torch.stack(label.aminmax()).tolist()
    if low < 0 or high >= num_classes:
        raise BadInputError(
            f"label: expected class indices 0..{num_classes - 1}, got values from {low} to {high}. "
            "Declare the missing classes or remap the label."
        )
