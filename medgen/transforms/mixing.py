"""What the mixes compute with: boxes, the record of a draw, weighted sums, pasted boxes and class weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type
from torch import Tensor

from medgen.types import BadInputError, Shape

# [start, stop) in voxels along each spatial axis.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mix:
    """What a mix of two samples drew, one entry for each sample of the batch.

    Attributes:
        spatial: Shape of the scans, in voxels.
        partner: Sample that is mixed into this one; itself where nothing is mixed.
        lam: lambda as drawn; 1 where nothing is mixed.
        own: Weight of the sample's own label.
        other: Weight of the partner's label.
        boxes: Where the partner's voxels are pasted; no entries in mixes without boxes.
        sources: Where they come from; no entries where that is the same box.
    """

    spatial: Shape
    partner: tuple[int, ...]
    lam: tuple[float, ...]
    own: tuple[float, ...]
    other: tuple[float, ...]
    boxes: tuple[Box, ...] = ()
    sources: tuple[Box, ...] = ()

    @property
    def rows(self) -> list[int]:
        """Samples into which another one is mixed."""
        return [row for row, partner in enumerate(self.partner) if row != partner]


def draw_box(state: np.random.RandomState, spatial: Shape, share: float) -> Box:
    """Box about a voxel drawn evenly, clipped at the border.

    CutMix (Yun et al. 2019, arXiv:1905.04899, equation 2) with d axes: sides ``n (1 - lambda)^(1/d)``, so that the box
    holds the share 1 - lambda of a volume as well as of an area.

    Args:
        state: Where the draws come from.
        spatial: Shape of the scan, in voxels.
        share: Of the scan in the box before it is clipped, in [0, 1].

    Returns:
        The box, at least one voxel wide along each axis.
    """
    ratio = share ** (1 / len(spatial))
    box = []
    for length in spatial:
        size = max(1, round(length * ratio))
        start = int(state.randint(length)) - size // 2
        box.append((max(0, start), min(length, start + size)))
    return tuple(box)


def nowhere(spatial: Shape) -> Box:
    """Empty box.

    Args:
        spatial: Shape of the scan, in voxels.

    Returns:
        The box of a sample into which nothing is pasted.
    """
    return ((0, 0),) * len(spatial)


def fraction(box: Box, spatial: Shape) -> float:
    """Share of a scan that lies in a box.

    Args:
        box: The box.
        spatial: Shape of the scan, in voxels.

    Returns:
        In [0, 1].
    """
    return math.prod(stop - start for start, stop in box) / math.prod(spatial)


def inside(box: Box) -> tuple[Any, ...]:
    """Index of a box.

    Args:
        box: The box.

    Returns:
        What to put in brackets behind a tensor whose last axes are spatial.
    """
    return (..., *(slice(start, stop) for start, stop in box))


def blend(values: Tensor, mix: Mix) -> Tensor:
    """``own x + other x[partner]`` for each sample.

    Args:
        values: ``(B, ...)`` images or targets, floating point.
        mix: Partners and weights.

    Returns:
        ``(B, ...)``; samples that are not mixed are kept bit for bit.
    """
    rows = mix.rows
    result = values.clone()
    if rows:
        own, other = (
            values.new_tensor([weights[row] for row in rows]).reshape(-1, *[1] * (values.ndim - 1))
            for weights in (mix.own, mix.other)
        )
        result[rows] = own * values[rows] + other * values[[mix.partner[row] for row in rows]]
    return result


def paste(values: Tensor, mix: Mix) -> Tensor:
    """Each sample with its box filled from its partner.

    Args:
        values: ``(B, C, *spatial)`` images or label maps of any type.
        mix: Partners and boxes.

    Returns:
        ``(B, C, *spatial)``.
    """
    result = values.clone()
    for row in mix.rows:
        box = inside(mix.boxes[row])
        result[row][box] = values[mix.partner[row]][box]
    return result


def paste_label(label: Tensor, mix: Mix, num_classes: int | None) -> Tensor:
    """The target of pasted boxes: hard for label maps, soft for classes.

    Args:
        label: Label maps ``(B, 1, *spatial)`` or ``(B, K, *spatial)``; or classes ``(B,)`` or ``(B, K)``.
        mix: Partners, boxes and weights.
        num_classes: K; needed for class indices, and what label maps are tested with.

    Returns:
        Label maps of the same form with the boxes filled from their partners; or float32 ``(B, K)``.

    Raises:
        BadInputError: If the label has classes outside [0, K).
    """
    if label.ndim <= 2:
        return blend(soft_targets(label, num_classes), mix)
    if num_classes is not None and label.shape[1] == 1:
        check_indices(label, num_classes)
    return paste(label, mix)


def soft_targets(label: Tensor, num_classes: int | None, axis: int = 1) -> Tensor:
    """Class weights of a label.

    Args:
        label: Class indices ``(B,)`` or ``(B, 1, *spatial)``, of an integer or a floating type; or weights in [0, 1],
            ``(B, K)`` or ``(B, K, *spatial)``.
        num_classes: K; needed for indices.
        axis: Axis of the classes; 0 for a sample without the axis B.

    Returns:
        float32 with K along the axis; indices as one-hot vectors.

    Raises:
        BadInputError: If the label has classes outside [0, K), weights outside [0, 1], or another K.
    """
    alone = label.ndim <= axis
    if not alone and (label.ndim == axis + 1 or label.shape[axis] > 1):
        if num_classes is not None and label.shape[axis] != num_classes:
            raise BadInputError(
                f"expected weights of {num_classes} classes, got {describe(label)}: class indices go without an axis "
                "for the classes, label maps with one of length 1"
            )
        if not ((label >= 0) & (label <= 1)).all():
            raise BadInputError(f"expected weights in [0, 1], got values from {label.min()} to {label.max()}")
        return label.to(torch.float32)
    if num_classes is None:
        raise BadInputError("expected num_classes, which encodes class indices, got None: give it")
    indices = check_indices(label, num_classes)
    hot = torch.nn.functional.one_hot(indices if alone else indices.squeeze(axis), num_classes)
    return hot.movedim(-1, axis).to(torch.float32)


def check_indices(label: Tensor, num_classes: int) -> Tensor:
    """Class indices, tested.

    Args:
        label: Whole numbers of an integer or a floating type.
        num_classes: K.

    Returns:
        int64 of the same shape.

    Raises:
        BadInputError: If a value is broken or outside [0, K).
    """
    indices = label.to(torch.int64)
    if not torch.equal(indices.to(label.dtype), label):
        raise BadInputError("expected class indices, got broken numbers: resample label maps by nearest neighbor")
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= num_classes:
        raise BadInputError(
            f"expected classes in [0, {num_classes}), got {lowest} to {highest}: raise num_classes or map the label"
        )
    return indices


def check_whole(label: Tensor, source: Any) -> None:
    """Refuse a label map between whose classes was interpolated.

    Args:
        label: The label map after a transform.
        source: The one before.

    Raises:
        BadInputError: If it has broken numbers where the source has only whole ones.
    """
    if not torch.equal(label, label.round()) and torch.equal(before := tensor(source), before.round()):
        raise BadInputError(
            "expected class indices from the inner transform, got broken numbers: give it mode='nearest' for the label"
        )


def check_positive(name: str, value: float) -> None:
    """Refuse a parameter of a distribution that must be positive.

    Args:
        name: Its name.
        value: Its value.

    Raises:
        BadInputError: If it is not above 0 and finite.
    """
    if not 0 < value < math.inf:
        raise BadInputError(f"expected {name} above 0, got {value}")


def check_floating(images: Mapping[str, Tensor]) -> None:
    """Refuse images whose sums would be cut to whole numbers.

    Args:
        images: Images by key.

    Raises:
        BadInputError: If one is not of a floating type.
    """
    for key, image in images.items():
        if not image.is_floating_point():
            raise BadInputError(f"expected {key!r} of a floating type, got {image.dtype}: convert it before the mix")


def plain(value: Tensor) -> Tensor:
    """It without MONAI's meta data, which would be worked on at each step.

    Args:
        value: Any tensor.

    Returns:
        The same memory.
    """
    return value.as_tensor() if isinstance(value, MetaTensor) else value


def tensor(value: Any) -> Tensor:
    """It as a tensor without meta data.

    Args:
        value: Array or tensor.

    Returns:
        The same memory where that is possible.
    """
    return plain(value) if isinstance(value, Tensor) else torch.as_tensor(np.ascontiguousarray(value))


def wrapped(value: Tensor, like: Any) -> Any:
    """A result in the type of what it was made from: array, tensor or MetaTensor, with its affine.

    Args:
        value: The result.
        like: The input.

    Returns:
        The result, of its own number type.
    """
    return convert_to_dst_type(value, dst=like, dtype=value.dtype)[0]


def describe(value: Any) -> str:
    """Shape or type of a value, for a message.

    Args:
        value: Anything.

    Returns:
        As `shape (2, 1, 8, 8)` or `type list`.
    """
    shape = getattr(value, "shape", None)
    return f"type {type(value).__name__}" if shape is None else f"shape {tuple(shape)}"
