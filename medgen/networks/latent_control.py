"""ControlNets of diffusers behind the call of medgen's control branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from medgen.networks.denoiser import EDGE_CHANNELS, Residuals, check_conditions, pad_to
from medgen.networks.latent_base import LatentBaseDenoiser, plain_config, with_empty_text


class LatentBaseControl(ModelMixin, ConfigMixin):
    """A ControlNet of diffusers (Zhang et al. 2023, arXiv:2302.05543), called as medgen's control branch.

    Where a sample has no map it adds nothing. The strength of edges is repeated to the channels that it reads; another
    map is read as it is and has as many.

    Args:
        settings: Configuration of the ControlNet in diffusers, without what the other arguments say.
        condition: Name of the map.
        spatial_dims: 2; there is no other.
        in_channels: Latent channels.
        map_channels: Channels that it reads of a map.
        text_length: Tokens of a text.
        text_width: Features of each token.
    """

    @register_to_config
    def __init__(
        self,
        *,
        settings: Mapping[str, Any],
        condition: str = "edge",
        spatial_dims: int = 2,
        in_channels: int = 4,
        map_channels: int = 3,
        text_length: int = 77,
        text_width: int = 768,
    ) -> None:
        super().__init__()
        own = {"in_channels": in_channels, "conditioning_channels": map_channels, "cross_attention_dim": text_width}
        self.controlnet = ControlNetModel.from_config({**settings, **own})
        self.empty_text: torch.Tensor
        self.register_buffer("empty_text", torch.zeros(text_length, text_width))

    @classmethod
    def around(cls, controlnet: ControlNetModel, base: LatentBaseDenoiser, condition: str) -> LatentBaseControl:
        """Take over a ControlNet that fits the base; its weights are shared, not copied.

        Args:
            controlnet: A ControlNet of diffusers.
            base: What it steers.
            condition: Name of the map.

        Returns:
            The branch.
        """
        settings = plain_config(controlnet.config, "in_channels", "conditioning_channels", "cross_attention_dim")
        shared = {name: base.config[name] for name in ("in_channels", "text_length", "text_width")}
        map_channels = controlnet.config["conditioning_channels"]
        with torch.device("meta"):
            network = cls(settings=settings, condition=condition, map_channels=map_channels, **shared)
        network.controlnet = controlnet
        network.empty_text = base.empty_text.clone()
        return network

    @classmethod
    def of(cls, base: LatentBaseDenoiser, condition: str, *, mask_classes: int = 0) -> LatentBaseControl:
        """A control branch that starts from its base's weights; untrained, it adds nothing.

        Args:
            base: The denoiser to steer, without LoRA layers.
            condition: ``"mask"`` or ``"edge"``.
            mask_classes: Channels of the one-hot mask of a mask control.

        Returns:
            The branch.

        Raises:
            ValueError: If the condition is another.
        """
        if condition not in ("mask", "edge"):
            raise ValueError(f"expected a control by 'mask' or 'edge', got {condition!r}")
        halvings = int(log2(base.config["mask_stride"]))
        features = (16, 32, 96, *[256] * halvings)[: halvings + 1]  # as diffusers has them for three halvings
        channels = mask_classes if condition == "mask" else 3
        controlnet = ControlNetModel.from_unet(
            base.unet, conditioning_embedding_out_channels=features, conditioning_channels=channels
        )
        return cls.around(controlnet, base, condition)

    @property
    def mask_stride(self) -> int:
        """Map voxels per latent voxel along an axis."""
        return int(2 ** (len(self.controlnet.config["conditioning_embedding_out_channels"]) - 1))

    def checkpoint_blocks(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.controlnet.enable_gradient_checkpointing()

    @property
    def divisor(self) -> int:
        """Input sizes that are multiples of this need no padding."""
        return int(2 ** (len(self.controlnet.config["block_out_channels"]) - 1))

    def condition_shapes(self, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shape of one sample of every condition that it reads.

        Args:
            size: Of the latents, per axis.

        Returns:
            That of its map and of ``text``, without the batch.
        """
        name = self.config["condition"]
        channels = EDGE_CHANNELS if name == "edge" else self.config["map_channels"]
        return {name: (channels, *(length * self.mask_stride for length in size)), "text": tuple(self.empty_text.shape)}

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        augmented: torch.Tensor | None = None,
        conditioning_scale: float = 1.0,
    ) -> Residuals:
        """What it adds to its base.

        Args:
            x: ``(B, in_channels, h, w)`` noisy latents.
            timesteps: ``(B,)`` in [0, num_train_timesteps).
            conditions: Its map ``(B, K, H, W)`` in [0, 1] and ``text``; others are not looked at.
            augmented: Not listened to, as by the base.
            conditioning_scale: Factor on what is added; 1 is as trained.

        Returns:
            Residuals for each skip connection and for the middle of the base.

        Raises:
            ValueError: If a condition's size does not fit.
        """
        shapes, name = self.condition_shapes(x.shape[2:]), self.config["condition"]
        parts = check_conditions(x, shapes, {key: part for key, part in conditions.items() if key in shapes})
        factor = conditioning_scale * parts[name].flatten(1).ne(0).any(dim=1).to(x.dtype).view(-1, 1, 1, 1)
        image = parts[name]
        if name == "edge":
            image = image[:, :1].expand(-1, self.config["map_channels"], -1, -1)
        down, middle = self.controlnet(
            pad_to(x, self.divisor),
            timesteps,
            with_empty_text(parts["text"], self.empty_text),
            pad_to(image, self.divisor * self.mask_stride),
            return_dict=False,
        )
        # In the number format of the branch: the factor would take the second half of the base to float32.
        return [(row * factor).to(row.dtype) for row in down], (middle * factor).to(middle.dtype)
