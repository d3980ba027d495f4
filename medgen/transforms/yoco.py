"""YOCO: the two halves of a scan, each augmented by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medgen.transforms.inner import OnImage
from medgen.transforms.mix_bases import SampleMix, SampleMixd
from medgen.transforms.mixing import inside, tensor
from medgen.types import BadInputError, Shape


@dataclass(frozen=True)
class Cut:
    """What YOCO drew.

    Attributes:
        spatial: Shape of the scan, in voxels.
        axis: Spatial axis that was cut in two; None where nothing was done.
        seeds: Seeds of the inner transform for the first and the second half.
    """

    spatial: Shape
    axis: int | None
    seeds: tuple[int, int]


class RandYOCOd(SampleMixd):
    """You only cut once: ``x = concat(a_1(x_1), a_2(x_2))``, x_1 and x_2 being the halves of a scan.

    Han et al. 2022, arXiv:2201.12078; the axis of the cut is drawn evenly, in 3D from all three, and the inner
    transform a is drawn anew for each half. **Targets keep their form**: a label map is cut and augmented with the
    images, so it stays as hard as the inner transform leaves it; a class is not touched. The whole keeps the affine of
    the input: what moves inside a half is not written into it.

    Its `last` holds the :class:`Cut` of the last call.

    Args:
        keys: Images ``(C, *spatial)``.
        transform: Dictionary transform that takes the images and the label of a half, and keeps their shape; a random
            one of MONAI is seeded from this transform's stream, anything else must not be random. Label maps need
            mode='nearest' where it resamples.
        label_key: Label map ``(1, *spatial)`` or one-hot ``(K, *spatial)``; None if there is none.
        prob: Chance of a cut, in [0, 1]; otherwise the sample stays as it is.

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        transform: Callable[[Any], Any],
        label_key: str | None = None,
        prob: float = 1.0,
    ) -> None:
        super().__init__(keys, label_key, prob)
        self.transform = transform
        self.last: Cut | None = None

    def _draw(self, size: Shape) -> Cut:
        if min(size) < 2:
            raise BadInputError(f"expected at least 2 voxels along each axis to cut them in two, got shape {size}")
        cut = self.R.random_sample() < self.prob
        axis = int(self.R.randint(len(size)))
        return Cut(size, axis if cut else None, (self._seed(), self._seed()))

    def _mix(self, data: Mapping[str, Any], parts: dict[str, Any], record: Cut) -> dict[str, Tensor]:
        result = {key: tensor(value).clone() for key, value in parts.items()}
        if record.axis is None:
            return result
        middle = record.spatial[record.axis] // 2
        for seed, side in zip(record.seeds, [(0, middle), (middle, record.spatial[record.axis])], strict=True):
            half = inside(tuple(side if axis == record.axis else (0, n) for axis, n in enumerate(record.spatial)))
            piece = {key: _copied(value[half]) for key, value in parts.items()}
            for key, value in self._augmented(self.transform, seed, data, piece).items():
                result[key][half] = value.to(result[key].dtype)
        return result


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy()


class RandYOCO(SampleMix):
    """YOCO of an image given as an array; see :class:`RandYOCOd`, and of its label map if given.

    Args:
        transform: Array transform that keeps the shape of a half.
        prob: Chance of a cut, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(self, transform: Callable[[Any], Any], prob: float = 1.0) -> None:
        super().__init__(RandYOCOd("image", OnImage(transform), "label", prob), [transform])


RandYOCOD = RandYOCODict = RandYOCOd
