"""Multi-scale structural similarity in 2D and 3D, for scans too small for the usual five scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

# Exponents of the five scales, fine to coarse: Wang, Simoncelli and Bovik 2003, section 3.2.
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def num_scales(shape: Sequence[int]) -> int:
    """How many scales a scan has room for: at each of them its shortest axis still holds the 11-voxel window.

    Args:
        shape: Spatial shape in voxels.

    Returns:
        1 to 5; 2 from 22 voxels on, 3 from 44, 4 from 88, 5 from 176.
    """
    return max(1, min(len(WEIGHTS), 1 + int(math.log2(max(min(shape) / WINDOW, 1)))))


def ms_ssim(x: torch.Tensor, y: torch.Tensor, *, data_range: float = 1.0, scales: int | None = None) -> torch.Tensor:
    """Multi-scale structural similarity of pairs of scans.

    Gaussian window of 11 voxels with sigma 1.5 (cut to an odd number of voxels on a shorter axis), halving by mean
    pooling, negative terms set to 0. With fewer than five scales the first exponents are used, scaled to sum to 1.

    Args:
        x: ``(B, C, H, W[, D])``.
        y: ``(B, C, H, W[, D])``, compared with `x` scan by scan.
        data_range: Width of the intensity range; intensities should begin at 0.
        scales: Number of scales, 1 to 5. None: :func:`num_scales`. Compare values of equal `scales` only.

    Returns:
        ``(B,)`` in [0, 1]; 1 for equal scans.

    Raises:
        ValueError: If the shapes differ, or an axis is too short for the scales.

    References:
        Wang, Simoncelli and Bovik 2003, Multiscale structural similarity for image quality assessment, equation 7.
    """
    if x.shape != y.shape or x.ndim not in (4, 5):
        raise ValueError(
            f"ms_ssim: expected two batches (B, C, H, W[, D]) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    scales = num_scales(x.shape[2:]) if scales is None else scales
    if not 1 <= scales <= len(WEIGHTS) or min(x.shape[2:]) < 2 ** (scales - 1):
        raise ValueError(
            f"ms_ssim: expected 1 to {len(WEIGHTS)} scales and axes of at least 2^(scales - 1) voxels, "
            f"got {scales} for shape {tuple(x.shape[2:])}. Use num_scales."
        )
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    similarity = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = pool(x, 2), pool(y, 2)
        last = scale == scales - 1
        term = _similarity(x, y, data_range, luminance=last)
        similarity = similarity * term.flatten(1).mean(dim=1).clamp(min=0) ** weight
    return similarity


def _similarity(x: torch.Tensor, y: torch.Tensor, data_range: float, *, luminance: bool) -> torch.Tensor:
    """Map of contrast and structure; with `luminance`, of the whole SSIM, up to the border by reflection."""
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    windows = [min(WINDOW, size - (size + 1) % 2) for size in x.shape[2:]]
    if luminance:
        padding = [window // 2 for window in reversed(windows) for _ in range(2)]
        x, y = F.pad(x, padding, mode="reflect"), F.pad(y, padding, mode="reflect")
    maps = torch.stack([x, y, x * x, y * y, x * y])
    for axis, window in enumerate(windows):
        maps = _smooth(maps, 3 + axis, window)
    mean_x, mean_y = maps[0], maps[1]
    variances = (maps[2] - mean_x**2).clamp(min=0) + (maps[3] - mean_y**2).clamp(min=0)
    similarity = (2 * (maps[4] - mean_x * mean_y) + c2) / (variances + c2)
    if luminance:
        similarity = similarity * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return similarity


def _smooth(maps: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Gaussian filter along one axis, only where the window fits; a banded matrix is faster than a convolution here."""
    size = maps.shape[axis]
    offsets = torch.arange(window, dtype=maps.dtype, device=maps.device) - window // 2
    kernel = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    rows, columns = torch.arange(size - window + 1), torch.arange(size)
    taps = (columns[None] - rows[:, None]).to(maps.device)
    inside = (taps >= 0) & (taps < window)
    band = torch.where(inside, (kernel / kernel.sum())[taps.clamp(0, window - 1)], 0)
    return (maps.movedim(axis, -1) @ band.T).movedim(-1, axis)
