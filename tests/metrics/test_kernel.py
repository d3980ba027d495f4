import itertools

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from medgen.metrics import KernelDistance, kernel_distance


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equals_a_double_loop_over_pairs_of_sets_of_unequal_size() -> None:
    x, y = _features(7, 5, 0), _features(4, 5, 1) + 0.3

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    xx = [k(x[i], x[j]) for i, j in itertools.permutations(range(7), 2)]
    yy = [k(y[i], y[j]) for i, j in itertools.permutations(range(4), 2)]
    xy = [k(a, b) for a in x for b in y]
    expected = sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)
    assert kernel_distance(x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"degree": 2, "gamma": 0.1, "coef": 0.5}])
def test_equals_the_torchmetrics_formula(settings: dict[str, float]) -> None:
    x, y = _features(30, 8, 2), _features(30, 8, 3) * 1.2
    ours = kernel_distance(x, y, **settings).item()  # type: ignore[arg-type]
    assert ours == pytest.approx(poly_mmd(x, y, **settings).item(), rel=1e-9)  # type: ignore[arg-type]


def test_class_equals_torchmetrics_with_one_subset_of_all_scans() -> None:
    images, synthetic = torch.rand(2, 20, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    extractor = nn.Flatten()
    extractor.num_features = 9
    metric, oracle = KernelDistance(nn.Flatten()), KernelInceptionDistance(extractor, subsets=1, subset_size=20)
    for module in (metric, oracle):
        module.update(images, real=True)
        module.update(synthetic**2, real=False)
    assert metric.compute().item() == pytest.approx(oracle.compute()[0].item(), rel=1e-4)  # oracle is in float32


def test_is_zero_on_average_for_equal_distributions_and_may_be_negative() -> None:
    values = torch.stack([kernel_distance(_features(20, 6, 2 * i), _features(20, 6, 2 * i + 1)) for i in range(200)])
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
