"""CutMix: a box of another sample pasted into each scan of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from medgen.transforms.mix_bases import BatchMix, BatchMixd
from medgen.transforms.mixing import (
    Mix,
    check_positive,
    draw_box,
    fraction,
    nowhere,
    paste,
    paste_label,
)
from medgen.types import Shape


class RandCutMixd(BatchMixd):
    """CutMix of a collated batch: ``x = M x_i + (1 - M) x_j``, M being 0 in a box and 1 elsewhere.

    Yun et al. 2019, arXiv:1905.04899, equations 1 and 2; each sample has its own lambda ~ Beta(alpha, alpha) and box,
    whose sides are ``n (1 - lambda)^(1/d)`` with d axes. **Label maps stay hard**: the partner's labels are pasted with
    its voxels. **Class targets are soft**: weighted by the share of voxels that was really pasted, after the box was
    clipped at the border.

    MONAI's CutMixd starts its boxes at one corner for the whole batch, takes the square root in 3D too, gives class
    targets ``(B, K)`` wholly to the partner and fails on ``(B,)``; it has one fixed size of batch and no probability.

    Its `last` holds the :class:`~medgen.transforms.mixing.Mix` of the last call.

    Args:
        keys: Images ``(B, C, *spatial)``.
        label_key: Label map ``(B, 1, *spatial)`` or one-hot ``(B, K, *spatial)``, which keeps its form; or classes
            ``(B,)`` or ``(B, K)``, of which the target is float32 ``(B, K)``, with the sum of the label's weights.
        num_classes: K, background included; needed for class indices ``(B,)``. Label maps are tested with it if it is
            given.
        alpha: Of the Beta distribution; above 0; 1 draws the size of the box evenly.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        label_key: str,
        num_classes: int | None = None,
        alpha: float = 1.0,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, num_classes, prob)
        check_positive("alpha", alpha)
        self.alpha = alpha

    def _draw_mix(self, partner: np.ndarray, mixed: np.ndarray, spatial: Shape) -> Mix:
        lam = np.where(mixed, self.R.beta(self.alpha, self.alpha, len(partner)), 1.0).tolist()
        boxes = [
            draw_box(self.R, spatial, 1 - value) if pastes else nowhere(spatial)
            for value, pastes in zip(lam, mixed, strict=True)
        ]
        other = tuple(fraction(box, spatial) for box in boxes)
        own = tuple(1 - share for share in other)
        return Mix(spatial, tuple(partner.tolist()), tuple(lam), own, other, boxes=tuple(boxes))

    def _mix_image(self, image: Tensor, mix: Mix) -> Tensor:
        return paste(image, mix)

    def _mix_label(self, label: Tensor, mix: Mix) -> Tensor:
        return paste_label(label, mix, self.num_classes)


class RandCutMix(BatchMix):
    """CutMix of a batch given as tensors; see :class:`RandCutMixd`. Label maps stay hard, class targets are soft.

    Args:
        num_classes: K, background included; needed for class indices ``(B,)``.
        alpha: Of the Beta distribution; above 0.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(self, num_classes: int | None = None, alpha: float = 1.0, prob: float = 1.0) -> None:
        super().__init__(RandCutMixd("image", "label", num_classes, alpha, prob))


RandCutMixD = RandCutMixDict = RandCutMixd
