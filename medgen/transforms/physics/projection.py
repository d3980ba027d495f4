"""CT is measured as projections: line integrals through each slice, and their filtered back-projection."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from medgen.transforms.physics.noise import thin

# Line integral of the most attenuating ray: 30 cm of water at 0.0192 per mm (70 keV).
_LONGEST_PATH = 5.8
# Photons per ray at full dose, for T^2 / V = 1 with T detector elements and V views. So the noise of coarse and fine
# grids is alike; a ray of 128 voxels gets 1e5 photons, one of 512 voxels 1e6 (Yu et al. 2012 use such values).
_PHOTONS = 850.0
_MOST_VIEWS = 360


def low_dose(signal: torch.Tensor, dose: float, rng: np.random.RandomState, axis: int = -1) -> torch.Tensor:
    """A CT scan at a lower dose: noise is added to its projections and reconstructed.

    Parallel beams through each slice, the most attenuating of the scan scaled to 30 cm of water; the
    photons thinned (:func:`medgen.transforms.physics.noise.thin`); the change alone goes through the filtered
    back-projection with Hann's window, so that the anatomy stays as sharp as it was.

    Args:
        signal: ``(C, H, W[, D])``, 0 in air.
        dose: Part of the dose that is left, in (0, 1].
        rng: Source of the draws.
        axis: Array axis that the slices of a volume lie across, counted without the channels (-1: the last).

    Returns:
        ``(C, H, W[, D])``.
    """
    volume = signal[..., None] if signal.ndim == 3 else signal.movedim(axis % 3 + 1, -1)
    slices = volume.permute(0, 3, 1, 2).flatten(0, 1)
    views = min(_MOST_VIEWS, math.ceil(math.pi / 2 * math.hypot(*slices.shape[1:])))
    angles = torch.arange(views, dtype=torch.float64) * (math.pi / views)
    paths = project(slices, angles)
    scale = _LONGEST_PATH / paths.max()
    photons = _PHOTONS * paths.shape[-1] ** 2 / views
    noise = back_project(thin(paths * scale, photons, dose, rng) / scale, angles, (slices.shape[1], slices.shape[2]))
    noise = noise.view(volume.permute(0, 3, 1, 2).shape).permute(0, 2, 3, 1)
    return signal + (noise[..., 0] if signal.ndim == 3 else noise.movedim(-1, axis % 3 + 1))


def project(slices: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Line integrals through slices (Kak & Slaney 1988, eq. 3.5), by linear interpolation.

    Args:
        slices: ``(S, H, W)``.
        angles: ``(V,)`` radians; at 0 the detector lies along the first axis.

    Returns:
        ``(S, V, T)`` in slice units times voxels; T detector elements, one voxel wide, see the whole slice.
    """
    height, width = slices.shape[1:]
    count = math.ceil(math.hypot(height, width)) + 2
    rows = []
    for angle in angles.tolist():
        cos, sin = math.cos(angle), math.sin(angle)
        theta = [[[cos * count / width, sin * count / width, 0], [-sin * count / height, cos * count / height, 0]]]
        grid = F.affine_grid(slices.new_tensor(theta), [1, 1, count, count], align_corners=False)
        rows.append(F.grid_sample(slices[None], grid, align_corners=False)[0].sum(dim=-1))
    return torch.stack(rows, dim=1)


def back_project(paths: torch.Tensor, angles: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """Filtered back-projection (Kak & Slaney 1988, eqs. 3.30 and 3.61) with Hann's window.

    Args:
        paths: ``(S, V, T)`` as :func:`project` gives them.
        angles: ``(V,)`` radians, evenly over half a turn.
        sides: ``(H, W)`` of the slices.

    Returns:
        ``(S, H, W)``.
    """
    count = paths.shape[-1]
    size = 2 ** math.ceil(math.log2(2 * count))
    steps = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    ramp = torch.where(steps.remainder(2) == 1, -1 / (math.pi * steps) ** 2, 0.0)
    ramp[0] = 0.25
    response = torch.fft.rfft(ramp).real * torch.hann_window(size, dtype=torch.float64).roll(size // 2)[: size // 2 + 1]
    filtered = torch.fft.irfft(torch.fft.rfft(paths.double(), size) * response.to(paths.device), size)[..., :count]
    down, right = (torch.arange(side).to(paths) - (side - 1) / 2 for side in sides)
    down, rows = down[:, None], filtered.to(paths)
    result = paths.new_zeros(paths.shape[0], *sides)
    for view, angle in enumerate(angles.tolist()):
        place = down * math.cos(angle) + right * math.sin(angle) + (count - 1) / 2
        left = place.floor().long().clamp(0, count - 2)
        weight = place - left
        result += rows[:, view, left] * (1 - weight) + rows[:, view, left + 1] * weight
    return result * (math.pi / len(angles))
