"""Diffusion of binary maps: voxels are flipped until nothing is left, and a network leads back.

With the schedule ``abar`` falling from 1 to 0, a map ``y_0`` becomes ``y_t ~ B(abar_t y_0 + (1 - abar_t) / 2)``, which
ends as coin tosses.

References:
    Chen et al. 2024, arXiv:2407.03548 (HiDiff). Sohl-Dickstein et al. 2015, arXiv:1503.03585 (binomial diffusion).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def keep_schedule(num_train_timesteps: int) -> np.ndarray:
    """Share of a map that is kept, by the cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17).

    Args:
        num_train_timesteps: T.

    Returns:
        ``(T + 1,)`` float64 abar, from 1 to 0.
    """
    angle = (np.arange(num_train_timesteps + 1) / num_train_timesteps + 0.008) / 1.008 * np.pi / 2
    kept = np.cos(angle) ** 2
    kept = (kept - kept[-1]) / (kept[0] - kept[-1])
    return kept


def flip(y0: Tensor, kept: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``y_t``.

    Args:
        y0: ``(B, K, *spatial)`` in {0, 1}.
        kept: ``(B,)`` abar of each.
        generator: Of the draw.

    Returns:
        As ``y0``.
    """
    kept = kept.view(-1, *[1] * (y0.ndim - 1)).to(y0)
    chance = kept * y0 + (1 - kept) / 2
    return (torch.rand(y0.shape, generator=generator, device=y0.device) < chance).to(y0.dtype)


def posterior(y_t: Tensor, p0: Tensor, kept: float, kept_before: float) -> Tensor:
    """Chance that ``y_s`` is 1 for an earlier time s, where ``y_0`` is 1 with the chance ``p0``.

    ``q(y_s | y_t, y_0)`` is the normalized product of ``B(a y_t + (1 - a) / 2)`` with ``a = abar_t / abar_s`` and of
    ``B(abar_s y_0 + (1 - abar_s) / 2)``; over the two values of ``y_0`` it is the mean.

    Args:
        y_t: ``(B, K, *spatial)`` in {0, 1}.
        p0: As ``y_t``, in [0, 1].
        kept: abar_t.
        kept_before: abar_s, more than that.

    Returns:
        As ``y_t``, in [0, 1].
    """
    step = kept / kept_before
    one = step * y_t + (1 - step) / 2  # chance of y_t given y_s = 1
    zero = 1 - one

    def given(y0: float) -> Tensor:
        before = kept_before * y0 + (1 - kept_before) / 2
        return one * before / (one * before + zero * (1 - before))

    return p0 * given(1.0) + (1 - p0) * given(0.0)


@torch.no_grad()
def sample_map(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    kept: np.ndarray,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lead coin tosses back to a map.

    Args:
        predict: Chance that ``y_0`` is 1, ``(B, K, *spatial)``, for ``y_t`` and times ``(B,)``.
        shape: ``(B, K, *spatial)``.
        kept: abar of :func:`keep_schedule`.
        num_inference_steps: Steps, even in time.
        generator: Of all draws, on the CPU.

    Returns:
        Chances of the last step, ``(B, K, *spatial)``.
    """
    times = np.linspace(len(kept) - 1, 0, num_inference_steps + 1).round().astype(int)
    y = (torch.rand(shape, generator=generator) < 0.5).float()
    p0 = torch.full(shape, 0.5)
    for now, before in pairwise(times):
        p0 = predict(y, torch.full((shape[0],), float(now)))
        if before > 0:
            chance = posterior(y, p0, float(kept[now]), float(kept[before]))
            y = (torch.rand(shape, generator=generator) < chance).float()
    return p0
