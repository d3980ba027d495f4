"""Intensities: from the scan's own units into the model's range of -1 to 1, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from medgen.types import BadInputError

# A z-score normalized scan fills the model's range with plus and minus this many standard deviations.
ZSCORE_RANGE = 3.0


@dataclass(frozen=True)
class IntensityMap:
    """Affine map of intensities, one pair of numbers per channel: model = source * scale + shift.

    Attributes:
        scale: Model units per source unit, per channel; positive.
        shift: Model value of source value 0, per channel.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Source units to model units; what lies outside the range is clipped.

        Args:
            image: ``(C, *spatial)`` in source units.

        Returns:
            ``(C, *spatial)`` float32 in [-1, 1].
        """
        scale, shift = self._columns(image)
        # In float64: a narrow range far from zero (PET counts, 16-bit offsets) would lose its digits in float32.
        return (image.double() * scale + shift).clamp_(-1, 1).float()

    def inverse(self, image: torch.Tensor) -> torch.Tensor:
        """Model units to source units.

        Args:
            image: ``(C, *spatial)`` in model units.

        Returns:
            ``(C, *spatial)`` float32 in source units.
        """
        scale, shift = self._columns(image)
        return ((image.double() - shift) / scale).float()

    def _columns(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if image.shape[0] != len(self.scale):
            raise ValueError(f"image: expected {len(self.scale)} channels first, got shape {tuple(image.shape)}.")
        shape = (-1,) + (1,) * (image.ndim - 1)
        scale = torch.tensor(self.scale, dtype=torch.float64, device=image.device).view(shape)
        shift = torch.tensor(self.shift, dtype=torch.float64, device=image.device).view(shape)
        return scale, shift


@dataclass(frozen=True)
class Normalization:
    """How the intensities of a scan come into the model's range.

    ``percentile`` puts the two percentiles of the scan at -1 and 1; ``window`` does so with two fixed values (CT: HU);
    ``zscore`` puts the mean of the scan at 0 and three standard deviations to either side at -1 and 1.

    Attributes:
        method: One of ``percentile``, ``window``, ``zscore``.
        low: Lower percentile (0-100), or lower end of the window in source units; unused by ``zscore``.
        high: Upper percentile (0-100), or upper end of the window in source units; unused by ``zscore``.
        per_channel: Whether each channel is fitted on its own; False keeps the balance of RGB colors.
    """

    method: Literal["percentile", "window", "zscore"] = "percentile"
    low: float = 0.5
    high: float = 99.5
    per_channel: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that no scan can satisfy.

        Raises:
            ValueError: If the method is unknown, or low and high do not bound a range.
        """
        if self.method not in ("percentile", "window", "zscore"):
            raise ValueError(f"normalization: expected percentile, window or zscore, got {self.method!r}.")
        if self.method != "zscore" and not self.low < self.high:
            raise ValueError(f"normalization: expected low < high, got low {self.low}, high {self.high}.")
        if self.method == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise ValueError(f"normalization: expected percentiles in 0-100, got low {self.low}, high {self.high}.")

    def fit(self, image: torch.Tensor, *, source: str | Path = "image") -> IntensityMap:
        """Find the map for one scan.

        Args:
            image: ``(C, *spatial)`` in source units, finite.
            source: File that the scan was read from, for the message.

        Returns:
            The map, with one pair of numbers per channel.

        Raises:
            BadInputError: If a channel (or, without `per_channel`, the scan) has nothing to map: it is constant or not
                finite, or all of it lies outside the window, or both percentiles coincide.
        """
        rows = image.detach().cpu().reshape(image.shape[0] if self.per_channel else 1, -1).numpy()
        names = [f"{source}, channel {index}" if len(rows) > 1 else f"{source}" for index in range(len(rows))]
        pairs = [self._fit_row(row, name) for row, name in zip(rows, names, strict=True)]
        if not self.per_channel:
            pairs = pairs * image.shape[0]
        return IntensityMap(scale=tuple(scale for scale, _ in pairs), shift=tuple(shift for _, shift in pairs))

    def _fit_row(self, values: np.ndarray, name: str) -> tuple[float, float]:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise BadInputError(f"{name}: expected finite intensities, got NaN or infinity. Repair the file.")
        if low == high:
            raise BadInputError(f"{name}: expected varying intensities, got the constant {low:g}. Leave the case out.")
        if self.method == "zscore":
            half = ZSCORE_RANGE * float(values.std(dtype=np.float64))
            return 1 / half, -float(values.mean(dtype=np.float64)) / half
        if self.method == "window":
            if high <= self.low or low >= self.high:
                raise BadInputError(
                    f"{name}: expected intensities inside the window {self.low:g} to {self.high:g}, "
                    f"got {low:g} to {high:g}. Check the units of the scan or set another window."
                )
            low, high = self.low, self.high
        else:
            low, high = (float(value) for value in np.percentile(values, [self.low, self.high]))
            if low == high:
                raise BadInputError(
                    f"{name}: expected varying intensities between percentiles {self.low:g} and {self.high:g}, "
                    f"got {low:g} for both. Set wider percentiles (0 and 100) or a fixed window."
                )
        scale = 2 / (high - low)
        return scale, -1 - low * scale
