"""Networks of Stable Diffusion 1.x and 2.x behind the calls of medgen's own: denoiser and autoencoder.

Each is one diffusers model (Rombach et al. 2022, arXiv:2112.10752) with what medgen needs around it, 2D only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from medgen.networks.autoencoder import KEPT_BYTES
from medgen.networks.denoiser import Residuals, check_conditions, pad_to
from medgen.types import BadInputError


class LatentBaseDenoiser(ModelMixin, ConfigMixin):
    """The U-Net of Stable Diffusion, called as medgen's denoiser.

    No text is the embedding of the empty prompt, as Stable Diffusion was trained: a sample whose text is zeros gets it.

    Args:
        settings: Configuration of the U-Net in diffusers, without what the other arguments say.
        spatial_dims: 2; there is no other.
        in_channels: Latent channels.
        mask_stride: Map voxels per latent voxel along an axis: the autoencoder's compression.
        text_length: Tokens of a text.
        text_width: Features of each token.
    """

    @register_to_config
    def __init__(
        self,
        *,
        settings: Mapping[str, Any],
        spatial_dims: int = 2,
        in_channels: int = 4,
        mask_stride: int = 8,
        text_length: int = 77,
        text_width: int = 768,
    ) -> None:
        super().__init__()
        own = {"in_channels": in_channels, "out_channels": in_channels, "cross_attention_dim": text_width}
        self.unet = UNet2DConditionModel.from_config({**settings, **own})
        self.empty_text: torch.Tensor
        self.register_buffer("empty_text", torch.zeros(text_length, text_width))

    @classmethod
    def of(cls, unet: UNet2DConditionModel, empty_text: torch.Tensor, *, mask_stride: int) -> LatentBaseDenoiser:
        """Take over a U-Net; its weights are shared, not copied.

        Args:
            unet: A U-Net of diffusers.
            empty_text: ``(L, E)`` embedding of the empty prompt.
            mask_stride: Compression of the autoencoder that it was trained with.

        Returns:
            The denoiser.
        """
        length, width = empty_text.shape
        settings = plain_config(unet.config, "in_channels", "out_channels", "cross_attention_dim")
        with torch.device("meta"):  # the random weights would be thrown away at once
            network = cls(
                settings=settings,
                in_channels=unet.config["in_channels"],
                mask_stride=mask_stride,
                text_length=length,
                text_width=width,
            )
        network.unet = unet
        network.empty_text = empty_text.detach().clone()
        return network

    @property
    def divisor(self) -> int:
        """Input sizes that are multiples of this need no padding."""
        return int(2 ** (len(self.unet.config["block_out_channels"]) - 1))

    def checkpoint_blocks(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()

    def condition_shapes(self, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shape of one sample of every condition that it reads.

        Args:
            size: Of the input, per axis.

        Returns:
            That of ``text``, without the batch, whatever the size.
        """
        return {"text": tuple(self.empty_text.shape)}

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Mapping[str, torch.Tensor] | None = None,
        augmented: torch.Tensor | None = None,
        residuals: Sequence[Residuals] = (),
    ) -> torch.Tensor:
        """Denoiser output in the objective's parametrization.

        Args:
            x: ``(B, in_channels, h, w)`` noisy latents.
            timesteps: ``(B,)`` in [0, num_train_timesteps).
            conditions: ``text (B, L, E)``, zeros where a sample has none.
            augmented: Not listened to: the base does not know what augmentation is.
            residuals: What control branches add, as they return it.

        Returns:
            ``(B, in_channels, h, w)``.

        Raises:
            ValueError: If a condition is given that it does not read, or its size does not fit.
        """
        size = x.shape[2:]
        parts = check_conditions(x, self.condition_shapes(size), conditions or {})
        added: dict[str, Any] = {}
        if residuals:
            down = [sum(rows) for rows in zip(*(rows for rows, _ in residuals), strict=True)]
            added = {"down_block_additional_residuals": down}
            added["mid_block_additional_residual"] = sum(middle for _, middle in residuals)
        text = with_empty_text(parts["text"], self.empty_text)
        (out,) = self.unet(pad_to(x, self.divisor), timesteps, text, return_dict=False, **added)
        return out[(..., *(slice(length) for length in size))]


