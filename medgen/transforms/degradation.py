"""Worse scans beside the good ones that they come from, on the same voxels: pairs to train enhancement with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple
from torch.nn import functional as F

from medgen.transforms.physics import noise, optics, projection
from medgen.transforms.physics.signal import Image, on_signal
from medgen.types import BadInputError

# Full width at half maximum of a Gaussian, in standard deviations.
_FWHM = 2 * math.sqrt(2 * math.log(2))
_DOSED = {"ct": projection.low_dose, "xray": noise.radiograph_low_dose}


@dataclass(frozen=True)
class LowResolution:
    """Thick slices, or a coarse picture, brought back to the grid of the scan.

    A Gaussian profile as wide at half its height as the new slice is thick, samples at the middles of the new slices,
    and linear interpolation back. The scan's own slices are taken to have such a profile already, so the blur that is
    added has the width sqrt(factor^2 - 1). First and last voxels keep their borders: nothing shifts.

    Attributes:
        factor: Thickness of the new slices in voxels, at least 1; rounded so that whole slices fill the scan.
        axis: Array axis of the slices, counted without the channels (-1: the last), or None for all axes alike.
    """

    factor: float
    axis: int | None = -1

    def __post_init__(self) -> None:
        """Refuse a resolution that is not lower.

        Raises:
            BadInputError: If the factor is below 1.
        """
        if not 1 <= self.factor < math.inf:
            raise BadInputError(f"factor: expected at least 1 voxel per slice, got {self.factor}.")

    def __call__(self, image: Image) -> Image:
        """Lower the resolution of a scan.

        Args:
            image: ``(C, H, W[, D])`` of any unit, finite: array, tensor or MetaTensor.

        Returns:
            The scan in the same type, shape, affine and units; integers become float32.

        Raises:
            BadInputError: If the scan lacks the axis, or cannot be used (see
                :func:`medgen.transforms.physics.signal.on_signal`).
        """
        return on_signal(image, lambda signal, _: self._lower(signal))

    def _lower(self, signal: torch.Tensor) -> torch.Tensor:
        dims = signal.ndim - 1
        if self.axis is not None and not -dims <= self.axis < dims:
            raise BadInputError(
                f"axis: expected one of the {dims} axes of the scan, -{dims} to {dims - 1}, got {self.axis}."
            )
        for axis in range(dims) if self.axis is None else [self.axis % dims]:
            count = signal.shape[axis + 1]
            thick = max(1, round(count / self.factor))
            sigma = [0.0] * dims
            sigma[axis] = math.sqrt((count / thick) ** 2 - 1) / _FWHM
            rows = optics.smooth(signal, tuple(sigma)).movedim(axis + 1, -1)
            lines = rows.reshape(-1, 1, count)
            for size in (thick, count):
                lines = F.interpolate(lines, size, mode="linear", align_corners=False)
            signal = lines.reshape(rows.shape).movedim(-1, axis + 1)
        return signal


@dataclass(frozen=True)
class LowDose:
    """A scan with a part of its X-rays: in CT by its projections, in radiographs by the counts of each pixel.

    Attributes:
        dose: Part of the dose that is left, in (0, 1]; 1 changes nothing.
        modality: ``ct`` or ``xray``.
        seed: Of the counts.
    """

    dose: float
    modality: Literal["ct", "xray"] = "ct"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no dose.

        Raises:
            BadInputError: If the dose is not in (0, 1], or the modality has none.
        """
        if not 0 < self.dose <= 1:
            raise BadInputError(f"dose: expected a part of the full dose, above 0 and at most 1, got {self.dose}.")
        if self.modality not in _DOSED:
            raise BadInputError(f"modality: expected one of {', '.join(_DOSED)}, got {self.modality!r}.")

    def __call__(self, image: Image) -> Image:
        """Lower the dose of a scan.

        Args:
            image: ``(C, H, W[, D])`` of any unit, finite, bright where the body attenuates: array, tensor or
                MetaTensor.

        Returns:
            The scan in the same type, shape, affine and units; integers become float32.

        Raises:
            BadInputError: If the scan cannot be used (see :func:`medgen.transforms.physics.signal.on_signal`).
        """
        rng = np.random.RandomState(self.seed)
        return on_signal(image, lambda signal, _: _DOSED[self.modality](signal, self.dose, rng))


