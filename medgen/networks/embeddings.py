"""How conditions enter a U-Net: maps as features on its grid, vectors beside the time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MapEmbedding(nn.Module):
    """Full-resolution map to features on the denoiser's grid, without losing a voxel.

    A convolution whose kernel and stride are the compression sees every voxel of the map, where nearest-neighbor
    down-sampling would keep one in ``stride ** spatial_dims``. It has no bias, so an absent (zero) map gives zeros.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the map.
        out_channels: Feature channels.
        stride: Map voxels per denoiser voxel along an axis.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.patch = conv(in_channels, out_channels, kernel_size=stride, stride=stride, bias=False)
        self.mix = conv(out_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed ``x (B, K, *spatial)`` to ``(B, out_channels, *spatial / stride)``."""
        return self.mix(F.silu(self.patch(x)))


class VectorEmbedding(nn.Module):
    """What is added to the embedding of the time: a flag, and a vector of facts without bias, so that zeros are none.

    Args:
        flags: Number of values of the flag.
        features: Length of the vector; 0 for none.
        dim: Length of the time's embedding.
    """

    def __init__(self, flags: int, features: int, dim: int) -> None:
        super().__init__()
        # Named as in nn.Embedding, which models of flags alone were saved with.
        self.weight = nn.Parameter(torch.randn(flags, dim))
        self.vector: nn.Module | None = None
        if features:
            self.vector = nn.Sequential(
                nn.Linear(features, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False)
            )

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """Embed flags ``(B,)`` and vectors ``(B, features)``, or None, to ``(B, dim)``."""
        flag, vector = inputs
        embedded = F.embedding(flag, self.weight)
        return embedded if self.vector is None else embedded + self.vector(vector)
