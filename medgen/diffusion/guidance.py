"""Classifier-free guidance around any denoiser, with a scale for each condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from medgen.types import BadInputError

C = TypeVar("C")


class Guided(Generic[C]):
    """A denoiser with its conditions bound: ``e_0 + sum_k w_k (e_k - e_{k-1})``.

    ``e_0`` is the output without any condition, ``e_k`` that with the first k of them. With one scale for all, the sum
    collapses to ``e_0 + w (e_K - e_0)`` (Ho and Salimans 2022, arXiv:2207.12598, equation 6); with several it is that
    of Brooks et al. 2023 (arXiv:2211.09800, equation 3). A pass whose output cancels is not made, so that equal scales
    cost no more than one scale does, and scales of 1 one pass.

    Args:
        denoise: Network output ``(B, C, *spatial)`` for state, times ``(B,)`` and condition.
        chain: No condition, the first one alone, the first two, and so on up to all of them.
        scales: w of each condition, one less than the chain is long; 1 is as trained, more follows it more strictly.
        interval: Guide only at times between these shares of the noise process, 0 the image and 1 pure noise;
            elsewhere all scales are 1 (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        rescale: Share in [0, 1] by which the guided output is brought back to the standard deviation of the output
            with all conditions (Lin et al. 2024, arXiv:2305.08891, equations 15 and 16).
        num_train_timesteps: Times are in [0, this).

    Its ``evaluations`` counts the network passes made so far.

    Raises:
        BadInputError: If a scale, the interval or the rescaling is out of range.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor, C], Tensor],
        chain: Sequence[C],
        scales: Sequence[float],
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        check_guidance(scales, interval, rescale)
        if len(chain) != len(scales) + 1:
            raise ValueError(f"expected one scale for each condition after the first, got {len(scales)} scales")
        self.denoise, self.chain, self.rescale = denoise, tuple(chain), rescale
        self.interval = tuple(share * num_train_timesteps for share in interval)
        # What each output counts in the sum: w_k - w_{k+1}, with w_0 = 1 and nothing after the last.
        self.weights = [left - right for left, right in pairwise([1.0, *scales, 0.0])]
        self.evaluations = 0

    def passes(self, time: float) -> int:
        """Network passes of a step.

        Args:
            time: In [0, num_train_timesteps).

        Returns:
            Their number.
        """
        return len(self._used(time))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Guided output.

        Args:
            x: ``(B, C, *spatial)`` state.
            t: ``(B,)`` times, all equal.

        Returns:
            ``(B, C, *spatial)``; float32 where more than one pass was made.
        """
        used = self._used(float(t[0]))
        outputs = {index: self.denoise(x, t, self.chain[index]) for index in used}
        self.evaluations += len(used)
        if list(used.values()) == [1.0]:
            return next(iter(outputs.values()))
        # The weights add up to 1, so that all but the first can be told by differences from it.
        first, *others = used
        guided = outputs[first].float()
        for index in others:
            guided = guided + used[index] * (outputs[index].float() - outputs[first].float())
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, x.ndim))
        whole = outputs[len(self.chain) - 1].float()
        matched = guided * (whole.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8))
        return torch.lerp(guided, matched, self.rescale)

    def _used(self, time: float) -> dict[int, float]:
        """Weight of each output that counts."""
        last = len(self.chain) - 1
        if not self.interval[0] <= time <= self.interval[1]:
            return {last: 1.0}
        used = {index: weight for index, weight in enumerate(self.weights) if weight != 0}
        if self.rescale and list(used.values()) != [1.0]:
            used.setdefault(last, 0.0)
        return used


def check_guidance(scales: Sequence[float], interval: tuple[float, float], rescale: float) -> None:
    """Refuse guidance that cannot be.

    Args:
        scales: w of each condition.
        interval: Shares of the noise process between which guidance acts.
        rescale: Share of the rescaling.

    Raises:
        BadInputError: If a value is out of range.
    """
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise BadInputError(f"guidance_scale: expected a finite number of 0 or more, got {scale}.")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise BadInputError(
            f"guidance_interval: expected two rising shares of the noise process in [0, 1], got {list(interval)}. "
            "[0, 1] guides every step."
        )
    if not 0 <= rescale <= 1:
        raise BadInputError(f"guidance_rescale: expected a share in [0, 1], got {rescale}. 0 is off.")