class _RandDegradedPaird(RandomizableTransform, MapTransform):
    """Draws a degradation, applies it to the keys, and keeps the originals under other keys."""

    def __init__(self, keys: KeysCollection, target_key: KeysCollection | None, prob: float, missing: bool) -> None:
        MapTransform.__init__(self, keys, missing)
        RandomizableTransform.__init__(self, prob)
        self.targets: tuple[Hashable | None, ...] = ensure_tuple(target_key) if target_key is not None else ()
        if target_key is not None and len(self.targets) != len(self.keys):
            raise BadInputError(f"target_key: expected one for each of {self.keys}, got {self.targets}.")
        if set(self.targets) & set(self.keys) or len(set(self.targets)) < len(self.targets):
            raise BadInputError(f"target_key: expected other keys than {self.keys}, each once, got {self.targets}.")
        self.last: Callable[[Image], Image] | None = None

    def _draw(self) -> Callable[[Image], Image]:
        raise NotImplementedError

    def randomize(self, data: None = None) -> None:
        """Draw whether and how the scans get worse.

        Args:
            data: Not used.
        """
        super().randomize(None)
        self.last = self._draw() if self._do_transform else None

    def __call__(self, data: Mapping[Hashable, Image]) -> Mapping[Hashable, Image]:
        """Degrade the scans of a sample.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.

        Returns:
            A copy of it with worse scans, and with the originals under the target keys, also where nothing was done.

        Raises:
            BadInputError: If the sample has a target key already, or a scan cannot be used.
        """
        is_subject = hasattr(data, "applied_transforms")
        sample: Any = copy.copy(data) if is_subject else dict(data)
        self.randomize()
        targets = self.targets or (None,) * len(self.keys)
        for key, target in self.key_iterator(sample, targets):
            original = sample[key]
            if target is not None:
                if target in sample:
                    raise BadInputError(
                        f"target_key: the sample has {target!r} already. Choose another key; the second of two "
                        "degradations takes target_key=None."
                    )
                sample[target] = original
            sample[key] = copy.deepcopy(original) if self.last is None else self.last(original)
        if is_subject:
            sample.update_attributes()  # it also holds its images as attributes
        return sample


class RandLowResolutiond(_RandDegradedPaird):
    """Pairs of a scan and the same scan with thicker slices, or coarser pixels, on the same voxels.

    ``last`` is what was done to the last sample, or None if nothing: called with that scan it gives the same voxels.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        factor: Least and largest thickness of the new slices, in voxels.
        axis: As for :class:`LowResolution`.
        prob: Probability that a sample is degraded.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the factors are no range from 1 up, or the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        factor: tuple[float, float] = (2.0, 6.0),
        axis: int | None = -1,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, target_key, prob, allow_missing_keys)
        self.factor = _range("factor", factor)
        self.axis = axis
        for value in self.factor:
            LowResolution(value, axis)

    def _draw(self) -> LowResolution:
        return LowResolution(float(self.R.uniform(*self.factor)), self.axis)


class RandLowDosed(_RandDegradedPaird):
    """Pairs of a scan and the same scan at a lower dose.

    ``last`` is what was done to the last sample, or None if nothing: called with that scan it gives the same voxels.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        dose: Least and largest part of the dose that is left; drawn evenly in its logarithm.
        modality: ``ct`` or ``xray``.
        prob: Probability that a sample is degraded.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the doses are no range within (0, 1], the modality has none, or the target keys do not
            fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        dose: tuple[float, float] = (0.05, 0.5),
        modality: Literal["ct", "xray"] = "ct",
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, target_key, prob, allow_missing_keys)
        self.dose = _range("dose", dose)
        self.modality = modality
        for value in self.dose:
            LowDose(value, modality)

    def _draw(self) -> LowDose:
        low, high = np.log(self.dose)
        dose = min(math.exp(self.R.uniform(low, high)), 1.0)
        return LowDose(dose, self.modality, int(self.R.randint(2**31 - 1)))


def _range(name: str, pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not low <= high:
        raise BadInputError(f"{name}: expected (least, largest), got {pair}.")
    return float(low), float(high)


RandLowResolutionD = RandLowResolutionDict = RandLowResolutiond
RandLowDoseD = RandLowDoseDict = RandLowDosed
