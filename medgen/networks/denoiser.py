"""The denoiser: a U-Net over images or latents, steered by any of several conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import gcd, prod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, SpatialTransformer, WrappedUpsample
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from medgen.networks.embeddings import MapEmbedding, VectorEmbedding

# Up to so many tokens plain matrix products train faster than torch's fused attention in bfloat16 on a CPU, whose
# backward pass is slow: 6 instead of 12 ms for 64 tokens. It is the faster one in float32 and without gradients.
PLAIN_ATTENTION_TOKENS = 192
EDGE_CHANNELS = 2  # strength and presence
Residuals = tuple[list[torch.Tensor], torch.Tensor]


class Denoiser(ModelMixin, ConfigMixin):
    """MONAI's diffusion U-Net with conditions, for any size: it pads to its divisor and crops back.

    Maps (mask, edges) are embedded and concatenated to the input, words attended to, and attributes added to the
    embedding of the time, together with the mean of the words. Nothing that reads a condition has a bias, so that
    zeros are the same as none.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the noisy input and of the output.
        channels: Feature channels per level.
        attention_levels: Which levels attend.
        num_res_blocks: Residual blocks per level.
        num_head_channels: Channels of one attention head.
        norm_num_groups: Most groups of a norm; the greatest that also divides every entry of ``channels`` is taken.
        mask_classes: Channels of the one-hot mask; 0 builds a denoiser without a mask.
        mask_channels: Feature channels of each embedded map.
        mask_stride: Map voxels per input voxel along an axis (the autoencoder's compression; 1 in pixel space).
        augmentation_flag: Whether it is told which training samples were augmented, so that what augmentation does to
            a scan (interpolation smooths its noise) is learned apart and left out at synthesis (Karras et al. 2022,
            arXiv:2206.00364, appendix F.2).
        edges: Whether it reads edge maps.
        text_length: Words that it attends to; 0 builds a denoiser without text.
        text_width: Features of each word.
        attributes: Features of each attribute, by name.
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
        edges: bool = False,
        text_length: int = 0,
        text_width: int = 0,
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.recomputes = False
        embedded = {"mask": mask_classes, "edge": EDGE_CHANNELS if edges else 0}
        for name, count in embedded.items():
            embedding = MapEmbedding(spatial_dims, count, mask_channels, mask_stride) if count else None
            setattr(self, f"{name}_embedding", embedding)
        features = text_width + sum((attributes or {}).values())
        self.network = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels + mask_channels * sum(count > 0 for count in embedded.values()),
            out_channels=in_channels,
            channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            num_res_blocks=num_res_blocks,
            num_head_channels=num_head_channels,
            norm_num_groups=gcd(norm_num_groups, *channels),
            use_flash_attention=True,
            num_class_embeds=2 if augmentation_flag or features else None,
            with_conditioning=bool(text_length),
            cross_attention_dim=text_width if text_length else None,
        )
        if self.network.num_class_embeds:
            self.network.class_embedding = VectorEmbedding(2, features, 4 * channels[0])

    def checkpoint_blocks(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; MONAI's blocks have no switch for it."""
        self.recomputes = True
        recompute_blocks(self.network)

    @property
    def divisor(self) -> int:
        """Input sizes that are multiples of this need no padding."""
        return int(2 ** (len(self.config["channels"]) - 1))

    def condition_shapes(self, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shape of one sample of every condition that it reads.

        Args:
            size: Of the input, per axis.

        Returns:
            Shapes by name, without the batch.
        """
        config = self.config
        whole = tuple(length * config["mask_stride"] for length in size)
        shapes: dict[str, tuple[int, ...]] = {}
        if config["mask_classes"]:
            shapes["mask"] = (config["mask_classes"], *whole)
        if config["edges"]:
            shapes["edge"] = (EDGE_CHANNELS, *whole)
        if config["text_length"]:
            shapes["text"] = (config["text_length"], config["text_width"])
        return shapes | {name: (count,) for name, count in sorted((config["attributes"] or {}).items())}

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
            x: ``(B, in_channels, *size)`` noisy image or latents.
            timesteps: ``(B,)`` in [0, num_train_timesteps).
            conditions: Any of those of :meth:`condition_shapes`, each ``(B, ...)``, a row of zeros where a sample has
                none: ``mask`` one-hot and ``edge`` on the full-resolution grid, ``text`` embedded words, attributes.
            augmented: ``(B,)`` bool, which samples are augmented versions of a scan; None for scans as acquired. Only
                a denoiser with ``augmentation_flag`` listens to it.
            residuals: What control branches add, as they return it.

        Returns:
            ``(B, in_channels, *size)``.

        Raises:
            ValueError: If a condition is given that it does not read, or its size does not fit.
        """
        size = x.shape[2:]
        parts = check_conditions(x, self.condition_shapes(size), conditions or {})
        maps = [parts[name] for name in ("mask", "edge") if name in parts]
        embeddings = [module for module in (self.mask_embedding, self.edge_embedding) if module is not None]
        if maps:
            found = [module(part).to(x.dtype) for module, part in zip(embeddings, maps, strict=True)]
            x = torch.cat([x, *found], dim=1)
        x = pad_to(x, self.divisor)
        text, extra = tokens_and_vector(x, self.config, parts, augmented)
        arguments: dict[str, Any] = {}
        if residuals:
            arguments["down_block_additional_residuals"] = [
                sum(rows) for rows in zip(*(r[0] for r in residuals), strict=True)
            ]
            arguments["mid_block_additional_residual"] = sum(mid for _, mid in residuals)
        with self._attention(x):
            out = self.network(x, timesteps, context=text, class_labels=extra, **arguments)
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


_BLOCKS = (DiffusionUNetResnetBlock, SpatialAttentionBlock, SpatialTransformer, WrappedUpsample, MapEmbedding)


def recompute_blocks(network: nn.Module) -> None:
    """Recompute the activations of a U-Net's blocks in the backward pass instead of keeping them.

    Args:
        network: Of MONAI.
    """
    for module in network.modules():
        if isinstance(module, _BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def check_conditions(
    x: torch.Tensor, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every condition that a network reads, zeros where absent, in the number format of the input.

    Args:
        x: ``(B, ...)`` input of the network.
        shapes: Of one sample of each condition.
        given: Conditions by name.

    Returns:
        ``(B, *shape)`` each.

    Raises:
        ValueError: If one is given that the network does not read, or its shape does not fit.
    """
    unknown = sorted(set(given) - set(shapes))
    if unknown:
        raise ValueError(
            f"expected conditions among {', '.join(shapes) or 'none'}, got {', '.join(unknown)}, which this network "
            "does not read"
        )
    parts = {}
    for name, shape in shapes.items():
        part = given[name] if name in given else x.new_zeros((len(x), *shape))
        if tuple(part.shape) != (len(x), *shape):
            raise ValueError(f"expected a condition {name!r} of shape {(len(x), *shape)}, got {tuple(part.shape)}")
        parts[name] = part.to(x.dtype)
    return parts


def tokens_and_vector(
    x: torch.Tensor, config: Mapping[str, Any], parts: Mapping[str, torch.Tensor], augmented: torch.Tensor | None
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor | None] | None]:
    """Words to attend to, and what is added to the time's embedding.

    Args:
        x: ``(B, ...)`` input of the network.
        config: Of the denoiser.
        parts: As :func:`check_conditions` gives them.
        augmented: ``(B,)`` bool, or None for scans as acquired.

    Returns:
        Arguments ``context`` and ``class_labels`` of the U-Net; None where it was built without.
    """
    # By name: a configuration does not keep their order when it is saved.
    vectors = [parts[name] for name in sorted(config["attributes"] or {})]
    text = parts.get("text")
    if text is not None:
        words = text.abs().sum(dim=2).gt(0).sum(dim=1, keepdim=True).clamp(min=1)
        vectors.append(text.sum(dim=1) / words)
    if not (config["augmentation_flag"] or vectors):
        return text, None
    flags = x.new_zeros(len(x), dtype=torch.long) if augmented is None else augmented.long()
    return text, (flags, torch.cat(vectors, dim=1) if vectors else None)


def pad_to(x: torch.Tensor, divisor: int) -> torch.Tensor:
    """Repeat the far borders up to sizes that the levels can halve.

    Args:
        x: ``(B, C, *size)``.
        divisor: What each size is to be a multiple of.

    Returns:
        ``(B, C, *padded)``.
    """
    pad = [amount for length in reversed(x.shape[2:]) for amount in (0, -length % divisor)]
    return F.pad(x, pad, mode="replicate") if any(pad) else x
