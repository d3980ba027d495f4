"""Blur, contrast and uneven brightness."""

from __future__ import annotations

import math

import numpy as np
import torch
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms import AdjustContrast, RandBiasField
from monai.utils import convert_to_tensor

from medgen.types import Spacing


def smooth(signal: torch.Tensor, sigma: tuple[float, ...]) -> torch.Tensor:
    """Gaussian blur with MONAI's kernel; beyond its border the signal goes on as at the border.

    Args:
        signal: ``(C, H, W[, D])``.
        sigma: Standard deviation per array axis, in voxels; 0 leaves an axis as it is.

    Returns:
        ``(C, H, W[, D])``.
    """
    kernels = [gaussian_1d(torch.tensor(value), normalize=True) if value else torch.ones(1) for value in sigma]
    return separable_filtering(signal[None], kernels, mode="replicate")[0]


def blur(signal: torch.Tensor, sigma: float, spacing: Spacing) -> torch.Tensor:
    """Blur of a focal spot, a lens or a reconstruction kernel, alike in all directions of the body.

    Args:
        signal: ``(C, H, W[, D])``.
        sigma: Standard deviation in units of the shortest voxel edge.
        spacing: Edge lengths of a voxel, in units of the shortest.

    Returns:
        ``(C, H, W[, D])``.
    """
    return smooth(signal, tuple(sigma / edge for edge in spacing))


def contrast(signal: torch.Tensor, strength: float, rng: np.random.RandomState) -> torch.Tensor:
    """Other contrast by a power law, either way (MONAI's AdjustContrast): x^gamma with gamma = exp(+-strength).

    A mere factor, as in MedMNIST-C, would be undone by the normalization of intensities that most models begin with.

    Args:
        signal: ``(C, H, W[, D])``; what is brighter than 1 stays as far above 1.
        strength: Absolute logarithm of gamma.
        rng: Draws the sign.

    Returns:
        ``(C, H, W[, D])``.
    """
    gamma = math.exp(strength if rng.randint(2) else -strength)
    shown = signal.clamp(0, 1)
    return AdjustContrast(gamma)(shown) + (signal - shown)


def bias_field(signal: torch.Tensor, strength: float, rng: np.random.RandomState) -> torch.Tensor:
    """Uneven sensitivity of a coil, or uneven light: x exp(b), b a polynomial of degree 2 (MONAI's RandBiasField).

    Args:
        signal: ``(C, H, W[, D])``.
        strength: Standard deviation of b, whose mean is 0.
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, D])``.
    """
    # In 2D MONAI's polynomial has no term of the second axis alone, so the axes take turns.
    turned = bool(rng.randint(2))
    shape = tuple(signal.shape[1:])
    draw = RandBiasField(degree=2, coeff_range=(-1.0, 1.0), prob=1.0).set_random_state(state=rng)
    ones = torch.ones(1, *(shape[::-1] if turned else shape))
    field = convert_to_tensor(draw(ones), track_meta=False)[0].log()
    field = field.permute(*reversed(range(field.ndim))) if turned else field
    field = field - field.mean()
    return signal * (field * (strength / field.std())).exp().to(signal)
