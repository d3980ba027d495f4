"""MixUp: scans and targets of a batch as weighted sums of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from medgen.transforms.mix_bases import BatchMix, BatchMixd
from medgen.transforms.mixing import Mix, blend, check_floating, check_positive, soft_targets
from medgen.types import Shape


class RandMixUpd(BatchMixd):
    """MixUp of a collated batch: ``x = lambda x_i + (1 - lambda) x_j``, and the same for the targets.

    Zhang et al. 2018, arXiv:1710.09412 (the formula of its introduction); lambda ~ Beta(alpha, alpha) is drawn for each
    sample. **Targets are soft**: class indices become one-hot vectors before they are mixed, for label maps in each
    voxel. That also holds for samples that are not mixed, so that the form of the target does not depend on the draw.

    MONAI's MixUpd has one fixed size of batch, averages the numbers of the classes (of 1 and 3 it makes 2), takes no
    class targets and no probability; its formula for images is the same.

    Its `last` holds the :class:`~medgen.transforms.mixing.Mix` of the last call.

    Args:
        keys: Images ``(B, C, *spatial)`` of a floating type.
        label_key: Label map ``(B, 1, *spatial)`` or one-hot ``(B, K, *spatial)``; or classes ``(B,)`` or ``(B, K)``.
            The target is float32 ``(B, K, *spatial)`` or ``(B, K)`` and sums to 1 wherever the label does.
        num_classes: K, background included; needed for labels that hold class indices.
        alpha: Of the Beta distribution; above 0; larger mixes more evenly.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        label_key: str,
        num_classes: int | None = None,
        alpha: float = 0.4,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, num_classes, prob)
        check_positive("alpha", alpha)
        self.alpha = alpha

    def _check(self, images: Mapping[str, Tensor], size: Shape, label: Tensor) -> None:
        super()._check(images, size, label)
        check_floating(images)

    def _draw_mix(self, partner: np.ndarray, mixed: np.ndarray, spatial: Shape) -> Mix:
        lam = np.where(mixed, self.R.beta(self.alpha, self.alpha, len(partner)), 1.0)
        own = tuple(lam.tolist())
        return Mix(spatial, tuple(partner.tolist()), own, own=own, other=tuple((1 - lam).tolist()))

    def _mix_image(self, image: Tensor, mix: Mix) -> Tensor:
        return blend(image, mix)

    def _mix_label(self, label: Tensor, mix: Mix) -> Tensor:
        return blend(soft_targets(label, self.num_classes), mix)


class RandMixUp(BatchMix):
    """MixUp of a batch given as tensors; see :class:`RandMixUpd`. Targets are soft.

    Args:
        num_classes: K, background included; needed for labels that hold class indices.
        alpha: Of the Beta distribution; above 0.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(self, num_classes: int | None = None, alpha: float = 0.4, prob: float = 1.0) -> None:
        super().__init__(RandMixUpd("image", "label", num_classes, alpha, prob))


RandMixUpD = RandMixUpDict = RandMixUpd
