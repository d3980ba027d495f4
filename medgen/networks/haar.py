"""The orthonormal Haar transform of blocks: the fixed shortcut around the autoencoder's learned part."""

from __future__ import annotations

from functools import reduce
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F


def haar_matrix(size: int) -> torch.Tensor:
    """Orthonormal Haar basis, coarse to fine (Haar 1910).

    Args:
        size: Length, a power of two.

    Returns:
        ``(size, size)`` float64; row 0 is constant, row r > 0 belongs to level ``floor(log2 r) + 1``.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = haar_matrix(size // 2)
    average = torch.kron(half, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    detail = torch.kron(torch.eye(size // 2, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    return torch.cat([average, detail]) / 2**0.5


class HaarTransform(nn.Module):
    """Blocks of ``block`` voxels per axis to their first Haar coefficients, coarsest first, and back.

    With as many coefficients as voxels the transform loses nothing; with fewer it is a low-pass that the learned part
    of the autoencoder improves upon. Its coefficients are nearly uncorrelated, so that normalizing each channel
    whitens them.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        block: Voxels per axis of a block, a power of two.
        coefficients: How many to keep; past those that exist the rest is zero.
    """

    def __init__(self, spatial_dims: int, in_channels: int, block: int, coefficients: int) -> None:
        super().__init__()
        rows = haar_matrix(block)
        level = [0 if row == 0 else row.bit_length() for row in range(block)]
        order = sorted(
            product(range(block), repeat=spatial_dims),
            key=lambda index: (max(level[row] for row in index), sum(level[row] for row in index), index),
        )
        basis = torch.stack([reduce(torch.kron, [rows[row] for row in index]) for index in order])
        kernel = torch.zeros(coefficients, in_channels, basis.shape[1], dtype=torch.float64)
        for index in range(min(coefficients, len(order) * in_channels)):
            kernel[index, index % in_channels] = basis[index // in_channels]
        shape = (coefficients, in_channels, *[block] * spatial_dims)
        self.kernel: torch.Tensor
        self.register_buffer("kernel", kernel.float().view(shape), persistent=False)
        self.block = block

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(B, coefficients, *size)`` of ``image (B, C, *size * block)``, in float32."""
        conv = F.conv3d if image.ndim == 5 else F.conv2d
        with torch.autocast(image.device.type, enabled=False):
            return conv(image.float(), self.kernel, stride=self.block)

    def inverse(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Image ``(B, C, *size * block)`` of ``coefficients (B, coefficients, *size)``, in float32."""
        conv = F.conv_transpose3d if coefficients.ndim == 5 else F.conv_transpose2d
        with torch.autocast(coefficients.device.type, enabled=False):
            return conv(coefficients.float(), self.kernel, stride=self.block)
