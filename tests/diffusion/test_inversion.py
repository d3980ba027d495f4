"""Inversions against analytic flows, against diffusers, and against themselves.

For Gaussian data of standard deviation c around 0 the probability flow takes ``x_0`` to ``x_0 sqrt(a^2 c^2 + b^2) / c``
at the factors a, b of signal and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from medgen.diffusion.inversion import EXACT, METHODS, Trajectory, count_rows, invert, vary
from medgen.diffusion.objective import Objective
from medgen.networks import Denoiser
from medgen.types import BadInputError

FLOW = Objective(prediction="flow")
V = Objective(prediction="v_prediction")
EPSILON = Objective(prediction="epsilon", zero_terminal_snr=False)
OBJECTIVES = [FLOW, V, EPSILON]
STD = 0.7
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gaussian(objective: Objective) -> Network:
    """Best network for Gaussian data."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in objective.alpha_sigma(t))
        variance = alpha**2 * STD**2 + sigma**2
        x0, noise = alpha * STD**2 / variance * x, sigma / variance * x
        return {"flow": noise - x0, "v_prediction": alpha * noise - sigma * x0, "epsilon": noise}[objective.prediction]

    return denoise


def smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network without meaning, not linear in anything."""
    return torch.tanh(0.8 * x + 0.3 * torch.cos(t / 150).view(-1, *[1] * (x.ndim - 1)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In dB, with the range of the wanted as the peak."""
    error = (found.double() - wanted.double()).square().mean()
    return 10 * math.log10(float((wanted.max() - wanted.min()) ** 2 / error.clamp(min=1e-30)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.prediction)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_without_randomness_the_way_back_is_the_scan(method: str, objective: Objective, dims: int) -> None:
    torch.manual_seed(0)
    network = Denoiser(dims, 2, (8, 16), (False, True), 1, 8, norm_num_groups=4).eval()
    x0 = normal(2, 2, *[8] * dims)
    noise = normal(6, 2, 2, *[8] * dims, seed=1)
    options = {"objective": objective, "method": method, "num_inference_steps": 6}
    trajectory = invert(network, x0, noise=noise, **options)
    assert torch.equal(trajectory.clean, x0) and trajectory.states.dtype == torch.float32
    back = vary(network, trajectory, normal(6, 2, 2, *[8] * dims, seed=2), randomness=0.0)
    least = {"edit_friendly": 110, "o_belm": 90, "edict": 100, "fixed_point": 35, "ddim": 20, "dpm++": 20}
    assert psnr(back, x0) > least[method]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.prediction)
@pytest.mark.parametrize(
    ("method", "order", "most"), [("ddim", 1, 0.1), ("fixed_point", 1, 0.15), ("o_belm", 2, 0.03), ("dpm++", 2, 0.02)]
)
def test_the_probability_flow_is_followed_to_the_order_of_the_method(
    method: str, order: int, most: float, objective: Objective
) -> None:
    errors = [_flow_error(objective, method, n) for n in (20, 40)]
    # Twice the steps: a half of the error, or a quarter of it; a start of first order costs the second-order ones some.
    assert errors[1] < most and errors[1] < errors[0] * (0.6 if order == 1 else 0.4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.prediction)
def test_edict_follows_the_flow_in_few_steps(objective: Objective) -> None:
    assert _flow_error(objective, "edict", 20) < _flow_error(objective, "edict", 10) < 0.4


def _flow_error(objective: Objective, method: str, n: int) -> float:
    x0 = normal(1, 1, 16, 16)
    found = invert(gaussian(objective), x0, objective=objective, method=method, num_inference_steps=n, strength=0.6)
    s = float(found.levels[0])
    wanted = x0 * math.sqrt((1 - s) ** 2 * STD**2 + s**2) / STD
    return float((found.states[0] - wanted).abs().max())


def test_edit_friendly_states_are_those_of_the_forward_process_and_its_steps_those_of_diffusers() -> None:
    x0, noise = normal(1, 1, 12, 12), normal(10, 1, 1, 12, 12, seed=1)
    found = invert(smooth, x0, objective=EPSILON, noise=noise, num_inference_steps=10, strength=1.0)
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(10)
    s = found.levels
    scale = np.hypot(1 - s, s)
    assert [round(time) for time in found.times] == scheduler.timesteps.tolist()
    for i, time in enumerate(scheduler.timesteps[:-1]):
        x = found.states[i] / scale[i]
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise[i], time[None]), atol=1e-5, rtol=1e-5)
        step = scheduler.step(smooth(x, time[None].float()), time, x, eta=1.0, variance_noise=found.noise[i])
        torch.testing.assert_close(step.prev_sample, found.states[i + 1] / scale[i + 1], atol=2e-4, rtol=2e-4)


