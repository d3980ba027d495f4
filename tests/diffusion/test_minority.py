"""Minority guidance against gradients worked out by hand, and against the density of a mixture that is known."""

from __future__ import annotations

import math

import pytest
import torch

from medgen.diffusion.guidance import Guided
from medgen.diffusion.minority import EVERY, RENOISE, MinorityGuidance
from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import sample, sampler_names
from medgen.seeding import seeded_noise
from medgen.types import BadInputError

OBJECTIVES = [
    Objective(prediction="flow"),
    Objective(prediction="v_prediction"),
    Objective(prediction="epsilon", zero_terminal_snr=False),
]


def mixture(objective: Objective, centers: torch.Tensor, weights: torch.Tensor, width: float):
    """Best network for points drawn around centers, from E[x_0 | x_t] and the definition of its target."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value.view(-1, 1, 1) for value in objective.alpha_sigma(t))
        variance = alpha**2 * width**2 + sigma**2
        error = x - alpha * centers  # (B, 1, centers)
        share = torch.softmax(weights.log() - error.square() / (2 * variance), dim=-1)
        x0 = (share * (centers + alpha * width**2 / variance * error)).sum(-1, keepdim=True)
        noise = (x - alpha * x0) / sigma
        return {"flow": noise - x0, "v_prediction": alpha * noise - sigma * x0, "epsilon": noise}[objective.prediction]

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.prediction)
def test_the_move_is_the_gradient_of_the_round_trip(objective):
    generator = torch.Generator().manual_seed(0)
    slope = torch.rand(3, 1, 6, generator=generator) + 0.5
    x, noise = torch.randn(2, 3, 1, 6, generator=generator).unbind()
    t = torch.full((3,), 600.0)

    def predict_x0(x, t):
        return slope * x + 0.1 * t.view(-1, 1, 1) / 1000

    guidance = MinorityGuidance(0.7, noise, objective)
    moved = guidance(predict_x0, x, t, 0)
    alpha, sigma = (float(value[0]) for value in objective.alpha_sigma(torch.tensor([RENOISE * 1000])))
    x0 = slope * x + 0.06
    again = slope * (alpha * x0 + sigma * noise) + 0.08
    gradient = slope * (x0 - again)  # up to a factor; the second estimate is held
    direction = gradient / gradient.square().mean((1, 2), keepdim=True).sqrt()
    alpha_t, sigma_t = (float(value[0]) for value in objective.alpha_sigma(t))
    variance = (sigma_t / (alpha_t + sigma_t)) ** 2
    torch.testing.assert_close(moved, x0 + 0.7 * variance * direction)
    # Until the next gradient the direction is kept, whatever the state.
    later = guidance(predict_x0, -x, t, 1)
    torch.testing.assert_close(later, slope * -x + 0.06 + 0.7 * variance * direction)
    assert not torch.allclose(guidance(predict_x0, -x, t, EVERY) - slope * -x, later - slope * -x)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.prediction)
def test_more_samples_come_from_the_rare_part_of_a_mixture(objective):
    centers, weights = torch.tensor([-1.0, 1.0]), torch.tensor([0.95, 0.05])
    denoise = mixture(objective, centers, weights, width=0.1)
    noise, again = torch.randn(2, 1000, 1, 1, generator=torch.Generator().manual_seed(1)).unbind()
    shares = []
    for scale in (0.0, 2.0):
        minority = MinorityGuidance(scale, again, objective)
        made = sample(denoise, noise, objective=objective, minority=minority)
        shares.append(float((made > 0).float().mean()))
        near = (made - centers).abs().min(dim=-1).values
        assert float((near < 0.5).float().mean()) > 0.95  # it goes to the rare part, not beyond the data
    assert shares[0] == pytest.approx(0.05, abs=0.02)
    assert shares[1] > 3 * shares[0]


@pytest.mark.parametrize("sampler", sampler_names(OBJECTIVES[0]))
def test_scale_0_changes_nothing_and_a_sample_does_not_depend_on_the_others(sampler):
    objective = OBJECTIVES[0]

    def denoise(x, t):
        return torch.tanh(x * torch.linspace(0.5, 2, 16).view(4, 4)) + t.view(-1, 1, 1, 1) / 1000

    noise, again = seeded_noise((2, 4, 4), [1, 2, 3]), seeded_noise((2, 4, 4), [4, 5, 6])

    def run(rows, scale):
        minority = None if scale is None else MinorityGuidance(scale, again[rows], objective)
        return sample(denoise, noise[rows], objective=objective, sampler=sampler, minority=minority)

    together = run([0, 1, 2], 0.5)
    torch.testing.assert_close(run([0, 1, 2], 0.0), run([0, 1, 2], None), rtol=0, atol=0)
    assert not torch.allclose(together, run([0, 1, 2], None), atol=1e-2)
    torch.testing.assert_close(run([2], 0.5), together[2:])


def test_each_fourth_step_makes_one_more_pass_for_each_output_of_the_guidance():
    guided = Guided(lambda x, t, part: part * x, [0.5, 0.25], [2.0])
    minority = MinorityGuidance(1.0, torch.ones(1, 1, 2), OBJECTIVES[0])
    sample(guided, torch.ones(1, 1, 2), objective=OBJECTIVES[0], num_inference_steps=9, minority=minority)
    assert guided.evaluations == 2 * (9 + math.ceil(9 / EVERY))


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_a_scale_that_cannot_be_is_refused(scale):
    with pytest.raises(BadInputError, match="minority_scale: expected a finite number of 0 or more, got"):
        MinorityGuidance(scale, torch.zeros(1, 1, 2), OBJECTIVES[0])


def test_inference_mode_is_refused():
    minority = MinorityGuidance(1.0, torch.zeros(1, 1, 2), OBJECTIVES[0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"got torch.inference_mode. Use torch.no_grad"):
        sample(lambda x, t: x, torch.ones(1, 1, 2), objective=OBJECTIVES[0], minority=minority)
