"""Bidirectional copy-paste: two scans of a batch swap a box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from medgen.transforms.mix_bases import BatchMix, BatchMixd
from medgen.transforms.mixing import Mix, fraction, nowhere, paste, paste_label
from medgen.types import BadInputError, Shape

Pairing = Literal["random", "halves"]


class RandBidirectionalCopyPasted(BatchMixd):
    """Bidirectional copy-paste: ``X_in = X_i M + X_j (1 - M)`` and ``X_out = X_j M + X_i (1 - M)`` with one M for both.

    Bai et al. 2023, arXiv:2305.00673, equations 1 and 2; M is 0 in a box of beta of each side, placed evenly inside the
    scan, and 1 elsewhere. Both mixed scans come from the same pair, so that no voxel of the two is lost. **Label maps
    stay hard**: they are swapped with the voxels. **Class targets are soft**, weighted by the share of voxels that was
    swapped; the paper has no classes.

    For training with few labels, as in the paper, fill a batch with labelled scans in its first half and with scans
    that a teacher labelled in its second, and pair the halves; `last.boxes` and `last.partner` say which voxels come
    from which, to weight the loss.

    Its `last` holds the :class:`~medgen.transforms.mixing.Mix` of the last call.

    Args:
        keys: Images ``(B, C, *spatial)``.
        label_key: Label map ``(B, 1, *spatial)`` or one-hot ``(B, K, *spatial)``, which keeps its form; or classes
            ``(B,)`` or ``(B, K)``, of which the target is float32 ``(B, K)``, with the sum of the label's weights.
        num_classes: K, background included; needed for class indices ``(B,)``. Label maps are tested with it if it is
            given.
        beta: Side of the box, as a share of the scan's, in (0, 1).
        pairing: `random` pairs any two scans, and leaves one over of an odd batch; `halves` pairs each of the first
            half with one of the second.
        prob: Chance of each pair to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        label_key: str,
        num_classes: int | None = None,
        beta: float = 2 / 3,
        pairing: Pairing = "random",
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, num_classes, prob)
        if not 0 < beta < 1:
            raise BadInputError(f"expected beta in (0, 1), got {beta}")
        if pairing not in ("random", "halves"):
            raise BadInputError(f"expected pairing 'random' or 'halves', got {pairing!r}")
        self.beta, self.pairing = beta, pairing

    def _check(self, images: Mapping[str, Tensor], size: Shape, label: Tensor) -> None:
        super()._check(images, size, label)
        if self.pairing == "halves" and size[0] % 2:
            raise BadInputError(f"expected an even batch to pair its halves, got {size[0]} scans")

    def _draw(self, size: Shape) -> Mix:
        count, spatial = size[0], tuple(size[1:])
        half = count // 2
        if self.pairing == "halves":
            pairs = np.stack([self.R.permutation(half), half + self.R.permutation(half)], axis=1)
        else:
            pairs = self.R.permutation(count)[: 2 * half].reshape(half, 2)
        partner, boxes = list(range(count)), [nowhere(spatial)] * count
        for first, second in pairs.tolist():
            sizes = [max(1, round(self.beta * length)) for length in spatial]
            starts = [int(self.R.randint(length - size + 1)) for length, size in zip(spatial, sizes, strict=True)]
            if self.R.random_sample() < self.prob:
                partner[first], partner[second] = second, first
                boxes[first] = boxes[second] = tuple(
                    (start, start + size) for start, size in zip(starts, sizes, strict=True)
                )
        shares = tuple(fraction(box, spatial) for box in boxes)
        own = tuple(1 - share for share in shares)
        return Mix(spatial, tuple(partner), lam=own, own=own, other=shares, boxes=tuple(boxes))

    def _mix_image(self, image: Tensor, mix: Mix) -> Tensor:
        return paste(image, mix)

    def _mix_label(self, label: Tensor, mix: Mix) -> Tensor:
        return paste_label(label, mix, self.num_classes)


class RandBidirectionalCopyPaste(BatchMix):
    """Bidirectional copy-paste of a batch given as tensors; see :class:`RandBidirectionalCopyPasted`.

    Label maps stay hard, class targets are soft.

    Args:
        num_classes: K, background included; needed for class indices ``(B,)``.
        beta: Side of the box, as a share of the scan's, in (0, 1).
        pairing: `random` or `halves`.
        prob: Chance of each pair to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self, num_classes: int | None = None, beta: float = 2 / 3, pairing: Pairing = "random", prob: float = 1.0
    ) -> None:
        super().__init__(RandBidirectionalCopyPasted("image", "label", num_classes, beta, pairing, prob))


RandBidirectionalCopyPasteD = RandBidirectionalCopyPasteDict = RandBidirectionalCopyPasted
