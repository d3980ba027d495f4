"""Guidance towards what a model seldom makes, by the model alone: self-guided minority sampling.

A sample of a dense region survives a round trip: its denoised estimate, noised again and denoised once more, comes back
almost as it was. One of a sparse region does not. How far it moves is therefore a measure of rarity that needs no other
network, and its gradient leads there.

Reference:
    Um and Ye 2024, arXiv:2407.11555.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from medgen.diffusion.objective import Objective
from medgen.types import BadInputError

RENOISE = 0.8
EVERY = 4


class MinorityGuidance:
    """Moves the denoised estimate of a sampler up the gradient of its own inconsistency.
    """

    def __init__(self, scale: float, noise: Tensor, objective: Objective, *, every: int = EVERY, renoise: float = RENOISE) -> None:
        self.scale, self.noise, self.objective, self.every = scale, noise, objective, every
        self.time = renoise * (objective.num_train_timesteps - (0 if objective.is_flow else 1))
        self._direction = torch.zeros_like(noise)

    def __call__(self, predict_x0: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, step: int) -> Tensor:
        if step % self.every:
            x0 = predict_x0(x, t)
        else:
            x0, self._direction = self._ascend(predict_x0, x, t)
        sigma = self.objective.alpha_sigma(t)[1].view(-1, *[1] * (x.ndim - 1))
        return x0 + self.scale * sigma.square() * self._direction

    def _ascend(self, predict_x0, x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = predict_x0(x, t)
            with torch.no_grad():
                s = torch.full_like(t, self.time)
                again = predict_x0(self.objective.add_noise(x0, self.noise, s), s)
            moved = (x0 - again).square().sum()
            gradient = torch.autograd.grad(moved, x)[0]
        axes = tuple(range(1, x.ndim))
        size = gradient.square().mean(axes, keepdim=True).sqrt()
        return x0.detach(), gradient / size.clamp(min=1e-12)
