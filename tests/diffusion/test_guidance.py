"""Guidance against its formulas, with denoisers that record what they were asked."""

from __future__ import annotations

import pytest
import torch

from medgen.diffusion.guidance import Guided
from medgen.types import BadInputError

NULL, MASK, BOTH = (0.0, 0.0), (2.0, 0.0), (2.0, 3.0)


class Denoiser:
    """Linear in a condition of two parts, and in the state."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, condition: tuple[float, float]) -> torch.Tensor:
        self.asked.append(condition)
        return x * (1 + condition[0]) + condition[1]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def times(value: float) -> torch.Tensor:
    return torch.tensor([value, value])


T = times(500)


def test_one_scale_gives_unconditional_plus_scaled_difference(x):
    denoise = Denoiser()
    guided = Guided(denoise, [NULL, BOTH], [2.5])
    torch.testing.assert_close(guided(x, T), x + 2.5 * ((x * 3 + 3) - x))
    assert sorted(denoise.asked) == [NULL, BOTH]
    assert guided.evaluations == guided.passes(500) == 2


def test_two_scales_give_nested_differences(x):
    denoise = Denoiser()
    found = Guided(denoise, [NULL, MASK, BOTH], [1.5, 4.0])(x, T)
    expected = x + 1.5 * (3 * x - x) + 4.0 * ((3 * x + 3) - 3 * x)  # Brooks et al. 2023, equation 3
    torch.testing.assert_close(found, expected)
    assert sorted(denoise.asked) == [NULL, MASK, BOTH]


@pytest.mark.parametrize(
    ("scales", "asked"),
    [
        ([1.0, 1.0], [BOTH]),
        ([0.0, 0.0], [NULL]),
        ([1.0, 0.0], [MASK]),
        ([3.0, 3.0], [NULL, BOTH]),
        ([1.0, 3.0], [MASK, BOTH]),
        ([3.0, 0.0], [NULL, MASK]),
    ],
)
def test_passes_that_cancel_are_not_made(x, scales, asked):
    denoise = Denoiser()
    found = Guided(denoise, [NULL, MASK, BOTH], scales)(x, T)
    assert sorted(denoise.asked) == sorted(asked)
    e = [Denoiser()(x, T, condition) for condition in (NULL, MASK, BOTH)]
    torch.testing.assert_close(found, e[0] + scales[0] * (e[1] - e[0]) + scales[1] * (e[2] - e[1]))


def test_outside_its_interval_guidance_is_off(x):
    denoise = Denoiser()
    guided = Guided(denoise, [NULL, BOTH], [3.0], interval=(0.2, 0.8), num_train_timesteps=1000)
    for value, passes in ((100, 1), (200, 2), (500, 2), (801, 1)):
        assert guided.passes(value) == passes
        found = guided(x, times(value))
        expected = 3 * x + 3 if passes == 1 else x + 3 * (2 * x + 3)
        torch.testing.assert_close(found, expected)
    assert guided.evaluations == 6


def test_rescaling_gives_back_the_conditional_standard_deviation(x):
    plain = Guided(Denoiser(), [NULL, BOTH], [4.0])(x, T)
    whole = Guided(Denoiser(), [NULL, BOTH], [4.0], rescale=1.0)(x, T)
    conditional = 3 * x + 3
    torch.testing.assert_close(whole.std((1, 2, 3)), conditional.std((1, 2, 3)))
    torch.testing.assert_close(whole / whole.std((1, 2, 3), keepdim=True), plain / plain.std((1, 2, 3), keepdim=True))
    part = Guided(Denoiser(), [NULL, BOTH], [4.0], rescale=0.7)(x, T)  # equation 16
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain)


def test_rescaling_asks_for_the_output_with_all_conditions(x):
    denoise = Denoiser()
    Guided(denoise, [NULL, MASK, BOTH], [3.0, 0.0], rescale=0.5)(x, T)
    assert sorted(denoise.asked) == [NULL, MASK, BOTH]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": [-1.0]}, "guidance_scale: expected a finite number of 0 or more, got -1"),
        ({"scales": [float("nan")]}, "guidance_scale: expected a finite number"),
        ({"interval": (0.8, 0.2)}, r"guidance_interval: expected two rising shares .* got \[0.8, 0.2\]"),
        ({"interval": (0.0, 1.5)}, "guidance_interval: expected two rising shares"),
        ({"rescale": 1.5}, r"guidance_rescale: expected a share in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_guidance_is_refused(arguments, message):
    with pytest.raises(BadInputError, match=message):
        Guided(Denoiser(), [NULL, BOTH], **{"scales": [1.0], **arguments})
