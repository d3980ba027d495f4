"""SnapMix: CutMix for classes, with targets weighted by what the pasted voxels mean to the classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from monai.visualize import CAM
from monai.visualize.class_activation_maps import CAMBase
from torch import Tensor

from medgen.transforms.mix_bases import BatchMix, BatchMixd
from medgen.transforms.mixing import (
    Mix,
    blend,
    check_floating,
    check_indices,
    check_positive,
    describe,
    draw_box,
    fraction,
    inside,
    nowhere,
    plain,
    soft_targets,
)
from medgen.types import BadInputError, Shape

_LINEAR = {2: "bilinear", 3: "trilinear"}


class RandSnapMixd(BatchMixd):
    """SnapMix of a collated batch: a box of one scan, brought to the size of a box in another, replaces it.

    Huang et al. 2021, arXiv:2012.04846 (section on semantically proportional mixing): boxes of lambda_a and lambda_b,
    both drawn from Beta(alpha, alpha), and the target ``rho_a y_a + rho_b y_b`` with ``rho_a = 1 - sum S_a`` over the
    box that is covered and ``rho_b = sum S_b`` over the box that is taken. S is the semantic percent map: the class
    activation map of the scan's own class, brought to the scan's shape, less its minimum, over its sum. A constant map
    counts each voxel alike. **Class targets are soft and their sum is in [0, 2]**: it is less than 1 where the box
    covers what matters with what does not. Use ``-(target * logits.log_softmax(1)).sum(1).mean()``, as
    ``torch.nn.functional.cross_entropy(logits, target)`` does.

    **Label maps stay hard**: the labels of the box that is taken are brought to the size of the other one, by nearest
    neighbor, with its voxels. They say of each voxel what it is, so no activation maps are asked for.

    Its `last` holds the :class:`~medgen.transforms.mixing.Mix` of the last call, with rho_a as `own` and rho_b as
    `other`, or the shares of voxels for label maps; a replay uses these and asks for no maps.

    Args:
        keys: Images ``(B, C, *spatial)`` of a floating type; the maps are made of the first.
        label_key: Classes ``(B,)`` or one-hot ``(B, K)``, of which the target is float32 ``(B, K)``; or label map
            ``(B, 1, *spatial)`` or one-hot ``(B, K, *spatial)``, which keeps its form.
        cam: Gives the maps ``(B, *grid)`` or ``(B, 1, *grid)`` of images ``(B, C, *spatial)`` and classes ``(B,)``
            int64; or a ``monai.visualize.CAM(module, target_layers, fc_layers)``, whose raw maps are used. Called
            without gradients. None for label maps.
        num_classes: K; needed for class indices ``(B,)``. Label maps are tested with it if it is given.
        alpha: Of the Beta distribution; above 0; the paper has 5.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range, or `cam` is a map of MONAI that leaves gradients in the module.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        label_key: str,
        cam: Callable[[Tensor, Tensor], Tensor] | None,
        num_classes: int | None = None,
        alpha: float = 5.0,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, num_classes, prob)
        check_positive("alpha", alpha)
        # GradCAM and its kin clear the gradients, leave their own, and take one class for the whole batch.
        if isinstance(cam, CAMBase) and not isinstance(cam, CAM):
            raise BadInputError(f"expected a function or monai.visualize.CAM as cam, got {type(cam).__name__}: use CAM")
        self.cam, self.alpha = cam, alpha

    def _check(self, images: Mapping[str, Tensor], size: Shape, label: Tensor) -> None:
        super()._check(images, size, label)
        check_floating(images)
        if label.ndim > 2:
            if self.num_classes is not None and label.shape[1] == 1:
                check_indices(label, self.num_classes)
            return
        if self.cam is None:
            raise BadInputError("expected cam, which says where the class of a scan shows, got None: give it")
        weights = soft_targets(label, self.num_classes)
        if not ((weights == 1).sum(1).eq(1) & (weights == 0).sum(1).eq(weights.shape[1] - 1)).all():
            raise BadInputError("expected one class for each sample, got soft or several ones: use RandCutMixd")

    def _draw_mix(self, partner: np.ndarray, mixed: np.ndarray, spatial: Shape) -> Mix:
        lam = np.where(mixed[:, None], self.R.beta(self.alpha, self.alpha, (len(partner), 2)), 1.0)
        boxes, sources = (
            tuple(
                draw_box(self.R, spatial, 1 - value) if pastes else nowhere(spatial)
                for value, pastes in zip(values, mixed, strict=True)
            )
            for values in lam.T
        )
        return Mix(spatial, tuple(partner.tolist()), tuple(lam[:, 0].tolist()), (), (), boxes, sources)

    def _weigh(self, mix: Mix, image: Tensor, label: Tensor) -> Mix:
        own, other = [1.0] * len(mix.partner), [0.0] * len(mix.partner)
        if label.ndim > 2:
            other = [fraction(box, mix.spatial) for box in mix.boxes]
            own = [1 - share for share in other]
        elif mix.rows and self.cam is not None:
            classes = soft_targets(plain(label), self.num_classes).argmax(1)
            maps = _percent_maps(self.cam, plain(image), classes)
            for row in mix.rows:
                own[row] = 1 - float(maps[row][inside(mix.boxes[row])].sum())
                other[row] = float(maps[mix.partner[row]][inside(mix.sources[row])].sum())
        return replace(mix, own=tuple(own), other=tuple(other))

    def _mix_image(self, image: Tensor, mix: Mix) -> Tensor:
        return _paste_resized(image, mix, _LINEAR[len(mix.spatial)])

    def _mix_label(self, label: Tensor, mix: Mix) -> Tensor:
        if label.ndim <= 2:
            return blend(soft_targets(label, self.num_classes), mix)
        return _paste_resized(label.double(), mix, "nearest-exact").to(label.dtype)


