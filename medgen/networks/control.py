"""A control branch: a copy of a denoiser's first half that steers it by one more map while it stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from monai.networks.nets import ControlNet

from medgen.networks.denoiser import (
    EDGE_CHANNELS,
    Denoiser,
    Residuals,
    check_conditions,
    pad_to,
    recompute_blocks,
    tokens_and_vector,
)
from medgen.networks.embeddings import MapEmbedding, VectorEmbedding


class Control(ModelMixin, ConfigMixin):
    """MONAI's ControlNet on a :class:`Denoiser`, in 2D and 3D (Zhang et al. 2023, arXiv:2302.05543).

    It sees the noisy input, the map at full resolution, and words and attributes as its base does. Where a sample has
    no map it adds nothing: the base alone is then what there is, and the unconditional pass needs no training.

    Args:
        condition: ``"mask"`` or ``"edge"``.
        mask_classes: Channels of the one-hot mask of a mask control.
        spatial_dims: As the base.
        in_channels: As the base.
        channels: As the base.
        attention_levels: As the base.
        num_res_blocks: As the base.
        num_head_channels: As the base.
        norm_num_groups: As the base.
        mask_stride: As the base.
        augmentation_flag: As the base.
        text_length: As the base.
        text_width: As the base.
        attributes: As the base.
    """

    @register_to_config
    def __init__(
        self,
        condition: str = "mask",
        mask_classes: int = 0,
        spatial_dims: int = 3,
        in_channels: int = 4,
        channels: Sequence[int] = (64, 128, 128),
        attention_levels: Sequence[bool] = (False, False, True),
        num_res_blocks: int = 2,
        num_head_channels: int = 32,
        norm_num_groups: int = 16,
        mask_stride: int = 1,
        augmentation_flag: bool = False,
        text_length: int = 0,
        text_width: int = 0,
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if condition not in ("mask", "edge"):
            raise ValueError(f"expected a control by 'mask' or 'edge', got {condition!r}")
        features = text_width + sum((attributes or {}).values())
        self.network = ControlNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
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
        # MONAI's own wants the map at 8 times the latents.
        self.network.controlnet_cond_embedding = MapEmbedding(
            spatial_dims, mask_classes if condition == "mask" else EDGE_CHANNELS, channels[0], mask_stride
        )
        if self.network.num_class_embeds:
            self.network.class_embedding = VectorEmbedding(2, features, 4 * channels[0])

    @classmethod
    def of(cls, base: Denoiser, condition: str, *, mask_classes: int = 0) -> Control:
        """A control branch that starts from its base's weights; untrained, it adds nothing.

        Args:
            base: The denoiser to steer.
            condition: ``"mask"`` or ``"edge"``.
            mask_classes: Channels of the one-hot mask of a mask control.

        Returns:
            The branch.
        """
        own = {name: base.config[name] for name in _SHARED}
        control = cls(condition=condition, mask_classes=mask_classes, **own)
        weights = base.network.state_dict()
        # The base may read maps beside the noisy input; those are its own affair.
        weights["conv_in.conv.weight"] = weights["conv_in.conv.weight"][:, : own["in_channels"]]
        known = control.network.state_dict()
        shared = {name: value for name, value in weights.items() if name in known and known[name].shape == value.shape}
        control.network.load_state_dict(shared, strict=False)
        return control

    def checkpoint_blocks(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        recompute_blocks(self.network)

    @property
    def divisor(self) -> int:
        """Input sizes that are multiples of this need no padding."""
        return int(2 ** (len(self.config["channels"]) - 1))

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
            x: ``(B, in_channels, *size)`` noisy image or latents.
            timesteps: ``(B,)`` in [0, num_train_timesteps).
            conditions: Those of the base and its own map, each ``(B, ...)``; maps of others are not looked at.
            augmented: ``(B,)`` bool as for the base.
            conditioning_scale: Factor on what is added; 1 is as trained.

        Returns:
            Residuals for each skip connection and for the middle of the base.

        Raises:
            ValueError: If a condition's size does not fit.
        """
        config: Mapping[str, Any] = self.config
        name = config["condition"]
        whole = tuple(length * config["mask_stride"] for length in x.shape[2:])
        shapes: dict[str, tuple[int, ...]] = {
            name: (config["mask_classes"] if name == "mask" else EDGE_CHANNELS, *whole),
            **({"text": (config["text_length"], config["text_width"])} if config["text_length"] else {}),
            **{key: (count,) for key, count in (config["attributes"] or {}).items()},
        }
        parts = check_conditions(x, shapes, {key: part for key, part in conditions.items() if key in shapes})
        present = parts[name].flatten(1).ne(0).any(dim=1).to(x.dtype) * conditioning_scale
        pad_map = self.divisor * config["mask_stride"]
        text, extra = tokens_and_vector(x, config, parts, augmented)
        down, middle = self.network(
            pad_to(x, self.divisor), timesteps, pad_to(parts[name], pad_map), context=text, class_labels=extra
        )
        factor = present.view(-1, *[1] * (x.ndim - 1))
        # In the number format of the branch: the factor would take the second half of the base to float32.
        down, middle = [(row * factor).to(row.dtype) for row in down], (middle * factor).to(middle.dtype)
        return down, middle


_SHARED = (
    "spatial_dims",
    "in_channels",
    "channels",
    "attention_levels",
    "num_res_blocks",
    "num_head_channels",
    "norm_num_groups",
    "mask_stride",
    "augmentation_flag",
    "text_length",
    "text_width",
    "attributes",
)
