"""Samplers against analytic probability flows and against the schedulers of diffusers.

For Gaussian data of mean m and standard deviation c the best denoiser is known, and the probability flow takes pure
noise to ``m + c noise`` exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import SPACINGS, sample, sampler_names, time_grid
from medgen.types import BadInputError

FLOW = Objective(prediction="flow")
V = Objective(prediction="v_prediction")
EPSILON = Objective(prediction="epsilon", zero_terminal_snr=False)
OBJECTIVES = [
    FLOW,
    EPSILON,
    Objective(prediction="epsilon", beta_schedule="linear", zero_terminal_snr=False),
    *(
        Objective(prediction="v_prediction", beta_schedule=schedule, zero_terminal_snr=zero)
        for schedule in ("scaled_linear", "linear", "squaredcos_cap_v2")
        for zero in (True, False)
    ),
]
FIRST_ORDER = ("ddim", "euler")
OFFERED = [(objective, sampler) for objective in OBJECTIVES for sampler in sampler_names(objective)]
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gaussian(objective: Objective, mean: float, std: float) -> Network:
    """Best network for Gaussian data, from E[x_0 | x_t] and the definition of its target."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in objective.alpha_sigma(t))
        error = x - alpha * mean
        variance = alpha**2 * std**2 + sigma**2
        x0, noise = mean + alpha * std**2 / variance * error, sigma / variance * error
        return {"flow": noise - x0, "v_prediction": alpha * noise - sigma * x0, "epsilon": noise}[objective.prediction]

    return denoise


def smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network without meaning, not linear in anything."""
    return torch.tanh(0.8 * x + 0.3 * torch.cos(t / 150).view(-1, *[1] * (x.ndim - 1)))


def noise_like(shape: tuple[int, ...] = (3, 2, 4, 4), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("objective", "sampler"), OFFERED, ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.4), (-0.6, 0.4), (0.3, 0.2), (0.5, 1.0), (0.0, 2.0)])
def test_true_standard_deviation_within_five_percent_at_default_spacing(objective, sampler, mean, std):
    steps = 100 if sampler in FIRST_ORDER else 20
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    x0 = sample(gaussian(objective, mean, std), noise, objective=objective, sampler=sampler, num_inference_steps=steps)
    assert x0.std() / noise.std() == pytest.approx(std, rel=0.05)
    # A start at pure noise lacks a trace of the mean where the model was trained to end short of it.
    from_pure_noise = objective.is_flow or objective.zero_terminal_snr
    assert x0.mean().item() == pytest.approx(mean, abs=1e-3 if from_pure_noise else 0.1 * abs(mean) + 1e-3)


@pytest.mark.parametrize("objective", [FLOW, V], ids=str)
def test_the_temperature_is_a_factor_on_the_spread_and_leaves_the_mean(objective):
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    x0 = sample(gaussian(objective, 0.3, 0.4), noise, objective=objective, num_inference_steps=100, temperature=0.8)
    assert x0.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert (x0.std() / noise.std()).item() == pytest.approx(0.8 * 0.4, rel=0.01)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(BadInputError, match="temperature: expected a finite number above 0"):
        sample(smooth, noise_like(), objective=FLOW, temperature=temperature)


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc", "heun"])
@pytest.mark.parametrize("objective", [FLOW, V], ids=str)
def test_every_voxel_lands_where_the_exact_flow_takes_it(objective, sampler):
    noise = noise_like()
    x0 = sample(gaussian(objective, 0.3, 0.4), noise, objective=objective, sampler=sampler, num_inference_steps=50)
    torch.testing.assert_close(x0, 0.3 + 0.4 * noise, atol=0.004, rtol=0)


def test_error_falls_with_the_order_that_a_sampler_claims():
    # Uniform flow steps have no floor from the last jump to zero noise, so that the order shows.
    noise = noise_like()

    def error(sampler: str, steps: int) -> float:
        x0 = sample(
            gaussian(FLOW, 0.3, 0.7),
            noise,
            objective=FLOW,
            sampler=sampler,
            spacing="uniform",
            num_inference_steps=steps,
        )
        return float((x0 - 0.3 - 0.7 * noise).abs().max())

    for sampler in sampler_names(FLOW):
        order = np.log2(error(sampler, 40) / error(sampler, 80))
        assert order > (0.9 if sampler == "euler" else 1.7), sampler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("objective", "sampler"), OFFERED, ids=str)
def test_every_offered_combination_runs_in_2d_and_3d_at_any_number_of_steps(objective, sampler, spacing):
    denoise = gaussian(objective, 0.1, 0.4)
    plane, volume = (1, 2, 2, 2), (1, 1, 2, 2, 2)
    many = 250 if objective in (FLOW, V, EPSILON) else 100
    for steps, shape in [(1, plane), (2, volume), (3, plane), (5, volume), (10, plane), (20, volume), (many, plane)]:
        noise = noise_like(shape)
        x0 = sample(denoise, noise, objective=objective, sampler=sampler, spacing=spacing, num_inference_steps=steps)
        assert x0.shape == shape and x0.dtype == torch.float32 and x0.abs().max() < 4, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_grid_falls_from_the_highest_noise_of_the_model_to_zero_with_matching_times(objective, spacing):
    for steps in (1, 2, 7, 20, 250, 1000):
        s, t = time_grid(objective, steps, spacing=spacing)
        assert len(s) == steps + 1 and len(t) == steps
        assert (np.diff(s) < 0).all() and s[-1] == 0
        assert t[0] == (1000 if objective.is_flow else 999)
        assert s[0] == 1 or not (objective.zero_terminal_snr or objective.is_flow)
        level = objective.noise_level(torch.from_numpy(t)).double().numpy()
        np.testing.assert_allclose(level, s[:-1], atol=1e-6)


@pytest.mark.parametrize("objective", [FLOW, V], ids=str)
@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc", "heun"])
def test_network_first_sees_the_noise_itself_at_the_last_time(objective, sampler):
    seen = []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), t.clone()))
        return smooth(x, t)

    noise = noise_like()
    sample(denoise, noise, objective=objective, sampler=sampler, num_inference_steps=5)
    torch.testing.assert_close(seen[0][0], noise, atol=0, rtol=0)
    assert (seen[0][1] == (1000 if objective.is_flow else 999)).all()
    assert seen[0][1].shape == (3,) and seen[0][1].dtype == torch.float32
    assert len(seen) == (9 if sampler == "heun" else 5)


def test_rows_do_not_depend_on_their_batch_and_runs_repeat_exactly():
    noise = noise_like()
    for objective in (FLOW, V, EPSILON):
        for sampler in sampler_names(objective):
            whole = sample(smooth, noise, objective=objective, sampler=sampler)
            again = sample(smooth, noise, objective=objective, sampler=sampler)
            torch.testing.assert_close(whole, again, atol=0, rtol=0)
            single = sample(smooth, noise[1:2], objective=objective, sampler=sampler)
            torch.testing.assert_close(whole[1:2], single, atol=1e-5, rtol=0)


def test_state_stays_float32_with_a_half_precision_network():
    noise = noise_like()
    exact = sample(gaussian(FLOW, 0.0, 0.4), noise, objective=FLOW)
    low = sample(lambda x, t: gaussian(FLOW, 0.0, 0.4)(x, t).bfloat16(), noise.bfloat16(), objective=FLOW)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0)


def test_callback_is_told_of_every_step_and_last_of_the_result():
    steps, states = [], []
    noise = noise_like()

    def callback(step: int, state: torch.Tensor) -> None:
        steps.append(step)
        states.append(state)

    x0 = sample(smooth, noise, objective=FLOW, num_inference_steps=4, callback=callback)
    assert steps == [0, 1, 2, 3]
    torch.testing.assert_close(states[-1], x0, atol=0, rtol=0)


# ---- from an image, wholly or in a region


def levels(objective: Objective, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of image and noise at the time where a run of a strength begins."""
    time = strength * 1000 if objective.is_flow else round(strength * 1000) - 1
    return objective.alpha_sigma(torch.tensor([float(time)]))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("strength", [0.02, 0.3, 0.75])
