"""Guidance against its formula, with denoisers that record what they were asked."""

from __future__ import annotations

import pytest
import torch

from medgen.diffusion.guidance import guide
from medgen.types import BadInputError

NULL, CONDITION = (0.0, 0.0), (2.0, 3.0)


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


T = torch.tensor([500.0, 500.0])


def test_guided_output_is_unconditional_plus_scaled_difference(x):
    denoise = Denoiser()
    output = guide(denoise, CONDITION, NULL, guidance_scale=2.5)(x, T)
    torch.testing.assert_close(output, x + 2.5 * ((x * 3 + 3) - x))
    assert sorted(denoise.asked) == [NULL, CONDITION]


@pytest.mark.parametrize(("scale", "condition"), [(1.0, CONDITION), (0.0, NULL)])
def test_plain_and_unconditional_output_take_one_pass(x, scale, condition):
    denoise = Denoiser()
    output = guide(denoise, CONDITION, NULL, guidance_scale=scale)(x, T)
    assert denoise.asked == [condition]
    torch.testing.assert_close(output, Denoiser()(x, T, condition))


def test_guidance_acts_inside_its_interval_only(x):
    denoise = Denoiser()
    guided = guide(denoise, CONDITION, NULL, guidance_scale=4.0, interval=(200, 600))
    torch.testing.assert_close(guided(x, torch.tensor([700.0, 700.0])), x * 3 + 3)
    assert denoise.asked == [CONDITION]
    mixed = guided(x, torch.tensor([700.0, 500.0]))
    torch.testing.assert_close(mixed[0], x[0] * 3 + 3)
    torch.testing.assert_close(mixed[1], x[1] + 4 * (x[1] * 2 + 3))


def test_full_rescale_gives_each_sample_the_spread_of_the_conditional_output(x):
    x[1] *= 10
    plain = guide(Denoiser(), CONDITION, NULL)(x, T)
    rescaled = guide(Denoiser(), CONDITION, NULL, guidance_scale=7.5, rescale=1.0)(x, T)
    torch.testing.assert_close(rescaled.flatten(1).std(1), plain.flatten(1).std(1))
    half = guide(Denoiser(), CONDITION, NULL, guidance_scale=7.5, rescale=0.5)(x, T)
    none = guide(Denoiser(), CONDITION, NULL, guidance_scale=7.5)(x, T)
    torch.testing.assert_close(half, (none + rescaled) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale: expected a finite number of 0 or more, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"rescale": 1.5}, "rescale: expected a share from 0 to 1, got 1.5"),
        ({"interval": (600, 200)}, r"interval: expected \(low, high\) with low <= high"),
    ],
)
def test_impossible_guidance_is_refused(arguments, message):
    with pytest.raises(BadInputError, match=message):
        guide(Denoiser(), CONDITION, NULL, **arguments)
