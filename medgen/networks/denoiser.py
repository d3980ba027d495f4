"""The denoiser: a U-Net over images or latents, steered by a label map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import gcd, prod

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# Up to so many tokens plain matrix products train faster than torch's fused attention in bfloat16 on a CPU, whose
# backward pass is slow: 6 instead of 12 ms for 64 tokens. It is the faster one in float32 and without gradients.
PLAIN_ATTENTION_TOKENS = 192


class MaskEmbedding(nn.Module):
    """Full-resolution label map to features on the denoiser's grid, without losing a voxel.

    A convolution whose kernel and stride are the compression sees every voxel of the map, where nearest-neighbor
    down-sampling would keep one in ``stride ** spatial_dims``. It has no bias, so an absent (zero) map gives zeros.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the one-hot map.
        out_channels: Feature channels.
        stride: Map voxels per denoiser voxel along an axis.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.patch = conv(in_channels, out_channels, kernel_size=stride, stride=stride, bias=False)
        self.mix = conv(out_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """Embed ``mask (B, K, *spatial)``, one-hot float, to ``(B, out_channels, *spatial / stride)``."""
        return self.mix(F.silu(self.patch(mask)))


class Denoiser(ModelMixin, ConfigMixin):
    """MONAI's diffusion U-Net with a mask input, for any size: it pads to its divisor and crops back.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the noisy input and of the output.
        channels: Feature channels per level.
        attention_levels: Which levels attend.
        num_res_blocks: Residual blocks per level.
        num_head_channels: Channels of one attention head.
        norm_num_groups: Most groups of a norm; the greatest that also divides every entry of ``channels`` is taken.
        mask_classes: Channels of the one-hot mask; 0 builds a denoiser without a mask.
        mask_channels: Feature channels of the embedded mask.
        mask_stride: Mask voxels per input voxel along an axis (the autoencoder's compression; 1 in pixel space).
        augmentation_flag: Whether it is told which training samples were augmented, so that what augmentation does to
            a scan (interpolation smooths its noise) is learned apart and left out at synthesis (Karras et al. 2022,
            arXiv:2206.00364, appendix F.2).
    """

    @register_to_config
    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 4,
        channels: Sequence[int] = (64, 128, 128),
        attention_levels: Sequence[bool] = (False, False, True),
        num_res_blocks: int = 2,
        num_head_channels: int = 32,
        norm_num_groups: int = 16,
        mask_classes: int = 0,
        mask_channels: int = 32,
        mask_stride: int = 1,
        augmentation_flag: bool = False,
    ) -> None:
        super().__init__()
        self.recomputes = False
        self.mask_embedding = (
            MaskEmbedding(spatial_dims, mask_classes, mask_channels, mask_stride) if mask_classes else None
        )
        self.network = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels + (mask_channels if mask_classes else 0),
            out_channels=in_channels,
            channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            num_res_blocks=num_res_blocks,
            num_head_channels=num_head_channels,
            norm_num_groups=gcd(norm_num_groups, *channels),
            use_flash_attention=True,
            num_class_embeds=2 if augmentation_flag else None,
        )

    def checkpoint_blocks(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; MONAI's blocks have no switch for it."""
        self.recomputes = True
        for module in self.network.modules():
            if isinstance(module, (DiffusionUNetResnetBlock, SpatialAttentionBlock)):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]

    @property
    def divisor(self) -> int:
        """Input sizes that are multiples of this need no padding."""
        return int(2 ** (len(self.config["channels"]) - 1))

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
        augmented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoiser output in the objective's parametrization.

        Args:
            x: ``(B, in_channels, *size)`` noisy image or latents.
            timesteps: ``(B,)`` in [0, num_train_timesteps).
            mask: ``(B, mask_classes, *size * mask_stride)`` one-hot float, a row of zeros where absent; None drops it
                for the whole batch.
            augmented: ``(B,)`` bool, which samples are augmented versions of a scan; None for scans as acquired. Only
                a denoiser with ``augmentation_flag`` listens to it.

        Returns:
            ``(B, in_channels, *size)``.

        Raises:
            ValueError: If a mask is given to a denoiser without one, or its size does not fit.
        """
        size, stride = x.shape[2:], self.config["mask_stride"]
        if self.mask_embedding is None:
            if mask is not None:
                raise ValueError("expected no mask: this denoiser was built with mask_classes=0")
        else:
            expected = (x.shape[0], self.config["mask_classes"], *(length * stride for length in size))
            if mask is None:
                mask = x.new_zeros(expected)
            if tuple(mask.shape) != expected:
                raise ValueError(f"expected a mask of shape {expected}, got {tuple(mask.shape)}")
            x = torch.cat([x, self.mask_embedding(mask.to(x.dtype)).to(x.dtype)], dim=1)
        # Sizes that the levels cannot halve are padded here and cropped below.
        pad = [amount for length in reversed(size) for amount in (0, -length % self.divisor)]
        if any(pad):
            x = F.pad(x, pad, mode="replicate")
        flags = None
        if self.config["augmentation_flag"]:
            flags = x.new_zeros(x.shape[0], dtype=torch.long) if augmented is None else augmented.long()
        with self._attention(x):
            out = self.network(x, timesteps, class_labels=flags)
        return out[(..., *(slice(length) for length in size))]

    def _attention(self, x: torch.Tensor) -> AbstractContextManager[object]:
        """Context with the faster of torch's attentions; which one depends on the sizes, never on the batch."""
        levels = self.config["attention_levels"]
        # A recomputed block runs again outside this context, where it has to take the same path.
        if True not in levels or x.device.type != "cpu" or self.recomputes:
            return nullcontext()
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return nullcontext()
        tokens = prod(length // 2 ** levels.index(True) for length in x.shape[2:])
        return sdpa_kernel(SDPBackend.MATH) if tokens <= PLAIN_ATTENTION_TOKENS else nullcontext()