def test_a_fresh_draw_has_the_spread_of_the_data_and_some_randomness_part_of_it() -> None:
    x0 = STD * normal(1, 1, 32, 32)
    noise, fresh = normal(80, 1, 1, 32, 32, seed=1), normal(80, 16, 1, 32, 32, seed=2)
    options = {"objective": FLOW, "num_inference_steps": 80, "strength": 1.0}
    trajectory = invert(gaussian(FLOW), x0, noise=noise, **options)
    drawn = {rho: vary(gaussian(FLOW), trajectory, fresh, randomness=rho) for rho in (0.3, 1.0)}
    assert float(drawn[1.0].std()) == pytest.approx(STD, rel=0.05)
    alike = {
        rho: float(torch.corrcoef(torch.stack([found.mean(0).flatten(), x0.flatten()]))[0, 1])
        for rho, found in drawn.items()
    }
    assert alike[0.3] > 0.9 and abs(alike[1.0]) < 0.1
    each = vary(gaussian(FLOW), trajectory, fresh[:, :2], randomness=torch.tensor([0.3, 1.0]))
    for row, rho in enumerate((0.3, 1.0)):
        torch.testing.assert_close(each[row], drawn[rho][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_outside_the_region_nothing_changes_and_inside_everything_does(method: str) -> None:
    x0 = normal(1, 2, 16, 16)
    region = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    region[..., 4:9, 3:12] = True
    trajectory = invert(smooth, x0, objective=V, method=method, noise=normal(5, 1, 2, 16, 16, seed=1))
    made = vary(smooth, trajectory, normal(5, 3, 2, 16, 16, seed=2), randomness=0.8, region=region)
    inside = region.expand_as(made)
    assert torch.equal(made[~inside], x0.expand_as(made)[~inside])
    assert float((made != x0)[inside].float().mean()) > 0.99
    # A row depends on its own noise alone.
    alone = vary(smooth, trajectory, normal(5, 3, 2, 16, 16, seed=2)[:, 1:2], randomness=0.8, region=region)
    torch.testing.assert_close(alone[0], made[1], atol=1e-6, rtol=1e-6)


def test_rows_are_counted_and_split_as_asked() -> None:
    seen: list[int] = []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return smooth(x, t)

    x0, noise = normal(2, 1, 8, 8), normal(5, 2, 1, 8, 8, seed=1)
    whole = invert(counted, x0, objective=FLOW, noise=noise)
    assert seen == [10] and whole.evaluations == 5
    split = invert(counted, x0, objective=FLOW, noise=noise, largest_batch=4)
    assert seen[1:] == [4, 4, 2]
    torch.testing.assert_close(split.noise, whole.noise, atol=1e-5, rtol=1e-5)
    for method in METHODS:
        there = invert(smooth, x0, objective=FLOW, method=method, noise=noise)
        seen.clear()
        vary(counted, there, normal(5, 2, 1, 8, 8, seed=2), randomness=0.5)
        assert count_rows(method, 5) == (there.evaluations, sum(seen) // 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_trajectory_is_saved_and_goes_back_to_the_same_scan(method: str, tmp_path: Path) -> None:
    trajectory = invert(smooth, normal(1, 1, 8, 8), objective=V, method=method, noise=normal(5, 1, 1, 8, 8, seed=1))
    trajectory.save(tmp_path / "way.safetensors")
    again = Trajectory.load(tmp_path / "way.safetensors")
    assert (again.method, again.objective, again.evaluations) == (method, V, trajectory.evaluations)
    fresh = normal(5, 2, 1, 8, 8, seed=2)
    first, second = (vary(smooth, way, fresh, randomness=0.5) for way in (trajectory, again))
    assert torch.equal(first, second)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(BadInputError, match="expected a saved trajectory"):
        Trajectory.load(tmp_path / "broken.safetensors")


def test_half_precision_networks_leave_the_states_exact() -> None:
    def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return smooth(x.half(), t).half()

    x0 = normal(1, 1, 16, 16)
    for method in EXACT:
        trajectory = invert(half, x0, objective=FLOW, method=method, noise=normal(5, 1, 1, 16, 16, seed=1))
        back = vary(half, trajectory, normal(5, 1, 1, 16, 16, seed=2), randomness=0.0)
        assert psnr(back, x0) > 60, method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "guess"}, "method: expected one of edit_friendly, o_belm"),
        ({"strength": 0.0}, "strength: expected a share"),
        ({"num_inference_steps": 400}, "num_inference_steps: expected 1 to 300"),
        ({"method": "o_belm", "num_inference_steps": 1}, "expected 2 or more for o_belm"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        invert(smooth, normal(1, 1, 8, 8), objective=V, noise=normal(5, 1, 1, 8, 8), **options)


def test_noise_that_does_not_fit_is_refused() -> None:
    x0 = normal(1, 1, 8, 8)
    with pytest.raises(ValueError, match="noise: expected"):
        invert(smooth, x0, objective=V)
    trajectory = invert(smooth, x0, objective=V, noise=normal(5, 1, 1, 8, 8))
    for noise in (normal(4, 1, 1, 8, 8), normal(5, 1, 1, 8, 9)):
        with pytest.raises(ValueError, match="noise: expected"):
            vary(smooth, trajectory, noise, randomness=0.5)
    with pytest.raises(BadInputError, match="randomness: expected shares"):
        vary(smooth, trajectory, normal(5, 1, 1, 8, 8), randomness=1.5)
