import pytest
import torch
from torch import nn

from medgen.metrics import PRDC, prdc


def _pseudo_random(n: int, d: int, frequency: float, phase: float) -> torch.Tensor:
    """``(n, d)`` in [0, 1], the same on every machine."""
    index = torch.arange(n * d, dtype=torch.float64).reshape(n, d)
    return torch.frac(torch.sin(index * frequency + phase) * 43758.5453).abs()


def _sets(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _pseudo_random(n, 4, 12.9898, 1), _pseudo_random(m, 4, 78.233, 2) * 0.7 + 0.4


# Of the package prdc 0.2, by the authors of density and coverage; precision and recall also of torch-fidelity 0.4.0.
@pytest.mark.parametrize(
    ("n", "m", "k", "golden"),
    [(40, 30, 5, (0.9666666666666667, 0.6, 1.04, 0.7)), (25, 40, 3, (0.875, 0.44, 1.025, 0.72))],
)
def test_equals_the_published_implementations(n: int, m: int, k: int, golden: tuple[float, ...]) -> None:
    values = prdc(*_sets(n, m), nearest_k=k)
    assert list(values) == ["precision", "recall", "density", "coverage"]
    assert [value.item() for value in values.values()] == pytest.approx(golden, rel=1e-12)


def test_equals_a_double_loop_over_balls() -> None:
    x, y = _sets(15, 12)
    k = 2
    radius_x = [sorted(float((a - b).norm()) for b in x)[k] for a in x]
    radius_y = [sorted(float((a - b).norm()) for b in y)[k] for a in y]
    inside = [[float((a - b).norm()) <= r for b in y] for a, r in zip(x, radius_x, strict=True)]
    covered = [[float((a - b).norm()) <= r for b, r in zip(y, radius_y, strict=True)] for a in x]
    values = prdc(x, y, nearest_k=k)
    assert values["precision"].item() == pytest.approx(sum(map(any, zip(*inside, strict=True))) / 12)
    assert values["recall"].item() == pytest.approx(sum(map(any, covered)) / 15)
    assert values["density"].item() == pytest.approx(sum(map(sum, inside)) / (k * 12))
    assert values["coverage"].item() == pytest.approx(sum(map(any, inside)) / 15)


def test_far_sets_have_nothing_in_common_and_a_set_all_with_itself() -> None:
    x, y = _sets(20, 20)
    assert [value.item() for value in prdc(x, y + 100).values()] == [0, 0, 0, 0]
    itself = prdc(x, x)
    assert [itself[name].item() for name in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_a_copy_of_the_farthest_neighbor_is_on_the_border_and_so_inside() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    values = prdc(real, torch.tensor([[3.0], [3.0]]), nearest_k=1)
    # Balls: 0 to 1, 1 to 0, 3 to 1, 100 to 3 with radius 97: the border of the last one holds the copies of 3.
    assert values["coverage"].item() == 0.5
    assert values["density"].item() == 2


def test_moving_both_sets_far_away_changes_nothing() -> None:
    x, y = _sets(30, 30)
    near, far = prdc(x, y), prdc(x + 1e4, y + 1e4)
    assert [value.item() for value in near.values()] == [value.item() for value in far.values()]


def test_class_equals_the_function() -> None:
    images, synthetic = torch.rand(2, 12, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    metric = PRDC(nn.Flatten(), nearest_k=3)
    metric.update(images, real=True)
    metric.update(synthetic[:5], real=False)
    metric.update(synthetic[5:], real=False)
    expected = prdc(images.flatten(1), synthetic.flatten(1), nearest_k=3)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_refuses_fewer_scans_than_neighbors() -> None:
    with pytest.raises(ValueError, match=r"prdc: expected .* N, M >= 6"):
        prdc(*_sets(20, 5))
    with pytest.raises(ValueError, match="nearest_k: expected at least 1, got 0"):
        prdc(*_sets(20, 20), nearest_k=0)
    with pytest.raises(ValueError, match="nearest_k: expected at least 1, got 0"):
        PRDC(nn.Flatten(), nearest_k=0)
    metric = PRDC(nn.Flatten())
    metric.update(torch.rand(8, 1, 2, 2), real=True)
    metric.update(torch.rand(5, 1, 2, 2), real=False)
    with pytest.raises(ValueError, match=r"PRDC: expected at least 6 real and 6 synthetic scans, got \(8, 5\)"):
        metric.compute()
