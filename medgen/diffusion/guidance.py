"""Classifier-free guidance around any denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from medgen.types import BadInputError

C = TypeVar("C")


def guide(
    denoise: Callable[[Tensor, Tensor, C], Tensor],
    condition: C,
    null: C,
    *,
    guidance_scale: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind a condition to a denoiser: ``uncond + w (cond - uncond)``.

    The unconditional pass sees ``null`` in place of the whole condition. Scales 1 and 0 need one pass only, and take
    only that one.

    Args:
        denoise: Network output ``(B, C, *spatial)`` for state, times ``(B,)`` and condition.
        condition: What to generate.
        null: The same with everything in it absent.
        guidance_scale: w; 1 is the plain condition, more follows it more strictly.

    Returns:
        A denoiser of state and times.

    Raises:
        BadInputError: If the scale is negative or not finite.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise BadInputError(f"guidance_scale: expected a finite number of 0 or more, got {guidance_scale}.")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1:
            return denoise(x, t, condition)
        if guidance_scale == 0:
            return denoise(x, t, null)
        cond, uncond = denoise(x, t, condition).float(), denoise(x, t, null).float()
        return uncond + guidance_scale * (cond - uncond)

    return guided
