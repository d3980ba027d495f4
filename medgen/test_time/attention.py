"""Where a model that texts steer attends to its words."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medgen.test_time.views import GenerativeViews
from medgen.types import BadInputError


@torch.no_grad()
def attended_region(views: GenerativeViews) -> torch.Tensor:
    """Where the words get more attention than on average, over all heads of all layers that attend to them.

    One row of the denoiser, at the noise level from which views come back.

    Args:
        views: Of a scan, with a text among what steers the model.

    Returns:
        ``(*placement.shape)`` bool on the model's grid.

    Raises:
        BadInputError: If no text steers the model.
    """
    text = views.condition.parts.get("text")
    layers = [module for name, module in views.generator.denoiser.named_modules() if name.rsplit(".", 1)[-1] == "attn2"]
    layers = [layer for layer in layers if hasattr(layer, "to_q") and hasattr(layer, "to_k")]
    if text is None or not layers:
        raise BadInputError(
            "mask: expected a generator that a given text steers for 'attention', got none. Give the text, or take "
            "mask='uncertainty'."
        )
    words = text[0].abs().sum(dim=1) > 0
    if views.generator.config.text_padding:
        words[0] = False  # the start token, to which heads turn that look for nothing
    if bool(words.all()):
        raise BadInputError(
            f"text: expected fewer words than the {len(words)} of the encoder for mask 'attention', which compares "
            "them with the places left over, got as many. Shorten it, or take mask='uncertainty'."
        )
    maps: list[torch.Tensor] = []
    size = views.latents.shape[2:]

    def watch(layer: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("x", kwargs.get("hidden_states"))
            context = next(
                (kwargs[name] for name in ("context", "encoder_hidden_states") if kwargs.get(name) is not None),
                args[1] if len(args) > 1 else None,
            )
            if hidden is None or context is None:
                return
            heads = getattr(layer, "num_heads", None) or layer.heads
            q, k = (
                part(values).unflatten(-1, (heads, -1)).transpose(1, 2).float()
                for part, values in ((layer.to_q, hidden), (layer.to_k, context))
            )
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
            share = weights[..., words].sum(dim=-1).mean(dim=1)[0]
            maps.append(share)

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    views.trajectory()  # before the layers are watched
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(watch(layer).remove)
        views.look()
    total = torch.zeros(size)
    divisor = getattr(views.generator.denoiser, "divisor", 1)
    padded = [-(-length // divisor) * divisor for length in size]
    mode = "trilinear" if len(size) == 3 else "bilinear"
    for share in maps:
        level = _level(padded, len(share))
        grid = share.view(1, 1, *[length // level for length in padded]).cpu()
        whole = F.interpolate(grid, padded, mode=mode)[0, 0]
        total += whole[tuple(slice(length) for length in size)]
    region = total > total.mean()
    for axis in range(region.ndim):
        region = region.repeat_interleave(views.generator.compression, dim=axis)
    return region


def _level(size: list[int], tokens: int) -> int:
    """By which factor a level of a U-Net has fewer voxels per axis."""
    level = 1
    while True:
        count = 1
        for length in size:
            count *= length // level
        if count == tokens:
            return level
        if count < tokens:
            raise ValueError(f"expected a level of {size} with {tokens} voxels, got none")
        level *= 2
