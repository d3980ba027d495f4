"""AugMix: several chains of augmentations of a scan, mixed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai.transforms import Compose, MapTransform
from torch import Tensor

from medgen.transforms.inner import check_in_place, check_shape, seeded
from medgen.transforms.mix_bases import SampleMix, SampleMixd
from medgen.transforms.mixing import check_floating, check_positive, tensor
from medgen.types import BadInputError, Shape


@dataclass(frozen=True)
class Chains:
    """What AugMix drew.

    Attributes:
        spatial: Shape of the scan, in voxels.
        chains: Of each chain the transforms, as (position in the list, seed), in their order; empty where nothing was
            done.
        weights: w of each chain; they sum to 1.
        m: Weight of the scan itself against the mixed chains.
    """

    spatial: Shape
    chains: tuple[tuple[tuple[int, int], ...], ...] = ()
    weights: tuple[float, ...] = ()
    m: float = 1.0


class RandAugMixd(SampleMixd):
    """AugMix: ``m x + (1 - m) sum_k w_k chain_k(x)``, each chain a few of the given transforms drawn evenly.

    Hendrycks et al. 2020, arXiv:1912.02781, algorithm 1: w ~ Dirichlet(alpha, ..., alpha), m ~ Beta(alpha, alpha).
    **Targets are as they were, hard or soft**: only images change. Chains that move anatomy in different ways have no
    hard label in common, so with a label map every transform must leave the anatomy where it is: MONAI's intensity
    transforms and medgen's corruptions are known to, spatial and cropping ones are refused, and others are taken with
    `geometry_free`.
    Without a label map (`label_key` None, for classification) any transform that keeps the shape will do.

    The paper's consistency loss compares a scan with two mixes of it: call the transform twice.

    Its `last` holds the :class:`Chains` of the last call.

    Args:
        keys: Images ``(C, *spatial)`` of a floating type; all get the same chains, drawn with the same seeds.
        transforms: Array transforms that keep the shape, of which random ones need prob=1 to do something each time;
            those of MONAI are seeded from this transform's stream, others must not be random.
        label_key: Label map ``(1, *spatial)`` or one-hot ``(K, *spatial)``, left as it is; None if there is none.
        width: Number of chains.
        depth: Least and largest length of a chain.
        alpha: Of both distributions; above 0.
        geometry_free: Says that transforms which medgen does not know leave the anatomy where it is.
        prob: Chance of a mix, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range, or a transform does not go with a label map.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        transforms: Sequence[Callable[[Any], Any]],
        label_key: str | None = None,
        width: int = 3,
        depth: tuple[int, int] = (1, 3),
        alpha: float = 1.0,
        geometry_free: bool = False,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, prob)
        check_positive("alpha", alpha)
        if not transforms:
            raise BadInputError("expected transforms to draw from, got none")
        if width < 1:
            raise BadInputError(f"expected a width of 1 or more, got {width}")
        if not 1 <= depth[0] <= depth[1]:
            raise BadInputError(f"expected depth as (least, largest) of 1 or more, got {depth}")
        for transform in transforms:
            _check_array(transform)
            if label_key is not None:
                check_in_place(
                    transform,
                    if_moves="apply it to image and label before or after AugMix",
                    if_unknown=None if geometry_free else "give geometry_free=True if it does",
                )
        self.transforms, self.width, self.depth, self.alpha = tuple(transforms), width, depth, alpha
        self.last: Chains | None = None

    def _draw(self, size: Shape) -> Chains:
        if self.R.random_sample() >= self.prob:
            return Chains(size)
        weights = self.R.dirichlet([self.alpha] * self.width)
        m = float(self.R.beta(self.alpha, self.alpha))
        chains = tuple(
            tuple(
                (int(self.R.randint(len(self.transforms))), self._seed())
                for _ in range(self.R.randint(self.depth[0], self.depth[1] + 1))
            )
            for _ in range(self.width)
        )
        return Chains(size, chains, tuple(weights.tolist()), m)

    def _mix(self, data: Mapping[str, Any], parts: dict[str, Any], record: Chains) -> dict[str, Tensor]:
        images = {key: value for key, value in parts.items() if key != self.label_key}
        check_floating({key: tensor(value) for key, value in images.items()})
        return {key: self._mixed(value, record) for key, value in images.items()}

    def _mixed(self, image: Any, record: Chains) -> Tensor:
        mixed = record.m * tensor(image)
        for chain, weight in zip(record.chains, record.weights, strict=True):
            value = image.clone() if isinstance(image, Tensor) else image.copy()
            for position, seed in chain:
                transform = self.transforms[position]
                value = seeded(transform, seed)(value)
                check_shape(f"the image of {type(transform).__name__}", value, image)
            mixed = mixed + (1 - record.m) * weight * tensor(value).to(mixed)
        return mixed


def _check_array(transform: Callable[[Any], Any]) -> None:
    if isinstance(transform, MapTransform):
        name = type(transform).__name__
        array = name.removesuffix("Dict").removesuffix("d")
        raise BadInputError(f"expected array transforms, got {name}: give {array}")
    if isinstance(transform, Compose):
        for inner in transform.transforms:
            _check_array(inner)


class RandAugMix(SampleMix):
    """AugMix of an image given as an array; see :class:`RandAugMixd`. Its label map, if given, stays as it is.

    Args:
        transforms: Array transforms that keep the shape.
        width: Number of chains.
        depth: Least and largest length of a chain.
        alpha: Of the Dirichlet and the Beta distribution; above 0.
        prob: Chance of a mix, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        transforms: Sequence[Callable[[Any], Any]],
        width: int = 3,
        depth: tuple[int, int] = (1, 3),
        alpha: float = 1.0,
        prob: float = 1.0,
    ) -> None:
        super().__init__(RandAugMixd("image", transforms, None, width, depth, alpha, prob=prob), transforms)


RandAugMixD = RandAugMixDict = RandAugMixd
