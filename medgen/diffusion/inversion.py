"""The way of a scan into noise, such that the way back gives it again, or a variation of it.

All run on the line ``z = (1 - s) x_0 + s noise`` of the samplers, for flow and VP models alike. With the prediction D
of the data and ``n = (z - (1 - s) D) / s`` of the noise, the probability-flow ODE is ``dz/ds = v = n - D = (z - D) /
s``, which is finite everywhere; a step of DDIM is one of Euler.

References:
    Huberman-Spiegelglas et al. 2024, arXiv:2304.06140 (edit-friendly DDPM).
    Wang et al. 2024, arXiv:2410.07273 (O-BELM). Wallace et al. 2023, arXiv:2211.12446 (EDICT).
    Pan et al. 2023, arXiv:2309.04907 (fixed point).
    Song et al. 2021, arXiv:2010.02502 (DDIM). Lu et al. 2022, arXiv:2211.01095 (DPM-Solver++).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import time_grid
from medgen.types import BadInputError

EXACT = ("edit_friendly", "o_belm", "edict")  # retraced to rounding, in float32
METHODS = (*EXACT, "fixed_point", "ddim", "dpm++")
MIXING = 0.93  # p of EDICT, as published
ITERATIONS = 3  # of the fixed point, for each step

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where a scan has been on its way into noise; the last state is the scan itself.

    Attributes:
        method: One of :data:`METHODS`.
        objective: Of the model.
        levels: ``(n + 1,)`` noise levels, falling to 0.
        times: ``(n,)`` times at which the network is asked, one for each step back.
        states: ``(n + 1, B, C, *spatial)`` float32, z at each level.
        noise: ``(n, B, C, *spatial)`` of ``edit_friendly``: the noise of each step back, and what the last step leaves
            over; None for the others.
        partner: ``(n + 1, B, C, *spatial)`` of ``edict``: the second of its two states; None for the others.
        evaluations: Network rows that it took for each scan.
    """

    method: str
    objective: Objective
    levels: np.ndarray
    times: np.ndarray
    states: Tensor
    noise: Tensor | None = None
    partner: Tensor | None = None
    evaluations: int = 0

    @property
    def clean(self) -> Tensor:
        """``(B, C, *spatial)``, the scan."""
        return self.states[-1]

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Args:
            path: The file.
        """
        tensors = {"states": self.states, "noise": self.noise, "partner": self.partner}
        tensors |= {name: torch.from_numpy(getattr(self, name)) for name in ("levels", "times")}
        facts = {"method": self.method, "objective": asdict(self.objective), "evaluations": self.evaluations}
        kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, path, metadata={"trajectory": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Trajectory:
        """Read what :meth:`save` has written.

        Args:
            path: The file.
            device: Where the states go.

        Returns:
            The trajectory.

        Raises:
            BadInputError: If it is no such file.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = json.loads((file.metadata() or {})["trajectory"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            grids = {name: tensors.pop(name).cpu().numpy() for name in ("levels", "times")}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise BadInputError(
                f"{path}: expected a saved trajectory, got {error!r}. Invert the scan again."
            ) from error
        return cls(objective=Objective(**facts.pop("objective")), **facts, **grids, **tensors)


@dataclass
class _Network:
    """Predictions of a denoiser on the line z, and how many rows it has seen."""

    denoise: Denoise
    objective: Objective
    levels: np.ndarray
    times: np.ndarray
    rows: int = field(default=0)

    def clean(self, z: Tensor, i: int | list[int]) -> Tensor:
        """D ``(B, C, *spatial)`` at step i, or at one step for each row."""
        steps = np.array([i] * len(z) if isinstance(i, int) else i)
        s = self.levels[steps]
        scale = np.ones_like(s) if self.objective.is_flow else np.hypot(1 - s, s)  # z = scale x
        x = z / torch.as_tensor(scale, dtype=torch.float32, device=z.device).view(-1, *[1] * (z.ndim - 1))
        t = torch.as_tensor(self.times[steps], dtype=torch.float32, device=z.device)
        self.rows += len(z)
        return self.objective.predict_x0(self.denoise(x, t).float(), x, t)

    def velocity(self, z: Tensor, i: int) -> Tensor:
        """Slope v at step i."""
        return (z - self.clean(z, i)) / float(self.levels[i])


def count_rows(method: str, num_inference_steps: int) -> tuple[int, int]:
    """Network rows that a scan takes on its way into noise, and a variation of it on the way back.

    Args:
        method: One of :data:`METHODS`.
        num_inference_steps: Number of steps.

    Returns:
        Rows there, and rows back.
    """
    n = num_inference_steps
    there = {"edict": 2 * n, "fixed_point": ITERATIONS * n}.get(method, n)
    return there, {"edict": 2 * n, "o_belm": n - 1}.get(method, n)


@torch.no_grad()
def invert(
    denoise: Denoise,
    x0: Tensor,
    *,
    objective: Objective,
    method: str = "edit_friendly",
    noise: Tensor | None = None,
    num_inference_steps: int = 5,
    strength: float = 0.3,
    spacing: str = "uniform",
    largest_batch: int | None = None,
) -> Trajectory:
    """Follow a scan into noise, such that :func:`vary` finds the way back.

    ``edit_friendly`` draws the states from the forward process itself, with an own draw for each, and keeps the noise
    that leads from one to the next; the network is asked at all levels at once. The others follow the
    probability-flow ODE: ``o_belm``, a two-step method that is its own inverse; ``edict``, two coupled states, which
    part from each other by 16 % a step on the way into noise and are for no more than about 20 steps;
    ``fixed_point``, DDIM made implicit, with three iterations a step; ``ddim``, which takes the slope of the state
    before; and ``dpm++``, the second-order multistep method run backwards. The first three come back to the scan to
    rounding, the others with an error.

    Args:
        denoise: Network output for a state ``(B, C, *spatial)`` and times ``(B,)``, all float32; may return any float
            type. For ``edit_friendly`` the times of the rows differ.
        x0: ``(B, C, *spatial)`` scans, as the network knows them.
        objective: What the network was trained for.
        method: One of :data:`METHODS`.
        noise: ``(n, B, C, *spatial)`` standard normal, for ``edit_friendly``; the others draw nothing.
        num_inference_steps: Number of steps, n.
        strength: Share in (0, 1] of the noise process that is gone, in times.
        spacing: As for :func:`medgen.diffusion.sampler.time_grid`.
        largest_batch: Most rows of one call; None for all levels and scans at once.

    Returns:
        The trajectory, float32.

    Raises:
        BadInputError: If the method is unknown, the strength is out of range, or there are too few or too many steps.
        ValueError: If the noise does not have the shape of the states, or is missing.
    """
    if method not in METHODS:
        raise BadInputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    if not 0 < strength <= 1:
        raise BadInputError(f"strength: expected a share in (0, 1], got {strength}. Little keeps the scan.")
    if method == "o_belm" and num_inference_steps < 2:
        raise BadInputError(f"num_inference_steps: expected 2 or more for o_belm, got {num_inference_steps}.")
    levels, times = time_grid(objective, num_inference_steps, spacing=spacing, strength=strength)
    network = _Network(denoise, objective, levels, times)
    x0 = x0.float()
    if method == "edit_friendly":
        wanted = (num_inference_steps, *x0.shape)
        if noise is None or tuple(noise.shape) != wanted:
            got = "none" if noise is None else str(tuple(noise.shape))
            raise ValueError(f"noise: expected {wanted}, got {got}")
        states, found = _edit_friendly(network, x0, noise.float(), largest_batch or noise.shape[0] * len(x0))
        done = Trajectory(method, objective, levels, times, states, noise=found)
    elif method == "edict":
        first, second = _edict(network, x0)
        done = Trajectory(method, objective, levels, times, first, partner=second)
    else:
        done = Trajectory(method, objective, levels, times, _INVERSES[method](network, x0))
    return replace(done, evaluations=network.rows // len(x0))


@torch.no_grad()
def vary(
    denoise: Denoise,
    trajectory: Trajectory,
    noise: Tensor,
    *,
    randomness: float | Tensor,
    region: Tensor | None = None,
) -> Tensor:
    """Go the way back with other noise inside a region: variations of the scan.

    The noise that is kept mixes with fresh noise as ``sqrt(1 - rho^2) noise + rho fresh``, which stays standard normal:
    rho 0 retraces the trajectory, rho 1 is a draw of the model that remembers nothing of it. For ``edit_friendly`` that
    is the noise of the first state and of every step, and what the last step leaves over is kept to the share
    ``sqrt(1 - rho^2)``; for the others it is that of the first state. Outside the region every state is the one of the
    trajectory, and the result is the scan to the last bit.

    Args:
        denoise: As for :func:`invert`.
        trajectory: Of one scan, or of one for each row.
        noise: ``(n, B, C, *spatial)`` standard normal for B variations; all but the first is for ``edit_friendly``.
        randomness: rho in [0, 1], or one for each row ``(B,)``.
        region: ``(B or 1, 1, *spatial)`` bool, where variations may differ; None is everywhere.

    Returns:
        ``(B, C, *spatial)`` float32.

    Raises:
        BadInputError: If the randomness is out of range.
        ValueError: If the noise does not fit the trajectory.
    """
    steps, rows = len(trajectory.times), noise.shape[1]
    if len(noise) < (steps if trajectory.method == "edit_friendly" else 1):
        raise ValueError(f"noise: expected that of {steps} steps, got {len(noise)}")
    if tuple(noise.shape[2:]) != tuple(trajectory.states.shape[2:]) or trajectory.states.shape[1] not in (1, rows):
        raise ValueError(f"noise: expected states {tuple(trajectory.states.shape)}, got {tuple(noise.shape)}")
    rho = torch.as_tensor(randomness, dtype=torch.float32, device=noise.device).expand(rows)
    if not bool(((rho >= 0) & (rho <= 1)).all()):
        raise BadInputError(f"randomness: expected shares in [0, 1], got {randomness}. 0 gives the scan back.")
    rho = rho.view(-1, *[1] * (noise.ndim - 2))
    keep = (1 - rho.square()).sqrt()
    levels, states, clean = trajectory.levels, trajectory.states, trajectory.clean
    first = (states[0] - float(1 - levels[0]) * clean) / float(levels[0])
    shift = (keep - 1) * first + rho * noise[0].float()  # of the noise of the first state

    def moved(kept: Tensor, i: int) -> Tensor:
        start = kept[i] + float(levels[i]) * shift
        return start if region is None else torch.where(region, start, kept[i])

    def held(made: Tensor, kept: Tensor, i: int) -> Tensor:
        return made if region is None else torch.where(region, made, kept[i])

    network = _Network(denoise, trajectory.objective, levels, trajectory.times)
    z = moved(states, 0)
    if trajectory.method == "edict" and trajectory.partner is not None:
        y = moved(trajectory.partner, 0)
        for i in range(steps):
            z, y = _edict_step(network, z, y, i)
            z, y = held(z, states, i + 1), held(y, trajectory.partner, i + 1)
        return z
    if trajectory.method == "edit_friendly" and trajectory.noise is not None:
        for i in range(steps):
            mean, spread = _posterior(network.clean(z, i), z, levels, i)
            last = i == steps - 1
            fresh = keep * trajectory.noise[i] if last else keep * trajectory.noise[i] + rho * noise[i + 1].float()
            z = held(mean + (1.0 if last else spread) * fresh, states, i + 1)
        return z
    if trajectory.method == "o_belm" and steps > 1:
        before, z = z, moved(states, 1)
        for i in range(1, steps):
            before, z = z, held(_belm_step(network, before, z, i), states, i + 1)
        return z
    slope = last_clean = torch.zeros_like(z)
    for i in range(steps):
        clean_now = network.clean(z, i)
        if trajectory.method == "dpm++" and 0 < i < steps - 1:
            slope = _multistep_slope(clean_now, last_clean, levels, i)
        ratio = float(levels[i + 1] / levels[i])
        z = held(torch.lerp(clean_now, z, ratio) + (1 - ratio) * slope, states, i + 1)
        last_clean, slope = clean_now, torch.zeros_like(z)
    return z


def _posterior(clean: Tensor, z: Tensor, levels: np.ndarray, i: int) -> tuple[Tensor, float]:
    """Mean of ``q(z_{i+1} | z_i, x_0 = D)``, and its standard deviation.

    With the factors a, b of signal and noise before and a', b' after the step it keeps ``a b' / (a' b)`` of the noise,
    and draws the rest anew: Song et al. 2021, equations 12 and 16 with eta = 1, for any a and b.
    """
    s, after = float(levels[i]), float(levels[i + 1])
    if after == 0:
        return clean, 0.0
    kept = (1 - s) * after / ((1 - after) * s)
    noise = (z - (1 - s) * clean) / s
    return (1 - after) * clean + after * kept * noise, after * math.sqrt(1 - kept**2)


def _edit_friendly(network: _Network, x0: Tensor, noise: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """States, each with a noise of its own, and the noise that leads from one to the next."""
    steps, batch = noise.shape[:2]
    s = torch.as_tensor(network.levels, dtype=torch.float32, device=x0.device).view(-1, *[1] * x0.ndim)
    states = torch.cat([(1 - s[:-1]) * x0 + s[:-1] * noise, x0[None]])
    flat, which = states[:-1].flatten(0, 1), [i for i in range(steps) for _ in range(batch)]
    parts = [network.clean(flat[at : at + largest], which[at : at + largest]) for at in range(0, len(flat), largest)]
    clean = torch.cat(parts).view(steps, *x0.shape)
    found = []
    for i in range(steps):
        mean, spread = _posterior(clean[i], states[i], network.levels, i)
        found.append((states[i + 1] - mean) / (spread or 1.0))
    return states, torch.stack(found)


def _edict_step(network: _Network, x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Wallace et al. 2023, equations 14 and 15, with Euler steps on the line z; the two take turns in going first."""
    if i % 2:
        y, x = _edict_step_of(network, y, x, i)
        return x, y
    return _edict_step_of(network, x, y, i)


def _edict_step_of(network: _Network, x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor]:
    h, p = float(network.levels[i + 1] - network.levels[i]), MIXING
    x = x + h * network.velocity(y, i)
    y = y + h * network.velocity(x, i)
    x = p * x + (1 - p) * y
    return x, p * y + (1 - p) * x


def _edict(network: _Network, x0: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x0, x0
    states = [(x, y)]
    for i in reversed(range(len(network.times))):
        h, p = float(network.levels[i + 1] - network.levels[i]), MIXING
        if i % 2:
            x, y = y, x
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = y - h * network.velocity(x, i)
        x = x - h * network.velocity(y, i)
        if i % 2:
            x, y = y, x
        states.append((x, y))
    first, second = zip(*reversed(states), strict=True)
    return torch.stack(first), torch.stack(second)


def _belm_weights(levels: np.ndarray, i: int) -> tuple[float, float, float]:
    """Weights of z_{i-1}, z_i and v_i in z_{i+1}: Wang et al. 2024, equation 18, exact for parabolas."""
    h, before = float(levels[i + 1] - levels[i]), float(levels[i] - levels[i - 1])
    ratio = (h / before) ** 2
    return ratio, 1 - ratio, h * (1 + h / before)


def _belm_step(network: _Network, before: Tensor, z: Tensor, i: int) -> Tensor:
    first, second, slope = _belm_weights(network.levels, i)
    return first * before + second * z + slope * network.velocity(z, i)


def _o_belm(network: _Network, x0: Tensor) -> Tensor:
    after, z = x0, _euler_back(network, x0, len(network.times) - 1)
    states = [after, z]
    for i in reversed(range(1, len(network.times))):
        first, second, slope = _belm_weights(network.levels, i)
        after, z = z, (after - second * z - slope * network.velocity(z, i)) / first
        states.append(z)
    return torch.stack(states[::-1])


def _euler_back(network: _Network, z: Tensor, i: int, *, at: Tensor | None = None) -> Tensor:
    """State before step i, with the slope of ``at`` there; DDIM takes that of the state after the step."""
    at = z if at is None else at
    return z - float(network.levels[i + 1] - network.levels[i]) * network.velocity(at, i)


def _ddim(network: _Network, x0: Tensor) -> Tensor:
    states = [x0]
    for i in reversed(range(len(network.times))):
        states.append(_euler_back(network, states[-1], i))
    return torch.stack(states[::-1])


def _fixed_point(network: _Network, x0: Tensor) -> Tensor:
    states = [x0]
    for i in reversed(range(len(network.times))):
        z = states[-1]
        for _ in range(ITERATIONS):
            z = _euler_back(network, states[-1], i, at=z)
        states.append(z)
    return torch.stack(states[::-1])


def _multistep_slope(clean: Tensor, last: Tensor, levels: np.ndarray, i: int) -> Tensor:
    """What DPM-Solver++ 2M adds to D in the step from i, by the change of D since the step before."""
    near = levels[[i - 1, i, i + 1]]
    with np.errstate(divide="ignore"):
        log = np.log(1 - near) - np.log(near)
    # Beside a step of infinite length, from pure noise or to it, the change says nothing.
    weight = (log[2] - log[1]) / (log[1] - log[0]) / 2 if np.isfinite(log).all() else 0.0
    return (clean - last) * float(weight)


def _dpm_inverse(network: _Network, x0: Tensor) -> Tensor:
    """The multistep method from the scan into noise; its first step, from no noise, is that of DDIM."""
    levels = network.levels
    states = [x0, _euler_back(network, x0, len(network.times) - 1)]
    last: Tensor | None = None
    for i in reversed(range(1, len(network.times))):
        clean = network.clean(states[-1], i)
        ahead = clean
        if last is not None:  # as a step of the reversed grid
            ahead = clean + _multistep_slope(clean, last, levels[::-1], len(levels) - 1 - i)
        states.append(torch.lerp(ahead, states[-1], float(levels[i - 1] / levels[i])))
        last = clean
    return torch.stack(states[::-1])


_INVERSES: dict[str, Callable[[_Network, Tensor], Tensor]] = {
    "o_belm": _o_belm,
    "fixed_point": _fixed_point,
    "ddim": _ddim,
    "dpm++": _dpm_inverse,
}
