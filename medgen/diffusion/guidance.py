"""Classifier-free guidance around any denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from medgen.types import BadInputError

C = TypeVar("C")


def guide(
    denoise: Callable[[Tensor, Tensor, C], Tensor],
    condition: C,
    null: C,
    *,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind a condition to a denoiser: ``uncond + w (cond - uncond)``.

    The unconditional pass sees ``null`` in place of the whole condition. Scales 1 and 0 need one pass only, and take
    only that one.

    Args:
        denoise: Network output ``(B, C, *spatial)`` for state, times ``(B,)`` and condition.
        condition: What to generate.
        null: The same with everything in it absent.
        guidance_scale: w; 1 is the plain condition, more follows it more strictly.
        interval: Times ``(low, high)`` between which guidance acts, ends included; elsewhere w is 1
            (Kynkäänniemi et al. 2024). None means everywhere.
        rescale: Share in [0, 1] of the guided output that is brought back to the standard deviation, per sample, of
            the conditional one (Lin et al. 2024, eq. 15-16); against over-exposure at a high scale.

    Returns:
        A denoiser of state and times.

    Raises:
        BadInputError: If the scale or ``rescale`` is out of its range, or ``interval`` is empty.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise BadInputError(f"guidance_scale: expected a finite number of 0 or more, got {guidance_scale}.")
    if not 0 <= rescale <= 1:
        raise BadInputError(f"rescale: expected a share from 0 to 1, got {rescale}.")
    if interval is not None and not interval[0] <= interval[1]:
        raise BadInputError(f"interval: expected (low, high) with low <= high, got {interval}.")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        active = torch.ones_like(t, dtype=torch.bool)
        if interval is not None:
            active = (t >= interval[0]) & (t <= interval[1])
        if guidance_scale == 1 or (interval is not None and not active.any()):
            return denoise(x, t, condition)
        if guidance_scale == 0 and interval is None:
            return denoise(x, t, null)
        cond, uncond = denoise(x, t, condition).float(), denoise(x, t, null).float()
        output = uncond + guidance_scale * (cond - uncond)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = cond.std(axes, keepdim=True) / output.std(axes, keepdim=True).clamp(min=1e-12)
            output = torch.lerp(output, output * ratio, rescale)
        return torch.where(active.view(-1, *[1] * (x.ndim - 1)), output, cond)

    return guided
