"""CropMix: crops of a scan at several scales, mixed into one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from medgen.transforms.inner import OnImage
from medgen.transforms.mix_bases import SampleMix, SampleMixd
from medgen.transforms.mixing import (
    Box,
    check_floating,
    check_positive,
    draw_box,
    inside,
    soft_targets,
    tensor,
    wrapped,
)
from medgen.types import BadInputError, Shape

Operation = Literal["mixup", "cutmix"]
_LINEAR = {2: "bilinear", 3: "trilinear"}
# Largest ratio of two sides of a crop, over that of the same sides of the scan.
_STRETCH = math.log(4 / 3)


@dataclass(frozen=True)
class Crops:
    """What CropMix drew.

    Attributes:
        spatial: Shape of the scan, in voxels.
        crops: Where the views come from, in the order in which they are mixed; empty where nothing was done.
        seeds: Seeds of the inner transform, one for each view.
        lam: MixUp: weight of what is mixed so far against the next view; one less than there are views.
        boxes: CutMix: box that changes hands between what is mixed so far and the next view.
        swapped: CutMix: whether the box is taken from what is mixed so far, and the next view is all around it.
    """

    spatial: Shape
    crops: tuple[Box, ...] = ()
    seeds: tuple[int, ...] = ()
    lam: tuple[float, ...] = ()
    boxes: tuple[Box, ...] = ()
    swapped: tuple[bool, ...] = ()


class RandCropMixd(SampleMixd):
    """CropMix: N crops, each from its own part of the range of scales, resized to the scan and mixed one after another.

    Han et al. 2022, arXiv:2205.15955: the range of scales is cut into N equal parts; a crop holds a share of the scan
    drawn from its part, with sides stretched by up to 4/3; the views are mixed in a random order by MixUp, lambda ~
    Beta(alpha/N, alpha/N), or by CutMix, lambda even in [0, 1] and the direction by chance. All views are of one scan,
    so **a class stays as it is**. The paper has no label maps; here they are cropped with the images, by nearest
    neighbor, and are **soft after MixUp** (weighted one-hot maps) and **hard after CutMix**. The paper's permutation of
    color channels between the views is left to `transform`.

    A crop shows the anatomy at another size: the affine, which is kept, no longer says how many mm a voxel has.

    Its `last` holds the :class:`Crops` of the last call.

    Args:
        keys: Images ``(C, *spatial)`` of a floating type.
        label_key: Label map ``(1, *spatial)`` or one-hot ``(K, *spatial)``; None if there is none. After MixUp, and
            also where nothing is mixed, it is float32 ``(K, *spatial)``; with CutMix it keeps its form.
        num_classes: K, background included; needed for MixUp of label maps ``(1, *spatial)``.
        operation: How views are mixed: `mixup` or `cutmix`.
        number: Numbers N of crops to draw from, each at least 2.
        scale: Least and largest share of the scan in a crop, in (0, 1].
        alpha: Of the Beta distribution; above 0.
        transform: Dictionary transform of each view, with its images and label, as for
            :class:`~medgen.transforms.yoco.RandYOCOd`; None for none.
        prob: Chance of a mix, in [0, 1]; otherwise the images stay as they are.

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        label_key: str | None = None,
        num_classes: int | None = None,
        operation: Operation = "mixup",
        number: Sequence[int] = (2, 3, 4),
        scale: tuple[float, float] = (0.01, 1.0),
        alpha: float = 0.4,
        transform: Callable[[Any], Any] | None = None,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, prob)
        check_positive("alpha", alpha)
        if operation not in ("mixup", "cutmix"):
            raise BadInputError(f"expected operation 'mixup' or 'cutmix', got {operation!r}")
        if not number or min(number) < 2:
            raise BadInputError(f"expected numbers of crops of 2 or more, got {number}")
        if not 0 < scale[0] < scale[1] <= 1:
            raise BadInputError(f"expected scale as (least, largest) in (0, 1], got {scale}")
        self.num_classes, self.operation, self.number = num_classes, operation, tuple(number)
        self.scale, self.alpha, self.transform = scale, alpha, transform
        self.last: Crops | None = None

    def _draw(self, size: Shape) -> Crops:
        if self.R.random_sample() >= self.prob:
            return Crops(size)
        count = int(self.R.choice(self.number))
        limits = np.linspace(*self.scale, count + 1)
        crops = [_draw_crop(self.R, size, self.R.uniform(low, high)) for low, high in pairwise(limits)]
        self.R.shuffle(crops)
        seeds = tuple(self._seed() for _ in range(count))
        if self.operation == "mixup":
            lam = self.R.beta(self.alpha / count, self.alpha / count, count - 1)
            return Crops(size, tuple(crops), seeds, lam=tuple(lam.tolist()))
        boxes = tuple(draw_box(self.R, size, self.R.random_sample()) for _ in range(count - 1))
        swapped = tuple(bool(self.R.randint(2)) for _ in range(count - 1))
        return Crops(size, tuple(crops), seeds, boxes=boxes, swapped=swapped)

    def _mix(self, data: Mapping[str, Any], parts: dict[str, Any], record: Crops) -> dict[str, Tensor]:
        tensors = {key: tensor(value) for key, value in parts.items()}
        check_floating({key: value for key, value in tensors.items() if key != self.label_key})
        if not record.crops:
            return self._encoded({key: value.clone() for key, value in tensors.items()})
        views = []
        for crop, seed in zip(record.crops, record.seeds, strict=True):
            view = {key: _resized(value, crop, key == self.label_key) for key, value in tensors.items()}
            view = {key: wrapped(value, parts[key]) for key, value in view.items()}
            views.append(self._encoded(self._augmented(self.transform, seed, data, view)))
        return {key: self._mixed([view[key] for view in views], record) for key in parts}

    def _encoded(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sample with the label in the form that can be mixed."""
        if self.label_key not in sample or self.operation == "cutmix":
            return sample
        return {**sample, self.label_key: soft_targets(sample[self.label_key], self.num_classes, axis=0)}

    def _mixed(self, views: list[Tensor], record: Crops) -> Tensor:
        mixed = views[0]
        if self.operation == "mixup":
            for view, lam in zip(views[1:], record.lam, strict=True):
                mixed = lam * mixed + (1 - lam) * view
            return mixed
        for view, box, swapped in zip(views[1:], record.boxes, record.swapped, strict=True):
            around, within = (view, mixed) if swapped else (mixed, view)
            mixed = around.clone()
            mixed[inside(box)] = within[inside(box)]
        return mixed


def _draw_crop(state: np.random.RandomState, spatial: Shape, share: float) -> Box:
    """Crop that holds a share of the scan, with stretched sides, at a place drawn evenly."""
    stretch = np.array([0.0, *state.uniform(-_STRETCH, _STRETCH, len(spatial) - 1)])
    ratios = share ** (1 / len(spatial)) * np.exp(stretch - stretch.mean())
    box = []
    for length, ratio in zip(spatial, ratios, strict=True):
        size = min(length, max(1, round(length * float(ratio))))
        start = int(state.randint(length - size + 1))
        box.append((start, start + size))
    return tuple(box)


def _resized(value: Tensor, crop: Box, is_label: bool) -> Tensor:
    part = value[inside(crop)][None]
    if is_label:
        return F.interpolate(part.double(), value.shape[1:], mode="nearest-exact")[0].to(value.dtype)
    return F.interpolate(part, value.shape[1:], mode=_LINEAR[len(crop)])[0]


class RandCropMix(SampleMix):
    """CropMix of an image given as an array; see :class:`RandCropMixd`, and of its label map if given.

    Args:
        num_classes: K, background included; needed for MixUp of label maps ``(1, *spatial)``.
        operation: How views are mixed: `mixup` or `cutmix`.
        number: Numbers N of crops to draw from, each at least 2.
        scale: Least and largest share of the scan in a crop, in (0, 1].
        alpha: Of the Beta distribution; above 0.
        transform: Array transform of each view that keeps its shape; None for none.
        prob: Chance of a mix, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        operation: Operation = "mixup",
        number: Sequence[int] = (2, 3, 4),
        scale: tuple[float, float] = (0.01, 1.0),
        alpha: float = 0.4,
        transform: Callable[[Any], Any] | None = None,
        prob: float = 1.0,
    ) -> None:
        inner = None if transform is None else OnImage(transform)
        super().__init__(
            RandCropMixd("image", "label", num_classes, operation, number, scale, alpha, inner, prob),
            [] if transform is None else [transform],
        )


RandCropMixD = RandCropMixDict = RandCropMixd