class LatentBaseAutoencoder(ModelMixin, ConfigMixin):
    """The autoencoder of Stable Diffusion, called as medgen's.

    It knows pictures of three channels. An image of one is repeated to three for encoding, and decodes to the mean of
    the three, always with the precision of the weights: no step rounds to 8 bits.

    Args:
        settings: Configuration of the autoencoder in diffusers, without its latent channels.
        spatial_dims: 2; there is no other.
        in_channels: Image channels, 1 or 3.
        latent_channels: Channels of the latent grid.
    """

    @register_to_config
    def __init__(
        self, *, settings: Mapping[str, Any], spatial_dims: int = 2, in_channels: int = 1, latent_channels: int = 4
    ) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise BadInputError(
                f"image channels: expected 1 or 3 for Stable Diffusion's autoencoder, got {in_channels}. Train an "
                "autoencoder of your own for scans of so many channels."
            )
        self.vae = AutoencoderKL.from_config({**settings, "latent_channels": latent_channels})

    @classmethod
    def of(cls, vae: AutoencoderKL, *, in_channels: int = 1) -> LatentBaseAutoencoder:
        """Take over an autoencoder; its weights are shared, not copied.

        Args:
            vae: An autoencoder of diffusers.
            in_channels: Image channels, 1 or 3.

        Returns:
            The autoencoder.

        Raises:
            BadInputError: If the number of image channels is another.
        """
        settings, channels = plain_config(vae.config, "latent_channels"), vae.config["latent_channels"]
        with torch.device("meta"):
            network = cls(settings=settings, in_channels=in_channels, latent_channels=channels)
        network.vae = vae
        return network

    @property
    def compression(self) -> int:
        """Image voxels per latent voxel along one axis."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of the latents, not scaled.

        Args:
            image: ``(B, C, H, W)`` in [-1, 1]; each size a multiple of :attr:`compression`.

        Returns:
            Mean and standard deviation, each ``(B, latent_channels, H / compression, W / compression)``.

        Raises:
            ValueError: If the channels are others or a size does not divide.
        """
        if image.shape[1] != self.config["in_channels"]:
            raise ValueError(f"expected images of {self.config['in_channels']} channels, got {image.shape[1]}")
        if any(size % self.compression for size in image.shape[2:]):
            raise ValueError(
                f"expected sizes that are multiples of {self.compression}, got {tuple(image.shape[2:])}; pad the scan "
                "first (medgen.data.geometry.place with divisor=)"
            )
        posterior = self.vae.encode(image.expand(-1, 3, -1, -1)).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: torch.Tensor, *, max_memory_gb: float | None = None) -> torch.Tensor:
        """Image of ``latents``.

        Args:
            latents: ``(B, latent_channels, h, w)``, not scaled.
            max_memory_gb: Bound in GB for all that the decode adds to the memory in use. It then goes image by image,
                never by tiles, which would look different: norms and attention of this decoder see the whole image.

        Returns:
            ``(B, C, h * compression, w * compression)``, about [-1, 1], floating point.

        Raises:
            BadInputError: If the bound is too small for one image.
        """
        if max_memory_gb is None:
            return self._decode(latents)
        pixels = prod(latents.shape[2:]) * self.compression**2
        # As in the decoder of medgen's own: feature maps that live at once at full resolution, and the pictures.
        channels = 4 * max(self.vae.config["block_out_channels"][:2]) + 3 * 3
        least = (4 * pixels * (channels + len(latents) * self.config["in_channels"]) + KEPT_BYTES) / 1e9
        if least > max_memory_gb:
            raise BadInputError(
                f"max_memory_gb: expected at least {least:.2g} for {len(latents)} images of {pixels} pixels, which "
                f"Stable Diffusion's autoencoder decodes whole, got {max_memory_gb:g}. Raise it, or synthesize fewer "
                "or smaller images at once."
            )
        return torch.cat([self._decode(row) for row in latents.split(1)])

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        # In bfloat16 an image would have no more than 8 bits.
        with torch.autocast(latents.device.type, enabled=False):
            image: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample
        return image.mean(dim=1, keepdim=True) if self.config["in_channels"] == 1 else image


def with_empty_text(text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Texts with the embedding of the empty prompt where a sample has none.

    Args:
        text: ``(B, L, E)``, zeros for none.
        empty: ``(L, E)``.

    Returns:
        ``(B, L, E)``.
    """
    absent = text.flatten(1).eq(0).all(dim=1)
    return torch.where(absent[:, None, None], empty.to(text.dtype), text)


def plain_config(config: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """A configuration of diffusers without its private entries.

    Args:
        config: Of a model of diffusers.
        *left_out: Further entries to leave out.

    Returns:
        Values that JSON can hold.
    """
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in left_out}
