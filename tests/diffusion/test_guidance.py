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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale: expected a finite number of 0 or more, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
    ],
)
def test_impossible_guidance_is_refused(arguments, message):
    with pytest.raises(BadInputError, match=message):
        guide(Denoiser(), CONDITION, NULL, **arguments)
