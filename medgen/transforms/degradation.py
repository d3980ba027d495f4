"""Worse scans beside the good ones that they come from, on the same voxels: pairs to train enhancement with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Transform
from torch.nn import functional as F

from medgen.transforms.drawn import Changed, RandDrawn, RandDrawnd
from medgen.transforms.physics import noise, optics, projection
from medgen.transforms.physics.signal import Frame, Image, on_signal
from medgen.types import BadInputError

Axis = int | Literal["slices"] | None
Dosed = Literal["ct", "xray"]

# Full width at half maximum of a Gaussian, in standard deviations.
_FWHM = 2 * math.sqrt(2 * math.log(2))


@dataclass(frozen=True)
class LowResolution(Transform):
    """Thick slices, or a coarse picture, brought back to the grid of the scan.

    A Gaussian profile as wide at half its height as the new slice is thick, samples at the middles of the new slices,
    and linear interpolation back. The scan's own slices are taken to have such a profile already, so the blur that is
    added has the width sqrt(factor^2 - 1). First and last voxels keep their borders: nothing shifts.

    Attributes:
        factor: Thickness of the new slices in voxels, at least 1; rounded so that whole slices fill the scan.
        axis: Array axis of the slices, counted without the channels (-1: the last), or None for all axes alike. By
            default (``"slices"``) a picture is lowered along both axes. A volume is along the axis of its largest
            spacing, or, where two share that, along the one closest to superior-inferior; without an affine that tells
            it along the last.
    """

    factor: float
    axis: Axis = "slices"

    def __post_init__(self) -> None:
        """Refuse a resolution that is not lower.

        Raises:
            BadInputError: If the factor is below 1, or the axis is none.
        """
        if not 1 <= self.factor < math.inf:
            raise BadInputError(f"factor: expected at least 1 voxel per slice, got {self.factor}.")
        if isinstance(self.axis, str) and self.axis != "slices":
            raise BadInputError(f"axis: expected 'slices', a number or None, got {self.axis!r}.")

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
        return on_signal(image, self._lower)

    def _lower(self, signal: torch.Tensor, frame: Frame) -> torch.Tensor:
        dims = signal.ndim - 1
        across = self.axis
        if across == "slices":
            across = frame.thick if dims == 3 else None
        if across is not None and not -dims <= across < dims:
            raise BadInputError(
                f"axis: expected one of the {dims} axes of the scan, -{dims} to {dims - 1}, got {across}."
            )
        for axis in range(dims) if across is None else [across % dims]:
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
class LowDose(Transform):
    """A scan with a part of its X-rays: in CT by its projections, in radiographs by the counts of each pixel.

    The slices of CT lie across the axis closest to superior-inferior, or the last without an affine that tells it.

    Attributes:
        dose: Part of the dose that is left, in (0, 1]; 1 changes nothing.
        modality: ``ct`` or ``xray``.
        seed: Of the counts.
    """

    dose: float
    modality: Dosed = "ct"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no dose.

        Raises:
            BadInputError: If the dose is not in (0, 1], or the modality has none.
        """
        if not 0 < self.dose <= 1:
            raise BadInputError(f"dose: expected a part of the full dose, above 0 and at most 1, got {self.dose}.")
        if self.modality not in get_args(Dosed):
            raise BadInputError(f"modality: expected one of {', '.join(get_args(Dosed))}, got {self.modality!r}.")

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
        if self.modality == "ct":
            return on_signal(image, lambda signal, frame: projection.low_dose(signal, self.dose, rng, frame.upright))
        return on_signal(image, lambda signal, _: noise.radiograph_low_dose(signal, self.dose, rng))


class LowResolutiond(Changed):
    """Dictionary version of :class:`LowResolution`: pairs of a scan and the same scan at a lower resolution.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        factor: As for :class:`LowResolution`.
        axis: Likewise.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the factor is below 1, or the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        factor: float,
        axis: Axis = "slices",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, LowResolution(factor, axis), target_key, allow_missing_keys)


class LowDosed(Changed):
    """Dictionary version of :class:`LowDose`: pairs of a scan and the same scan at a lower dose.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        dose: As for :class:`LowDose`.
        modality: Likewise.
        seed: Likewise, but all samples have it, so that their counts are drawn alike: draws of their own come from
            :class:`RandLowDosed`.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the dose is not in (0, 1], the modality has none, or the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        dose: float,
        modality: Dosed = "ct",
        seed: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, LowDose(dose, modality, seed), target_key, allow_missing_keys)


