import math

import pytest
import torch
from torch import nn

from medgen.metrics import GaussianKernelDistance, gaussian_kernel_distance


def _features(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _double_loop(x: torch.Tensor, y: torch.Tensor, *, unbiased: bool) -> float:
    """The estimator of the paper's implementation: every vector at unit norm, gamma = 1 / (2 * 10^2), times 1000."""

    def mean(a: torch.Tensor, b: torch.Tensor, *, same: bool) -> float:
        values = []
        for i, u in enumerate(a):
            for j, v in enumerate(b):
                if not (same and unbiased and i == j):
                    distance = float(((u / u.norm() - v / v.norm()) ** 2).sum())
                    values.append(math.exp(-distance / 200))
        return sum(values) / len(values)

    return 1000 * (mean(x, x, same=True) + mean(y, y, same=True) - 2 * mean(x, y, same=False))


@pytest.mark.parametrize("unbiased", [False, True])
def test_equals_a_double_loop(unbiased: bool) -> None:
    x, y = _features(8, 0), _features(5, 1) + 0.5
    expected = _double_loop(x, y, unbiased=unbiased)
    assert gaussian_kernel_distance(x, y, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_two_opposite_points() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    expected = 1000 * 2 * (1 - math.exp(-4 / 200))  # the points are at distance 2, whatever their norms
    assert gaussian_kernel_distance(x, -x).item() == pytest.approx(expected, rel=1e-12)


def test_a_set_and_itself_are_at_distance_zero() -> None:
    assert gaussian_kernel_distance(_features(9, 2), _features(9, 2)).item() == pytest.approx(0, abs=1e-10)


def test_class_averages_over_views() -> None:
    class TwoViews(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            flat = image.flatten(1)
            return torch.stack([flat, flat.flip(1) ** 2], dim=1)

    real, synthetic = torch.rand(2, 10, 1, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    metric = GaussianKernelDistance(TwoViews(), unbiased=True)
    metric.update(real, real=True)
    metric.update(synthetic, real=False)
    views = [
        gaussian_kernel_distance(x, y, unbiased=True)
        for x, y in zip(TwoViews()(real).unbind(1), TwoViews()(synthetic).unbind(1), strict=True)
    ]
    assert metric.compute().item() == pytest.approx((views[0] + views[1]).item() / 2, rel=1e-9)
