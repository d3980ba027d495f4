"""The autoencoder that takes scans to a latent grid and back, whole or by tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from monai.networks.nets import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from medgen.networks.haar import HaarTransform
from medgen.precision import has_bf16_kernels
from medgen.types import BadInputError

# glibc's allocator gives freed blocks back at once only above 32 MB; measured, it keeps 0.13 GB of smaller ones.
KEPT_BYTES = 150_000_000


class ChannelNorm(nn.Module):
    """Root-mean-square normalization over the channels of each voxel alone (Zhang & Sennrich 2019, arXiv:1910.07467).

    It takes GroupNorm's place because GroupNorm's statistics run over the whole scan, so that a tile would decode
    differently from the same region of the whole; without it the network is local and tiling is exact.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize ``x (B, C, *spatial)`` voxel by voxel."""
        last = x.movedim(1, -1)
        return (
            (F.rms_norm(last, (last.shape[-1],), self.weight.to(last.dtype), 1e-6) + self.bias)
            .movedim(-1, 1)
            .to(x.dtype)
        )


def _replace_group_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, ChannelNorm(child.num_channels))
        else:
            _replace_group_norms(child)


class Autoencoder(ModelMixin, ConfigMixin):
    """KL autoencoder for 2D and 3D scans (Rombach et al. 2022, arXiv:2112.10752), strictly local.

    The networks learn what a fixed Haar transform around them leaves (shortcuts as in DC-AE, Chen et al. 2024,
    arXiv:2410.10733, but orthonormal): they start as that transform, and reach in hundreds of steps what a plain
    autoencoder needs many thousands for. With ``in_channels * compression ** spatial_dims`` latent channels nothing of
    the scan is lost, its noise included.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        channels: Feature channels per level; each level after the first halves the resolution.
        latent_channels: Channels of the latent grid.
        num_res_blocks: Residual blocks per level.
    """

    @register_to_config
    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 64),
        latent_channels: int = 4,
        num_res_blocks: int = 1,
    ) -> None:
        super().__init__()
        self.network = AutoencoderKL(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=in_channels,
            channels=tuple(channels),
            latent_channels=latent_channels,
            num_res_blocks=num_res_blocks,
            attention_levels=(False,) * len(channels),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            norm_num_groups=1,  # MONAI wants a number; the norms are replaced right below
        )
        _replace_group_norms(self.network)
        self.haar = HaarTransform(spatial_dims, in_channels, self.compression, latent_channels)
        for last in (self.network.quant_conv_mu, self.network.decoder.blocks[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        # The posterior starts narrow (log variance -6), or its noise would drown the finer coefficients.
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, -6.0)
        nn.init.zeros_(self.network.quant_conv_log_sigma.conv.weight)

    @property
    def compression(self) -> int:
        """Image voxels per latent voxel along one axis."""
        return int(2 ** (len(self.config["channels"]) - 1))

    @property
    def decoder_radius(self) -> int:
        """Reach of one latent voxel in the decoder, in latent voxels: an exact tile needs this much margin."""
        levels, blocks = len(self.config["channels"]), int(self.config["num_res_blocks"])
        reach = 2.0  # post-quantization is 1x1; the entry convolution reaches 1, rounding of odd positions 1
        for level in range(levels):
            reach += (2 * blocks + 1) / 2**level
        return int(reach + 0.999)

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of the latents.

        Args:
            image: ``(B, C, *spatial)`` in [-1, 1]; each size a multiple of :attr:`compression`.

        Returns:
            Mean and standard deviation, each ``(B, latent_channels, *spatial / compression)``.

        Raises:
            ValueError: If a size does not divide.
        """
        uneven = [size for size in image.shape[2:] if size % self.compression]
        if uneven:
            raise ValueError(
                f"expected sizes that are multiples of {self.compression}, got {tuple(image.shape[2:])}; pad the scan "
                "first (medgen.data.geometry.place with divisor=)"
            )
        mean, std = self.network.encode(image)
        return self.haar(image) + mean, std

    def decode(self, latents: torch.Tensor, *, max_memory_gb: float | None = None) -> torch.Tensor:
        """Image of ``latents``, by tiles where the whole would not fit.

        Args:
            latents: ``(B, latent_channels, *size)``.
            max_memory_gb: Bound in GB for all that the decode adds to the memory in use, the image included; None
                decodes in one piece. Tiles overlap by the decoder's whole reach and are cropped, so they equal the
                whole decode up to rounding.

        Returns:
            ``(B, C, *size * compression)``, about [-1, 1].

        Raises:
            BadInputError: If the bound is too small for the smallest tile.
        """
        if max_memory_gb is None:
            return self._decode(latents)
        per_voxel, radius, sizes = self._decode_bytes_per_latent_voxel(), self.decoder_radius, latents.shape[2:]
        shape = (len(latents), self.config["in_channels"], *(size * self.compression for size in sizes))
        fixed = 4 * prod(shape) + KEPT_BYTES  # the image, and what the allocator does not give back
        budget = max(max_memory_gb * 1e9 - fixed, 0) / per_voxel
        if len(latents) * prod(sizes) <= budget:
            return self._decode(latents)
        core = max(sizes) if prod(sizes) <= budget else int(budget ** (1 / len(sizes))) - 2 * radius
        if core < 1:
            least = ((2 * radius + 1) ** len(sizes) * per_voxel + fixed) / 1e9
            raise BadInputError(
                f"max_memory_gb: expected at least {least:.2g} for scans of {shape[2:]} voxels, got {max_memory_gb:g}. "
                "Raise it."
            )
        image = latents.new_empty(shape, dtype=torch.float32)
        for row, *corner in product(range(len(latents)), *(range(0, size, core) for size in sizes)):
            stop = [min(start + core, size) for start, size in zip(corner, sizes, strict=True)]
            # All tiles have one size, so that each finds the memory of the one before it.
            low = [
                min(max(start - radius, 0), max(size - core - 2 * radius, 0))
                for start, size in zip(corner, sizes, strict=True)
            ]
            high = [min(first + core + 2 * radius, size) for first, size in zip(low, sizes, strict=True)]
            this = slice(row, row + 1)
            tile = self._decode(latents[(this, slice(None), *map(slice, low, high))].contiguous())
            keep = [
                slice((start - first) * self.compression, (end - first) * self.compression)
                for start, end, first in zip(corner, stop, low, strict=True)
            ]
            place = [slice(s * self.compression, e * self.compression) for s, e in zip(corner, stop, strict=True)]
            image[(this, slice(None), *place)] = tile[(slice(None), slice(None), *keep)].float()
        return image

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.haar.inverse(latents) + self.network.decode(latents)

    def _decode_bytes_per_latent_voxel(self) -> float:
        # Four full-resolution feature maps live at once at the finest level: input, shortcut, normalized, output. They
        # are float32 in bfloat16 runs too, because the norms add their bias in float32. Three more have the channels of
        # the image: the Haar part, the learned part, and their sum.
        maps = 4 * max(self.config["channels"][:2]) + 3 * self.config["in_channels"]
        size, dims = 4.0 * maps, self.config["spatial_dims"]
        device = next(self.parameters()).device.type
        if device == "cpu" and torch.is_autocast_enabled("cpu") and not has_bf16_kernels():
            # Convolutions are matrix products there: each voxel is unfolded into its neighbourhood, of two bytes each.
            size += 2.0 * 3**dims * max(self.config["channels"][:2])
        return size * float(self.compression**dims)

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Reconstruct ``image`` from a draw of its posterior.

        Args:
            image: ``(B, C, *spatial)`` in [-1, 1].
            noise: Standard normal noise of the latents' shape, or None for the mean.

        Returns:
            Reconstruction, mean and standard deviation.
        """
        mean, std = self.encode(image)
        latents = mean if noise is None else mean + std * noise.to(mean)
        return self._decode(latents), mean, std
