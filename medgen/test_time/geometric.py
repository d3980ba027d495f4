"""Geometric and intensity views, whose predictions are brought back exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from medgen.seeding import derive_seed, stream


@dataclass(frozen=True)
class Flip:
    """A mirror image; its own inverse.

    Attributes:
        axes: Spatial axes that are turned over, from 0.
    """

    axes: tuple[int, ...] = ()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Turn over.

        Args:
            values: ``(C, H, W[, D])``, a scan or the probabilities of one.

        Returns:
            As ``values``.
        """
        return values.flip([axis + 1 for axis in self.axes]) if self.axes else values


def flips(spatial_dims: int, axes: tuple[int, ...] | None = None) -> tuple[Flip, ...]:
    """All mirror images, the scan itself first.

    Args:
        spatial_dims: 2 or 3.
        axes: Spatial axes that may be turned over; None is all.

    Returns:
        Two to the power of the number of axes.
    """
    used = tuple(range(spatial_dims)) if axes is None else axes
    return tuple(Flip(chosen) for count in range(len(used) + 1) for chosen in itertools.combinations(used, count))


def change_intensities(image: torch.Tensor, *, seed: int, number: int) -> torch.Tensor:
    """Another gamma, contrast and brightness, and some noise, within the range of each channel.

    Args:
        image: ``(C, H, W[, D])`` float.
        seed: Root of the draw.
        number: Of the view; 0 leaves the scan as it is.

    Returns:
        As ``image``.
    """
    if number == 0:
        return image
    random = stream(derive_seed(seed, "test time", f"intensities {number}"))
    axes = tuple(range(1, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    unit = (image - low) / (high - low).clamp(min=1e-12)
    gamma, contrast, brightness, noise = (2 * torch.rand(4, generator=random) - 1).tolist()
    unit = unit ** math.exp(0.3 * gamma)
    mean = unit.mean(axes, keepdim=True)
    unit = mean + (unit - mean) * math.exp(0.2 * contrast) + 0.1 * brightness
    unit = unit + 0.03 * abs(noise) * torch.randn(unit.shape, generator=random)
    return low + unit.clamp(0, 1) * (high - low)
