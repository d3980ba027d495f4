"""Deterministic samplers of the probability-flow ODE, the same few lines for flow and VP models.

A state ``x = alpha x_0 + sigma noise`` over ``alpha + sigma`` is ``z = (1 - s) x_0 + s noise``. DDIM, DPM-Solver++ and
UniPC are exact up to the change of the data prediction D over ``lambda = log(alpha / sigma)``, which this scaling
leaves as it is; so each runs on ``z`` as a weighted mean of state and D. Since s is finite from clean (0) to pure noise
(1), the first step may start at zero signal and the last may end at zero noise.

References:
    Song et al. 2021, arXiv:2010.02502 (DDIM). Karras et al. 2022, arXiv:2206.00364 (Heun, spacing).
    Lu et al. 2022, arXiv:2211.01095 (DPM-Solver++). Zhao et al. 2023, arXiv:2302.04867 (UniPC).
    Meng et al. 2022, arXiv:2108.01073 (from an image). Lugmayr et al. 2022, arXiv:2201.09865 (known regions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from medgen.diffusion.minority import MinorityGuidance
from medgen.diffusion.objective import Objective, vp_noise_levels
from medgen.types import BadInputError

# Ends of the Karras and Lu spacings, as sigma / alpha. The first step always is at the model's own highest noise, so
# the upper end only says how densely the others follow it; a VP schedule may end earlier on either side.
RATIO_MIN, RATIO_MAX = 0.02, 20.0
SPACINGS = ("lu", "karras", "uniform")


def sampler_names(objective: Objective) -> tuple[str, ...]:
    """Samplers offered for an objective; the first-order one goes by the name that its field uses.

    Args:
        objective: Of the model.

    Returns:
        Names for :func:`sample`.
    """
    return tuple(name for name in SAMPLERS if name != ("ddim" if objective.is_flow else "euler"))


def time_grid(
    objective: Objective, num_inference_steps: int, *, spacing: str = "lu", strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels that a sampler walks through and the times at which it asks the network.

    Args:
        objective: Of the model.
        num_inference_steps: Number of steps, n.
        spacing: ``lu`` (even in lambda), ``karras`` (rho = 7) or ``uniform`` (even in t; for VP models whole numbers
            that start at the last, known as trailing).
        strength: Share in (0, 1] of the times that is walked through, all n steps within it; for VP models it is
            rounded to whole times.

    Returns:
        Noise levels, ``(n + 1,)`` float64, falling from that of the strength, the model's highest at 1, to 0; and
        times, ``(n,)`` float64.

    Raises:
        BadInputError: If the spacing is unknown or the share of the objective has fewer steps.
    """
    n, total = num_inference_steps, objective.num_train_timesteps
    span = max(1, round(strength * total))
    if spacing not in SPACINGS:
        raise BadInputError(f"spacing: expected 'default' or one of {SPACINGS}, got {spacing!r}.")
    if not 1 <= n <= span:
        part = "" if strength == 1 else f" at strength {strength:g}"
        raise BadInputError(f"num_inference_steps: expected 1 to {span}, the steps of this model{part}, got {n}.")
    table = np.linspace(0, 1, total + 1) if objective.is_flow else vp_noise_levels(objective)
    top = strength if objective.is_flow else table[span - 1]
    if spacing == "uniform":
        s = 1 - np.arange(n) / n
        s = s * top if objective.is_flow else table[np.round(s * span).astype(int) - 1]
    else:
        inner = table[(table > 0) & (table < 1)]
        highest = min(top, inner[-1])
        high = min(RATIO_MAX, highest / (1 - highest))
        # A low strength may begin below the usual end.
        low = min(RATIO_MIN, high / 10)
        low = low if objective.is_flow else max(low, inner[0] / (1 - inner[0]))
        ramp = np.linspace(0, 1, n)
        if spacing == "karras":  # Karras et al. 2022, eq. 5
            ratio = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        else:
            ratio = high * (low / high) ** ramp
        s = ratio / (1 + ratio)
        s[0] = top
    t = np.interp(s, table, np.arange(len(table)))
    return np.append(s, 0.0), t


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    objective: Objective,
    sampler: str = "dpm++2m",
    spacing: str = "default",
    num_inference_steps: int = 20,
    temperature: float = 1.0,
    start: Tensor | None = None,
    strength: float = 1.0,
    region: Tensor | None = None,
    minority: MinorityGuidance | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Turn noise into samples; every row depends on its own noise only.

    From a ``start`` the first state is ``z = (1 - s) start + s noise`` at the noise level s of the strength (SDEdit,
    Meng et al. 2022, section 3.2). Outside a ``region`` every state is ``(1 - s) start + s noise`` with that same noise
    (RePaint, Lugmayr et al. 2022, equation 8, without resampling): the data prediction there is the start itself, which
    every sampler takes along this line, multistep ones included.

    Args:
        denoise: Network output for a state ``(B, C, *spatial)`` and times ``(B,)``, all float32; may return any float
            type. One call a step; ``heun`` makes two, except in the last step.
        noise: ``(B, C, *spatial)`` standard normal.
        objective: What the network was trained for.
        sampler: ``ddim`` (VP) or ``euler`` (flow), the same first-order step; ``dpm++2m``, ``unipc``, ``heun``.
        spacing: As for :func:`time_grid`; ``default`` is ``lu``.
        num_inference_steps: Number of steps; second-order samplers need about 20, first-order ones about 100.
        temperature: Factor on the noise that sampling starts from (Kingma & Dhariwal 2018, arXiv:1807.03039). Below 1
            it takes back noise that a network short of training leaves in smooth regions; samples of one condition
            then differ less.
        start: Clean sample to start from, as ``noise``; None starts from noise alone.
        strength: Share in [0, 1] of the noise process that is run, in times, all steps within it: 1 keeps nothing of
            the start but what a model without zero terminal SNR sees of it, 0 gives the start back.
        region: ``(B, 1, *spatial)`` bool, where the start may change; None is everywhere.
        minority: Moves each estimate towards rarer samples; None leaves it. One more call of ``denoise`` at every
            fourth step, and its gradient.
        callback: Called after each step with its index from 0 and the state ``z``; the last is the result.

    Returns:
        ``x_0``, as ``noise``, float32.

    Raises:
        BadInputError: If sampler, spacing or number of steps is not offered for the objective, or the temperature is
            not a positive number; or the strength is out of range, or less than 1 without a start.
        ValueError: If start or region do not have the shape of the noise, or there is a region without a start.
    """
    if sampler not in sampler_names(objective):
        raise BadInputError(
            f"sampler: expected one of {sampler_names(objective)} for {objective.prediction}, got {sampler!r}."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise BadInputError(f"temperature: expected a finite number above 0, got {temperature}. 1 is as trained.")
    _check_start(noise, start, strength, region)
    if start is not None and strength == 0:
        return start.float().clone()
    spacing = "lu" if spacing == "default" else spacing
    s, t = time_grid(objective, num_inference_steps, spacing=spacing, strength=strength)
    scale = np.ones_like(s) if objective.is_flow else np.hypot(1 - s, s)  # z = scale x

    def estimate(x: Tensor, times: Tensor) -> Tensor:
        return objective.predict_x0(denoise(x, times).float(), x, times)

    def predict_x0(z: Tensor, i: int) -> Tensor:
        x = z / float(scale[i])
        times = torch.full((len(x),), float(t[i]), dtype=torch.float32, device=x.device)
        x0 = estimate(x, times) if minority is None else minority(estimate, x, times, i)
        return x0 if start is None or region is None else torch.where(region, x0, start.float())

    if start is None:
        first = noise.float() * (temperature * float(scale[0]))
    else:
        first = torch.lerp(start.float(), noise.float() * temperature, float(s[0]))
    for i, z in enumerate(SAMPLERS[sampler](predict_x0, first, s)):
        if callback is not None:
            callback(i, z)
    return z


def _check_start(noise: Tensor, start: Tensor | None, strength: float, region: Tensor | None) -> None:
    if not 0 <= strength <= 1:
        raise BadInputError(f"strength: expected a share in [0, 1], got {strength}. 1 runs all of the noise process.")
    if start is None:
        if strength != 1:
            raise BadInputError(f"strength: expected 1 without a start, got {strength}. Give what to start from.")
        if region is not None:
            raise ValueError("region: expected a start beside it, got none")
        return
    if start.shape != noise.shape:
        raise ValueError(f"start: expected the shape of the noise {tuple(noise.shape)}, got {tuple(start.shape)}")
    wanted = (len(noise), 1, *noise.shape[2:])
    if region is not None and (tuple(region.shape) != wanted or region.dtype != torch.bool):
        raise ValueError(f"region: expected bool {wanted}, got {region.dtype} {tuple(region.shape)}")


Predictor = Callable[[Tensor, int], Tensor]


def _first_order(predict_x0: Predictor, z: Tensor, s: np.ndarray) -> Iterator[Tensor]:
    """DDIM, eq. 12 with eta = 0, which on ``z`` is the Euler step of flow matching."""
    for i in range(len(s) - 1):
        z = torch.lerp(predict_x0(z, i), z, float(s[i + 1] / s[i]))
        yield z


def _heun(predict_x0: Predictor, z: Tensor, s: np.ndarray) -> Iterator[Tensor]:
    """Karras et al. 2022, algorithm 1, with dz/ds = (z - D) / s."""
    for i in range(len(s) - 1):
        D = predict_x0(z, i)
        z_next = torch.lerp(D, z, float(s[i + 1] / s[i]))
        if s[i + 1] > 0:
            slope, slope_next = (z - D) / float(s[i]), (z_next - predict_x0(z_next, i + 1)) / float(s[i + 1])
            z_next = z + float(s[i + 1] - s[i]) / 2 * (slope + slope_next)
        z = z_next
        yield z


def _multistep(predict_x0: Predictor, z: Tensor, s: np.ndarray, *, corrector: bool) -> Iterator[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2); with the corrector UniPC-2 (Zhao et al. 2023, B_2(h) = e^h - 1).

    Both make the same prediction. D' is the slope of D over lambda, 0 after a step of infinite length.
    """
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(1 - s) - np.log(s))  # infinite where s is 1 before or 0 after the step
    D = slope = linear = torch.zeros_like(z)
    for i in range(len(h)):
        D_last, slope_last, D = D, slope, predict_x0(z, i)
        if i > 0:
            slope = (D - D_last) / float(h[i - 1])
            if corrector:
                near, far = _corrector_weights(h, i - 1)
                change = near * (D - D_last)
                if far:
                    change = change + far * float(h[i - 1]) * slope_last
                z = linear + (1 - float(s[i] / s[i - 1])) * change
        ratio = float(s[i + 1] / s[i])
        linear = torch.lerp(D, z, ratio)
        second_order = 0 < i < len(h) - 1
        z = linear + (1 - ratio) * float(h[i]) / 2 * slope if second_order else linear
        yield z


def _corrector_weights(h: np.ndarray, i: int) -> tuple[float, float]:
    """Weights of UniC for step i: of the change of D over it, and of D' over the step before times h_i."""
    if i == 0:
        return 0.5, 0.0
    inverse = -1 / np.expm1(-h[i])
    b1 = inverse - 1 / h[i]
    b2 = inverse - 2 * b1 / h[i]
    far = (b1 - b2) / (1 + h[i - 1] / h[i])
    return float(b1 - far), float(far)


SAMPLERS: dict[str, Callable[[Predictor, Tensor, np.ndarray], Iterator[Tensor]]] = {
    "ddim": _first_order,
    "euler": _first_order,
    "dpm++2m": partial(_multistep, corrector=False),
    "unipc": partial(_multistep, corrector=True),
    "heun": _heun,
}
