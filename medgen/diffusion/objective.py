"""What the denoiser learns to predict: flow matching, v-prediction or epsilon, in one notation.

Every path is written ``x_t = alpha x_0 + sigma noise``. Up to the factor ``alpha + sigma`` each of them is the straight
line ``z = (1 - s) x_0 + s noise`` of flow matching at the noise level ``s = sigma / (alpha + sigma)``, which is finite
everywhere: 0 is clean, 1 is pure noise. The schedules are therefore kept as ``s``, and the samplers run on ``z``.

References:
    Salimans & Ho 2022, arXiv:2202.00512 (v). Lipman et al. 2023, arXiv:2210.02747 (flow matching).
    Lin et al. 2024, arXiv:2305.08891 (zero terminal SNR). Hang et al. 2023, arXiv:2303.09556 (min-SNR).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from medgen.types import BadInputError

Prediction = Literal["flow", "v_prediction", "epsilon"]
BetaSchedule = Literal["scaled_linear", "squaredcos_cap_v2", "linear"]
TimestepSampling = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Objective:
    """Noising path, prediction target and loss weight; the whole of it is saved with a model.

    The denoiser is called with ``t`` in ``[0, num_train_timesteps]``, as float: flow ``t = s * num_train_timesteps``,
    else the index of a discrete variance-preserving (VP) schedule, which samplers also evaluate between integers.

    Attributes:
        prediction: What the network gives. ``flow``: ``noise - x_0``. ``v_prediction``: ``alpha noise - sigma x_0``.
            ``epsilon``: ``noise``.
        num_train_timesteps: Scale of ``t``, and the length of a VP schedule.
        beta_schedule: VP only: ``scaled_linear`` as in latent diffusion, ``linear`` as in DDPM, ``squaredcos_cap_v2``
            the cosine schedule, not with ``epsilon``.
        zero_terminal_snr: VP only: rescale so that the last step is pure noise; impossible with ``epsilon``.
        min_snr_gamma: VP only: gamma of the min-SNR loss weight; None weighs all ``t`` the same.
        timestep_sampling: How training draws ``t``; ``logit_normal`` prefers the middle (Esser et al. 2024, eq. 19).
    """

    prediction: Prediction = "flow"
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"
    zero_terminal_snr: bool = True
    min_snr_gamma: float | None = 5.0
    timestep_sampling: TimestepSampling = "uniform"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained or sampled."""
        allowed = {"prediction": Prediction, "beta_schedule": BetaSchedule, "timestep_sampling": TimestepSampling}
        for name, values in allowed.items():
            if getattr(self, name) not in get_args(values):
                raise BadInputError(f"{name}: expected one of {get_args(values)}, got {getattr(self, name)!r}.")
        if self.num_train_timesteps < 2:
            raise BadInputError(f"num_train_timesteps: expected 2 or more, got {self.num_train_timesteps}.")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise BadInputError(f"min_snr_gamma: expected a positive number, got {self.min_snr_gamma}.")
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise BadInputError(
                "zero_terminal_snr: expected false with prediction 'epsilon', got true: pure noise tells nothing of "
                "x_0. Set zero_terminal_snr to false, or prediction to 'v_prediction' or 'flow'."
            )
        if self.prediction == "epsilon" and self.beta_schedule == "squaredcos_cap_v2":
            raise BadInputError(
                "beta_schedule: expected 'scaled_linear' or 'linear' with prediction 'epsilon', got "
                "'squaredcos_cap_v2', whose last step is noise 20,000 times the signal: every error of epsilon there "
                "is multiplied by that in x_0. Set prediction to 'v_prediction' or 'flow'."
            )

    @property
    def is_flow(self) -> bool:
        """True for the straight path, whose ``t`` is continuous; else the schedule is a VP table."""
        return self.prediction == "flow"

    def sample_timesteps(self, batch: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the training times of a batch.

        Args:
            batch: Number of samples.
            generator: Source of randomness.

        Returns:
            ``(batch,)`` float32 in ``[0, num_train_timesteps)``, on the generator's device; integers for VP.
        """
        device = generator.device if generator is not None else None
        if self.timestep_sampling == "logit_normal":
            u = torch.randn(batch, generator=generator, device=device).sigmoid()
        else:
            u = torch.rand(batch, generator=generator, device=device)
        # The sigmoid may round to 1, and the product may round up to num_train_timesteps.
        if self.is_flow:
            return u * self.num_train_timesteps
        return (u * self.num_train_timesteps).floor().clamp(max=self.num_train_timesteps - 1)

    def noise_level(self, t: Tensor) -> Tensor:
        """Noise level ``s = sigma / (alpha + sigma)``; between two VP steps by linear interpolation.

        Args:
            t: ``(B,)`` times.

        Returns:
            ``(B,)`` float32 in [0, 1].
        """
        t = t.float()
        if self.is_flow:
            return t / self.num_train_timesteps
        table = torch.from_numpy(vp_noise_levels(self)).to(device=t.device, dtype=torch.float32)
        low = t.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t - low)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise in ``x_t = alpha x_0 + sigma noise``.

        Args:
            t: ``(B,)`` times.

        Returns:
            ``alpha`` and ``sigma``, ``(B,)`` float32; they sum to 1 for flow, their squares do for VP.
        """
        s = self.noise_level(t)
        norm = torch.ones_like(s) if self.is_flow else torch.hypot(1 - s, s)
        return (1 - s) / norm, s / norm

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Go from the clean sample to time ``t``.

        Args:
            x0: ``(B, C, *spatial)`` clean sample.
            noise: Standard normal, as ``x0``.
            t: ``(B,)`` times.

        Returns:
            ``x_t``, as ``x0``.
        """
        alpha, sigma = self._factors(x0, t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for ``add_noise(x0, noise, t)``.

        Args:
            x0: ``(B, C, *spatial)`` clean sample.
            noise: Standard normal, as ``x0``.
            t: ``(B,)`` times.

        Returns:
            The target, as ``x0``.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self._factors(x0, t)
        return alpha * noise - sigma * x0

    def predict_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Clean sample that a network output stands for.

        Args:
            output: ``(B, C, *spatial)`` network output.
            x_t: Noisy sample, as ``output``.
            t: ``(B,)`` times.

        Returns:
            ``x_0``, as ``output`` and at least float32.
        """
        alpha, sigma = self._factors(x_t, t)
        if self.prediction == "flow":
            return x_t - sigma * output
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each sample: min-SNR for VP, 1 for flow.

        For v-prediction it is ``min(SNR + 1, gamma) / (SNR + 1)``. The paper's ``min(SNR, gamma) / (SNR + 1)`` is 0 at
        zero terminal SNR: the very step that sampling starts from would go untrained.

        Args:
            t: ``(B,)`` times.

        Returns:
            ``(B,)`` float32 in (0, 1].
        """
        if self.is_flow or self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = self.alpha_sigma(t)
        scale = (alpha / sigma).square()
        if self.prediction == "v_prediction":
            scale = scale + 1
        return (self.min_snr_gamma / scale).clamp(max=1)

    def _factors(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` on the device of ``x``, shaped to multiply it."""
        alpha, sigma = self.alpha_sigma(t.to(x.device))
        shape = (-1, *[1] * (x.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


@lru_cache(maxsize=16)
def vp_noise_levels(objective: Objective) -> np.ndarray:
    """Table of the noise level ``s`` at the integer times of a VP schedule.

    Args:
        objective: Gives schedule, length and terminal SNR.

    Returns:
        ``(num_train_timesteps,)`` float64, rising; its last value is 1 where the terminal SNR is zero.
    """
    steps = objective.num_train_timesteps
    if objective.beta_schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    elif objective.beta_schedule == "linear":
        betas = np.linspace(0.0001, 0.02, steps)
    else:
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    alpha = np.sqrt(np.cumprod(1 - betas))
    if objective.zero_terminal_snr:  # Lin et al. 2024, algorithm 1: shift the last to 0, keep the first
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    sigma = np.sqrt(1 - alpha**2)
    return sigma / (alpha + sigma)
