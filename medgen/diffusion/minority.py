"""Guidance towards what a model seldom makes, by the model alone: self-guided minority sampling.

A sample of a dense region survives a round trip: its denoised estimate, noised again and denoised once more, comes back
nearly as it was. One of a sparse region does not. How far it moves therefore measures rarity without a classifier, and
its gradient leads to what is rare.

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

RENOISE = 0.8  # share of the times at which the estimate is denoised again
EVERY = 4  # steps from one gradient to the next


class MinorityGuidance:
    """Adds ``w s^2 g`` to the denoised estimate of a sampler at noise level s, ``g`` the way to rarer samples.

    With the estimate ``x_0(x_t)``, noised again to a fixed time u as ``x_u = alpha_u x_0 + sigma_u e`` and denoised as
    ``x_0(x_u)``, rarity is ``|x_0(x_t) - sg(x_0(x_u))|^2`` (Um and Ye 2024, equation 7; sg stops the gradient), and
    ``g`` its gradient by ``x_t``, scaled to a root mean square of 1 in each sample.

    Three things differ from the paper. The squared error stands for its perceptual distance (LPIPS), which is defined
    on natural pictures and not on latents. The move goes to the estimate, as these samplers are deterministic and have
    no mean to move; its factor falls with the noise as the paper's does. Between two gradients the last
    one is kept instead of none, because a multistep sampler takes a jump of the estimate for a slope. The noise e is
    one draw a sample, kept throughout, so that a sample depends on its own seed only.

    Args:
        scale: w, from 0; about the standard deviations of the latents by which the first estimate moves.
        noise: ``(B, C, *spatial)`` standard normal e, from a stream of its own.
        objective: Of the model.

    Raises:
        BadInputError: If the scale is out of range.
    """

    def __init__(self, scale: float, noise: Tensor, objective: Objective) -> None:
        check_minority(scale)
        self.scale, self.noise, self.objective = scale, noise, objective
        self._direction = torch.zeros_like(noise)

    def __call__(self, predict_x0: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, step: int) -> Tensor:
        """Denoised estimate, moved towards rarer samples.

        Args:
            predict_x0: Denoised estimate ``(B, C, *spatial)`` of state and times, differentiable by the state.
            x: ``(B, C, *spatial)`` state x_t.
            t: ``(B,)`` times, all equal.
            step: Number of the sampler's step, from 0; every fourth takes a new gradient.

        Returns:
            ``(B, C, *spatial)`` float32.

        Raises:
            RuntimeError: If it runs under ``torch.inference_mode``, which leaves no gradients.
        """
        if step % EVERY:
            x0 = predict_x0(x, t)
        else:
            x0, self._direction = self._ascend(predict_x0, x, t)
        level = self.objective.noise_level(t).view(-1, *[1] * (x.ndim - 1))
        return x0 + self.scale * level.square() * self._direction

    def _ascend(self, predict_x0: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate, and the gradient of its rarity at a root mean square of 1."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("minority_scale: expected gradients, got torch.inference_mode. Use torch.no_grad.")
        u = torch.full_like(t, RENOISE * self.objective.num_train_timesteps)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = predict_x0(x, t)
            with torch.no_grad():
                again = predict_x0(self.objective.add_noise(x0, self.noise, u), u)
            gradient = torch.autograd.grad((x0 - again).square().sum(), x)[0]
        size = gradient.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()
        return x0.detach(), gradient / size.clamp(min=torch.finfo(size.dtype).tiny)


def check_minority(scale: float) -> None:
    """Refuse a strength that cannot be.

    Args:
        scale: w of the guidance towards rare samples.

    Raises:
        BadInputError: If it is out of range.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise BadInputError(f"minority_scale: expected a finite number of 0 or more, got {scale}. 0 is off.")
