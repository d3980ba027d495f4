"""Objectives against diffusers' schedules and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from medgen.diffusion.objective import Objective, vp_noise_levels
from medgen.types import BadInputError

FLOW = Objective(prediction="flow")
V = Objective(prediction="v_prediction")
EPSILON = Objective(prediction="epsilon", zero_terminal_snr=False)
VP = [
    EPSILON,
    Objective(prediction="epsilon", beta_schedule="linear", zero_terminal_snr=False),
    *(
        Objective(prediction="v_prediction", beta_schedule=schedule, zero_terminal_snr=zero)
        for schedule in ("scaled_linear", "linear", "squaredcos_cap_v2")
        for zero in (True, False)
    ),
]


def ddpm(objective: Objective) -> DDPMScheduler:
    start, end = {"scaled_linear": (0.00085, 0.012)}.get(objective.beta_schedule, (0.0001, 0.02))
    return DDPMScheduler(
        num_train_timesteps=objective.num_train_timesteps,
        beta_start=start,
        beta_end=end,
        beta_schedule=objective.beta_schedule,
        prediction_type=objective.prediction,
        rescale_betas_zero_snr=objective.zero_terminal_snr,
    )


def batch(seed: int = 0, shape: tuple[int, ...] = (6, 2, 4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.5, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("objective", VP, ids=str)
def test_noising_and_target_equal_those_of_diffusers_at_every_kind_of_time(objective):
    x0, noise = batch()
    t = torch.tensor([0, 1, 250, 777, 998, 999])
    scheduler = ddpm(objective)
    torch.testing.assert_close(objective.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=2e-5, rtol=0)
    if objective.prediction == "v_prediction":
        expected = scheduler.get_velocity(x0, noise, t)
        torch.testing.assert_close(objective.target(x0, noise, t), expected, atol=2e-5, rtol=0)


def test_zero_terminal_betas_equal_the_rescaling_of_diffusers():
    s = vp_noise_levels(V)
    alpha = (1 - s) / np.hypot(1 - s, s)
    betas = rescale_zero_terminal_snr(ddpm(Objective(prediction="v_prediction", zero_terminal_snr=False)).betas)
    expected = torch.cumprod(1 - betas, 0).numpy()
    np.testing.assert_allclose(alpha**2, expected, atol=2e-6)
    assert alpha[-1] == 0


def test_flow_agrees_with_the_flow_scheduler_of_diffusers():
    x0, noise = batch()
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[[0, 1, 300, 500, 998, 999]]
    torch.testing.assert_close(FLOW.add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise))


@pytest.mark.parametrize("objective", [FLOW, *VP], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 4, 4), (5, 1, 3, 4, 2)])
def test_clean_sample_is_recovered_from_the_target_in_2d_and_3d(objective, shape):
    x0, noise = batch(1, shape)
    t = torch.tensor([0.0, 10.5, 400.0, 700.25, 950.0])
    recovered = objective.predict_x0(objective.target(x0, noise, t), objective.add_noise(x0, noise, t), t)
    torch.testing.assert_close(recovered, x0, atol=5e-5, rtol=0)


@pytest.mark.parametrize("objective", VP, ids=str)
def test_min_snr_weights_follow_the_snr_of_diffusers(objective):
    t = torch.arange(0, 1000, 37)
    snr = compute_snr(ddpm(objective), t)
    if objective.prediction == "v_prediction":
        snr = snr + 1
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    torch.testing.assert_close(objective.weight(t), expected, atol=1e-5, rtol=2e-3)


def test_pure_noise_at_zero_terminal_snr_is_trained_with_full_weight():
    t = torch.tensor([999.0])
    x0, noise = batch(2, (1, 1, 4, 4))
    torch.testing.assert_close(V.add_noise(x0, noise, t), noise, atol=0, rtol=0)
    torch.testing.assert_close(V.target(x0, noise, t), -x0, atol=0, rtol=0)
    assert V.weight(t).item() == 1


def test_flow_and_switched_off_min_snr_weigh_all_times_the_same():
    t = torch.tensor([0.0, 500.0, 999.0])
    off = Objective(prediction="v_prediction", min_snr_gamma=None)
    assert FLOW.weight(t).tolist() == off.weight(t).tolist() == [1, 1, 1]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction", ["flow", "v_prediction"])
def test_drawn_times_lie_in_range_and_follow_their_law(prediction, sampling):
    objective = Objective(prediction=prediction, timestep_sampling=sampling)
    t = objective.sample_timesteps(20000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1000
    assert bool((t == t.floor()).all()) == (prediction == "v_prediction")
    # Quartiles: a uniform variable has 250; the logistic of a standard normal 1 / (1 + exp(0.6745)) = 0.3375.
    expected = [0.25, 0.5, 0.75] if sampling == "uniform" else [0.3375, 0.5, 0.6625]
    quartiles = (t / 1000).quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor(expected), atol=0.012, rtol=0)


def test_half_precision_samples_keep_float32_mathematics():
    x0, noise = batch()
    t = torch.full((6,), 500.0)
    exact, low = V.add_noise(x0, noise, t), V.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "v"}, r"prediction: expected one of .*'v_prediction'.*got 'v'"),
        ({"beta_schedule": "cosine"}, r"beta_schedule: expected one of .*got 'cosine'"),
        ({"timestep_sampling": "lognormal"}, r"timestep_sampling: expected one of"),
        ({"num_train_timesteps": 1}, r"num_train_timesteps: expected 2 or more, got 1"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma: expected a positive number, got 0"),
        ({"prediction": "epsilon"}, r"zero_terminal_snr: expected false with prediction 'epsilon'"),
        (
            {"prediction": "epsilon", "zero_terminal_snr": False, "beta_schedule": "squaredcos_cap_v2"},
            r"beta_schedule: expected 'scaled_linear' or 'linear' with prediction 'epsilon'",
        ),
    ],
)
def test_impossible_objectives_say_what_is_allowed(arguments, message):
    with pytest.raises(BadInputError, match=message):
        Objective(**arguments)