def _percent_maps(cam: Callable[[Tensor, Tensor], Tensor], image: Tensor, classes: Tensor) -> Tensor:
    """Semantic percent maps ``(B, *spatial)``, float64, each with the sum 1."""
    with torch.no_grad():
        maps = _raw_maps(cam, image, classes) if isinstance(cam, CAM) else cam(image, classes)
    spatial = image.shape[2:]
    if isinstance(maps, Tensor) and maps.ndim == len(spatial) + 1:
        maps = maps[:, None]
    if not isinstance(maps, Tensor) or maps.ndim != len(spatial) + 2 or maps.shape[:2] != (len(image), 1):
        raise BadInputError(f"expected maps ({len(image)}, *grid) from cam, got {describe(maps)}")
    if not maps.isfinite().all():
        raise BadInputError("expected finite maps from cam, got NaN or infinite values")
    maps = F.interpolate(plain(maps).detach().double(), spatial, mode=_LINEAR[len(spatial)]).flatten(1)
    maps = maps - maps.amin(1, keepdim=True)
    total = maps.sum(1, keepdim=True)
    return torch.where(total > 0, maps / total, 1 / maps.shape[1]).reshape(len(image), *spatial)


def _paste_resized(values: Tensor, mix: Mix, mode: str) -> Tensor:
    result = values.clone()
    for row in mix.rows:
        target = result[row][inside(mix.boxes[row])]
        source = values[mix.partner[row]][inside(mix.sources[row])]
        target.copy_(F.interpolate(source[None], target.shape[1:], mode=mode)[0])
    return result


def _raw_maps(cam: CAM, image: Tensor, classes: Tensor) -> Tensor:
    """Maps without MONAI's post-processing, which turns them upside down; the module's modes are left as they were."""
    modes = {module: module.training for module in cam.nn_module.model.modules()}
    maps: Tensor = cam.compute_map(image, class_idx=classes)
    for module, training in modes.items():
        module.training = training
    return maps


class RandSnapMix(BatchMix):
    """SnapMix of a batch given as tensors; see :class:`RandSnapMixd`.

    Label maps stay hard; class targets are soft, with sums in [0, 2].

    Args:
        cam: Gives the class activation maps of images and classes; None for label maps.
        num_classes: K; needed for class indices ``(B,)``.
        alpha: Of the Beta distribution; above 0.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        cam: Callable[[Tensor, Tensor], Tensor] | None,
        num_classes: int | None = None,
        alpha: float = 5.0,
        prob: float = 1.0,
    ) -> None:
        super().__init__(RandSnapMixd("image", "label", cam, num_classes, alpha, prob))


RandSnapMixD = RandSnapMixDict = RandSnapMixd