class RandLowResolution(RandDrawn):
    """A scan with thicker slices, or coarser pixels, on the same voxels.

    Its `last` is the :class:`LowResolution` of the last scan, or None if nothing was done.

    Args:
        factor: Least and largest thickness of the new slices, in voxels.
        axis: As for :class:`LowResolution`.
        prob: Probability that a scan is degraded, in [0, 1].

    Raises:
        BadInputError: If the factors are no range from 1 up, or `prob` is out of range.
    """

    def __init__(self, factor: tuple[float, float] = (2.0, 6.0), axis: Axis = "slices", prob: float = 1.0) -> None:
        super().__init__(prob)
        self.factor = _range("factor", factor)
        self.axis = axis
        for value in self.factor:
            LowResolution(value, axis)

    def draw_change(self) -> LowResolution:
        """Draw how thick the new slices are.

        Returns:
            The degradation.
        """
        return LowResolution(float(self.R.uniform(*self.factor)), self.axis)


class RandLowDose(RandDrawn):
    """A scan at a lower dose.

    Its `last` is the :class:`LowDose` of the last scan, or None if nothing was done.

    Args:
        dose: Least and largest part of the dose that is left; drawn evenly in its logarithm.
        modality: ``ct`` or ``xray``.
        prob: Probability that a scan is degraded, in [0, 1].

    Raises:
        BadInputError: If the doses are no range within (0, 1], the modality has none, or `prob` is out of range.
    """

    def __init__(self, dose: tuple[float, float] = (0.05, 0.5), modality: Dosed = "ct", prob: float = 1.0) -> None:
        super().__init__(prob)
        self.dose = _range("dose", dose)
        self.modality: Dosed = modality
        for value in self.dose:
            LowDose(value, modality)

    def draw_change(self) -> LowDose:
        """Draw a dose and the seed of the counts.

        Returns:
            The degradation.
        """
        low, high = np.log(self.dose)
        dose = min(math.exp(self.R.uniform(low, high)), 1.0)
        return LowDose(dose, self.modality, int(self.R.randint(2**31 - 1)))


class RandLowResolutiond(RandDrawnd):
    """Pairs of a scan and the same scan with thicker slices, or coarser pixels, on the same voxels.

    Dictionary version of :class:`RandLowResolution`; all scans of a sample are degraded alike.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        factor: Least and largest thickness of the new slices, in voxels.
        axis: As for :class:`LowResolution`.
        prob: Probability that a sample is degraded, in [0, 1].
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the factors are no range from 1 up, `prob` is out of range, or the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        factor: tuple[float, float] = (2.0, 6.0),
        axis: Axis = "slices",
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, RandLowResolution(factor, axis, prob), target_key, allow_missing_keys)


class RandLowDosed(RandDrawnd):
    """Pairs of a scan and the same scan at a lower dose.

    Dictionary version of :class:`RandLowDose`; all scans of a sample are degraded alike.

    Args:
        keys: Keys of the scans, which get worse.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        dose: Least and largest part of the dose that is left; drawn evenly in its logarithm.
        modality: ``ct`` or ``xray``.
        prob: Probability that a sample is degraded, in [0, 1].
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the doses are no range within (0, 1], the modality has none, `prob` is out of range, or the
            target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        target_key: KeysCollection | None,
        dose: tuple[float, float] = (0.05, 0.5),
        modality: Dosed = "ct",
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, RandLowDose(dose, modality, prob), target_key, allow_missing_keys)


def _range(name: str, pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not low <= high:
        raise BadInputError(f"{name}: expected (least, largest), got {pair}.")
    return float(low), float(high)


LowResolutionD = LowResolutionDict = LowResolutiond
LowDoseD = LowDoseDict = LowDosed
RandLowResolutionD = RandLowResolutionDict = RandLowResolutiond
RandLowDoseD = RandLowDoseDict = RandLowDosed