@pytest.mark.parametrize(("objective", "sampler"), OFFERED, ids=str)
def test_a_start_lands_where_the_exact_flow_takes_its_noised_self(objective, sampler, strength, spacing):
    mean, std, start, noise = 0.3, 0.4, noise_like(seed=1), noise_like()
    # Even steps in time leave a long last one to zero noise.
    steps = 200 if strength > 0.1 and (sampler in FIRST_ORDER or spacing == "uniform") else 20
    x0 = sample(
        gaussian(objective, mean, std),
        noise,
        objective=objective,
        sampler=sampler,
        spacing=spacing,
        num_inference_steps=steps,
        start=start,
        strength=strength,
    )
    alpha, sigma = levels(objective, strength)
    spread = torch.sqrt((alpha * std) ** 2 + sigma**2)
    exact = mean + std / spread * (alpha * start + sigma * noise - alpha * mean)
    torch.testing.assert_close(x0, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_grid_of_a_strength_spreads_all_steps_over_its_share(objective, spacing):
    for strength, steps in [(0.001, 1), (0.02, 1), (0.02, 20), (0.3, 7), (0.5, 500), (0.9996, 250), (1.0, 20)]:
        s, t = time_grid(objective, steps, spacing=spacing, strength=strength)
        assert len(s) == steps + 1 and (np.diff(s) < 0).all() and s[-1] == 0
        assert t[0] == pytest.approx(1000 * strength if objective.is_flow else round(1000 * strength) - 1)
        assert steps < 7 or not objective.is_flow or s[-2] < 0.2 * s[0]  # not all of them at one end
        level = objective.noise_level(torch.from_numpy(t)).double().numpy()
        np.testing.assert_allclose(level, s[:-1], atol=1e-6)


@pytest.mark.parametrize(("objective", "sampler"), OFFERED, ids=str)
def test_strength_one_is_as_without_a_start_and_strength_zero_gives_it_back(objective, sampler):
    start, noise = noise_like(seed=1), noise_like()
    arguments = {"objective": objective, "sampler": sampler, "num_inference_steps": 50}
    denoise = gaussian(objective, 0.3, 0.4)
    free, whole = sample(denoise, noise, **arguments), sample(denoise, noise, start=start, **arguments)
    pure = objective.is_flow or objective.zero_terminal_snr
    torch.testing.assert_close(whole, free, atol=0 if pure else 0.15, rtol=0)
    none = sample(denoise, noise.bfloat16(), start=start.bfloat16(), strength=0, **arguments)
    torch.testing.assert_close(none, start.bfloat16().float(), atol=0, rtol=0)


def test_the_temperature_also_scales_the_noise_that_a_start_gets():
    start, noise, seen = noise_like(seed=1), noise_like(), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return smooth(x, t)

    sample(denoise, noise, objective=FLOW, start=start, strength=0.5, temperature=0.8)
    torch.testing.assert_close(seen[0], 0.5 * start + 0.4 * noise)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("objective", "sampler"), OFFERED, ids=str)
def test_outside_its_region_the_network_sees_the_start_at_every_noise_level_and_the_result_is_the_start(
    objective, sampler, strength
):
    start, noise, seen = noise_like(seed=1), noise_like(), []
    region = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    region[0, :, :2], region[1, :, :, 1:3] = True, True

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), t.clone()))
        return smooth(x, t)

    arguments = {"objective": objective, "sampler": sampler, "start": start, "strength": strength}
    x0 = sample(denoise, noise, region=region, **arguments)
    outside = ~region.expand_as(start)
    assert torch.equal(x0[outside], start[outside])
    for x, t in seen:
        torch.testing.assert_close(x[outside], objective.add_noise(start, noise, t)[outside], atol=1e-5, rtol=1e-5)
    free = sample(smooth, noise, **arguments)
    # This network looks at each voxel alone, so that inside nothing is known of the outside.
    torch.testing.assert_close(x0[~outside], free[~outside], atol=0, rtol=0)
    assert (x0 - start)[~outside].abs().min() > 0


@pytest.mark.parametrize("objective", [FLOW, V], ids=str)
def test_rows_with_start_and_region_do_not_depend_on_their_batch(objective):
    start, noise, region = noise_like(seed=1), noise_like(), noise_like((3, 1, 4, 4), seed=2) > 0
    for sampler in sampler_names(objective):
        arguments = {"objective": objective, "sampler": sampler, "strength": 0.7}
        whole = sample(smooth, noise, start=start, region=region, **arguments)
        single = sample(smooth, noise[1:2], start=start[1:2], region=region[1:2], **arguments)
        torch.testing.assert_close(whole[1:2], single, atol=1e-5, rtol=0)


