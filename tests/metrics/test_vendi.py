import math

import pytest
import torch
from torch import nn

from medgen.metrics import VendiScore, vendi_score


def _features(m: int) -> torch.Tensor:
    """``(m, 4)``, the same on every machine."""
    index = torch.arange(m * 4, dtype=torch.float64).reshape(m, 4)
    return torch.frac(torch.sin(index * 78.233 + 2) * 43758.5453).abs() * 0.7 + 0.4


# Of the package vendi-score 0.0.3, by the authors of the score.
@pytest.mark.parametrize(
    ("m", "order", "golden"),
    [
        (30, 1, 1.2498761103176093),
        (30, 2, 1.0917020192512006),
        (30, 0.5, 1.7759671343177974),
        (30, math.inf, 1.045247706116696),
        (40, 1, 1.27834790504178),
    ],
)
def test_equals_the_published_implementation(m: int, order: float, golden: float) -> None:
    # That package counts rounding noise in place of zero eigenvalues, which with q = 0.5 moves the eighth digit.
    assert vendi_score(_features(m), order=order).item() == pytest.approx(golden, rel=1e-7)


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, math.inf])
def test_counts_scans_that_have_nothing_in_common(order: float) -> None:
    eye = torch.eye(5, dtype=torch.float64) * torch.arange(1, 6)
    assert vendi_score(eye, order=order).item() == pytest.approx(5, rel=1e-9)
    assert vendi_score(torch.cat([eye, eye, eye]), order=order).item() == pytest.approx(5, rel=1e-9)
    assert vendi_score(torch.ones(7, 3), order=order).item() == pytest.approx(1, rel=1e-9)


def test_closed_form_of_two_vectors_at_an_angle() -> None:
    angle = 0.7
    values = torch.tensor([1 + math.cos(angle), 1 - math.cos(angle)]) / 2
    expected = torch.exp(-(values * values.log()).sum()).item()
    x = torch.tensor([[1.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]])
    assert vendi_score(x).item() == pytest.approx(expected, rel=1e-6)


def test_class_scores_either_set_alone() -> None:
    images = _features(30).view(30, 1, 2, 2)
    metric = VendiScore(nn.Flatten())
    metric.update(images, real=False)
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(
        {"synthetic": 1.2498761103176093}, rel=1e-6
    )
    metric.update(images[:10], real=True)
    assert metric.compute()["real"].item() == pytest.approx(vendi_score(_features(30)[:10]).item(), rel=1e-6)


def test_refuses_bad_orders_and_empty_sets() -> None:
    with pytest.raises(ValueError, match=r"order: expected at least 0, got -1"):
        vendi_score(_features(5), order=-1)
    with pytest.raises(ValueError, match=r"order: expected at least 0, got nan"):
        VendiScore(nn.Flatten(), order=float("nan"))
    with pytest.raises(ValueError, match=r"VendiScore: expected at least 2 scans of one set, got \(0, 0\)"):
        VendiScore(nn.Flatten()).compute()
