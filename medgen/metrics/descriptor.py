"""A scan of any size as a small stack of gray values of one size, by which copies are found."""

from __future__ import annotations

from functools import lru_cache

import torch

# Edge of the descriptor for 2D and 3D scans; 8 KiB and 64 KiB per channel in half precision.
GRID = {2: 64, 3: 32}


def describe(images: torch.Tensor, *, grid: int | None = None) -> torch.Tensor:
    """Resample scans to a cube and put each channel at mean 0 and standard deviation 1.

    Each axis is stretched or shrunk to `grid` cells, linearly and with antialiasing, so scans of unlike shapes compare
    box by box: a scan that was resized as a whole keeps its descriptor. Voxel size plays no part. What
    stretching does to a cropped or rotated copy (another scale per axis, shear) is left to the affine fit of
    :func:`medgen.metrics.matching.closest`. Brightness and contrast of a channel drop out; a constant one
    becomes 0.

    Args:
        images: ``(B, C, H, W[, D])`` in any units.
        grid: Edge of the descriptor in cells, a multiple of 4. None: 64 in 2D, 32 in 3D.

    Returns:
        ``(B, C, grid, grid[, grid])`` float32.

    Raises:
        ValueError: If the shape is not that of a batch, an axis is shorter than 4 voxels, or a scan is not finite or is
            constant in all channels.
    """
    if images.ndim not in (4, 5) or not images.numel() or min(images.shape[2:]) < 4:
        raise ValueError(
            "images: expected a batch (B, C, H, W[, D]) with axes of at least 4 voxels, "
            f"got shape {tuple(images.shape)}. Add batch and channel axes, or leave tiny scans out."
        )
    images = images.detach()
    images = images if images.is_floating_point() else images.double()
    rows = images.flatten(2)
    finite = torch.isfinite(rows).flatten(1).all(dim=1)
    if not finite.all():
        where = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"images: expected finite intensities, got NaN or infinity in scan(s) {where} of the batch.")
    low, high = rows.aminmax(dim=-1, keepdim=True)
    constant = (low == high).flatten(1).all(dim=1)
    if constant.any():
        where = torch.nonzero(constant).flatten().tolist()
        raise ValueError(
            f"images: expected scans that vary, got the constant scan(s) {where} of the batch. Leave them out: "
            "nothing tells one from another."
        )
    # Into [0, 1] first, because a narrow range far from zero would lose its digits in float32.
    span = torch.where(high > low, high - low, 1)
    unit = ((rows - low) / span).float().view(images.shape)
    dims = images.ndim - 2
    cells = grid or GRID[dims]
    small = _along_axes(unit, [_resampling(size, cells, str(images.device)) for size in images.shape[2:]])
    centered = small - small.flatten(2).mean(dim=-1).view(*small.shape[:2], *[1] * dims)
    deviation = centered.flatten(2).square().mean(dim=-1).sqrt().view(*small.shape[:2], *[1] * dims)
    return torch.where(deviation > 1e-6, centered / deviation.clamp(min=1e-6), 0)


def band_pass(descriptors: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """Difference of two Gaussian blurs: without noise and without what all scans of an organ have in common.

    Args:
        descriptors: ``(B, C, G, G[, G])``.
        low: Standard deviation in cells of the blur that removes noise; 0 for none.
        high: Standard deviation in cells of the blur that is subtracted.

    Returns:
        The same shape.
    """
    size, device = descriptors.shape[-1], str(descriptors.device)
    axes = descriptors.ndim - 2
    fine = _along_axes(descriptors, [_gaussian(size, low, device)] * axes) if low else descriptors
    return fine - _along_axes(descriptors, [_gaussian(size, high, device)] * axes)


def _along_axes(images: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """Multiply each spatial axis with its matrix ``(new size, size)``."""
    for axis, matrix in enumerate(matrices, start=2):
        images = (images.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return images


@lru_cache(maxsize=512)
def _resampling(size: int, cells: int, device: str) -> torch.Tensor:
    """Linear interpolation ``(cells, size)`` between cell centers, widened to the cell where it shrinks."""
    width = max(1.0, size / cells)
    center = (torch.arange(cells, dtype=torch.float64) + 0.5) * size / cells - 0.5
    weight = (1 - (torch.arange(size) - center[:, None]).abs() / width).clamp(min=0)
    return (weight / weight.sum(dim=1, keepdim=True)).float().to(device)


@lru_cache(maxsize=64)
def _gaussian(size: int, sigma: float, device: str) -> torch.Tensor:
    """Gaussian blur ``(size, size)``, cut at the border and scaled to keep constants."""
    offset = torch.arange(size, dtype=torch.float64) - torch.arange(size, dtype=torch.float64)[:, None]
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    return (weight / weight.sum(dim=1, keepdim=True)).float().to(device)