def neighborly(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network in which the outside of a region acts on its inside."""
    return smooth(x + x.roll(1, -1) - 0.5 * x.roll(1, -2), t)


@pytest.mark.parametrize("objective", [V, EPSILON], ids=str)
def test_a_region_equals_diffusers_with_the_known_state_put_back_after_each_step(objective):
    start, noise = noise_like(seed=1), noise_like()
    region = noise_like((3, 1, 4, 4), seed=2) > 0
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=objective.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=objective.zero_terminal_snr,
    )
    scheduler.set_timesteps(40)
    times = scheduler.timesteps[20:]
    x = scheduler.add_noise(start, noise, times[:1])
    for t, after in zip(times, [*times[1:], None], strict=True):
        x = scheduler.step(neighborly(x, t.float().expand(len(x))), t, x).prev_sample
        known = start if after is None else scheduler.add_noise(start, noise, after[None])
        x = torch.where(region, x, known)  # RePaint, equation 8
    ours = sample(
        neighborly,
        noise,
        objective=objective,
        sampler="ddim",
        spacing="uniform",
        num_inference_steps=20,
        start=start,
        strength=0.5,
        region=region,
    )
    # The last step of diffusers ends at its least noise, ours at none.
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=1e-4)


def test_a_flow_start_equals_diffusers():
    start, noise = noise_like(seed=1), noise_like()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(0.6, 0.06, 10))
    scheduler.set_begin_index(0)
    x = scheduler.scale_noise(start, scheduler.timesteps[:1], noise)
    arguments = {"sampler": "euler", "spacing": "uniform", "num_inference_steps": 10, "start": start, "strength": 0.6}
    ours = sample(smooth, noise, objective=FLOW, **arguments)
    torch.testing.assert_close(ours, by_diffusers(scheduler, x, FLOW), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": 0.5}, BadInputError, "strength: expected 1 without a start, got 0.5"),
        ({"start": noise_like(), "strength": 1.1}, BadInputError, r"strength: expected a share in \[0, 1\], got 1.1"),
        ({"start": noise_like(), "strength": float("nan")}, BadInputError, r"strength: expected a share in \[0, 1\]"),
        (
            {"start": noise_like(), "strength": 0.01},
            BadInputError,
            "num_inference_steps: expected 1 to 10, the steps of this model at strength 0.01, got 20",
        ),
        ({"start": noise_like((3, 2, 4, 5))}, ValueError, "start: expected the shape of the noise"),
        ({"region": torch.ones(3, 1, 4, 4).bool()}, ValueError, "region: expected a start beside it"),
        (
            {"start": noise_like(), "region": torch.ones(3, 1, 4, 4)},
            ValueError,
            r"region: expected bool \(3, 1, 4, 4\)",
        ),
        ({"start": noise_like(), "region": torch.ones(1, 1, 4, 4).bool()}, ValueError, "region: expected bool"),
    ],
)
def test_a_start_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(smooth, noise_like(), objective=FLOW, **arguments)


# ---- the same numbers from diffusers, where it can be set up alike

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def by_diffusers(scheduler, noise: torch.Tensor, objective: Objective) -> torch.Tensor:
    x = noise
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, t.float().expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("objective", [V, EPSILON], ids=str)
def test_ddim_equals_diffusers(objective, steps):
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=objective.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=objective.zero_terminal_snr,
    )
    scheduler.set_timesteps(steps)
    ours = sample(
        smooth, noise_like(), objective=objective, sampler="ddim", spacing="uniform", num_inference_steps=steps
    )
    torch.testing.assert_close(ours, by_diffusers(scheduler, noise_like(), objective), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("dpm++2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_multistep_samplers_equal_diffusers(sampler, scheduler, prediction, steps):
    objective = Objective(prediction=prediction, zero_terminal_snr=False)
    theirs = scheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing", final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    ours = sample(
        smooth, noise_like(), objective=objective, sampler=sampler, spacing="uniform", num_inference_steps=steps
    )
    torch.testing.assert_close(ours, by_diffusers(theirs, noise_like(), objective), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_euler_equals_the_flow_scheduler_of_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = sample(smooth, noise_like(), objective=FLOW, sampler="euler", spacing="uniform", num_inference_steps=steps)
    torch.testing.assert_close(ours, by_diffusers(scheduler, noise_like(), FLOW), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_heun_equals_the_flow_scheduler_of_diffusers_on_the_same_grid(steps):
    s, t = (torch.from_numpy(values).float() for values in time_grid(FLOW, steps, spacing="karras"))
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
    scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    ours = sample(smooth, noise_like(), objective=FLOW, sampler="heun", spacing="karras", num_inference_steps=steps)
    torch.testing.assert_close(ours, by_diffusers(scheduler, noise_like(), FLOW), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_flow_dpm_solver_from_pure_noise_equals_diffusers_on_the_same_grid(spacing, steps):
    s, t = time_grid(FLOW, steps, spacing=spacing)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = torch.from_numpy(s).float(), torch.from_numpy(t).float()
    ours = sample(smooth, noise_like(), objective=FLOW, spacing=spacing, num_inference_steps=steps)
    torch.testing.assert_close(ours, by_diffusers(scheduler, noise_like(), FLOW), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (FLOW, {"sampler": "ddim"}, r"sampler: expected one of \('euler', 'dpm\+\+2m', 'unipc', 'heun'\) for flow"),
        (V, {"sampler": "euler"}, r"sampler: expected one of \('ddim', .*\) for v_prediction, got 'euler'"),
        (V, {"sampler": "plms"}, r"sampler: expected one of"),
        (V, {"spacing": "linspace"}, r"spacing: expected 'default' or one of \('lu', 'karras', 'uniform'\)"),
        (V, {"num_inference_steps": 0}, r"num_inference_steps: expected 1 to 1000, .* got 0"),
        (FLOW, {"num_inference_steps": 1001}, r"num_inference_steps: expected 1 to 1000, .* got 1001"),
    ],
)
def test_what_is_not_offered_is_refused_with_what_is(objective, arguments, message):
    with pytest.raises(BadInputError, match=message):
        sample(smooth, noise_like(), objective=objective, **arguments)
