from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from medgen.metrics import Memorization, find_copies
from medgen.metrics.descriptor import describe


def _scans(n: int, seed: int = 0, size: int = 24, channels: int = 1) -> torch.Tensor:
    own = torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(own, size=(size, size), mode="bilinear")


def _metric(real: torch.Tensor, synthetic: torch.Tensor, **settings: object) -> Memorization:
    metric = Memorization(**settings)  # type: ignore[arg-type]
    metric.update(real, real=True)
    metric.update(synthetic, real=False)
    return metric


def test_counts_copies_whatever_the_batches() -> None:
    real = _scans(30)
    synthetic = torch.cat([real[:3].flip(3) * 5 + 100, _scans(9, seed=1)])
    metric = Memorization()
    for batch in real.split(7):
        metric.update(batch, real=True)
    for batch in synthetic.split(5):
        metric.update(batch, real=False)
    result = metric.compute()
    assert result["copies"].item() == 3 / 12
    assert result["real_copies"].item() == 0
    found = metric.search()
    assert found.is_copy.tolist() == [True] * 3 + [False] * 9
    assert found.closest.index[:3].tolist() == [0, 1, 2]
    whole = find_copies(describe(real), describe(synthetic))
    torch.testing.assert_close(found.closest.similarity, whole.closest.similarity, atol=2e-3, rtol=0)
    low, middle, high = result["nearest_ratio_quantiles"].tolist()
    assert low < 0.1 < 0.8 < middle < high
    assert result["auth_pct"].item() == pytest.approx(100 * (found.ratio > 1).double().mean().item())
    assert all(value.dtype == torch.float64 for value in result.values())


def test_a_copy_among_the_real_scans_is_told_apart_by_groups() -> None:
    real = _scans(30)
    real[29] = real[0]
    assert _metric(real, _scans(3, seed=1)).compute()["real_copies"].item() == pytest.approx(2 / 30)
    metric = Memorization()
    metric.update(real, real=True, groups=[f"patient {i % 29}" for i in range(30)])
    metric.update(_scans(3, seed=1), real=False)
    assert metric.compute()["real_copies"].item() == 0


def test_memory_does_not_depend_on_the_size_of_the_scans() -> None:
    sizes = []
    for size in (16, 200):
        metric = Memorization()
        metric.update(_scans(2, size=size, channels=3), real=True)
        sizes.append(sum(state.numel() * state.element_size() for state in metric.real_descriptors))
    assert sizes == [2 * 3 * 8 * 1024] * 2
    metric = Memorization()
    metric.update(torch.rand(1, 1, 9, 8, 7, generator=torch.Generator().manual_seed(0)), real=True)
    assert sum(state.numel() * state.element_size() for state in metric.real_descriptors) == 64 * 1024


def test_reset_can_keep_the_real_scans() -> None:
    metric = _metric(_scans(25), _scans(4, seed=1), reset_real_features=False)
    first = metric.compute()
    metric.reset()
    metric.update(_scans(4, seed=1), real=False)
    assert metric.compute()["nearest_ratio_quantiles"].tolist() == first["nearest_ratio_quantiles"].tolist()
    metric = _metric(_scans(25), _scans(4, seed=1))
    metric.reset()
    metric.update(torch.rand(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), real=True)


_PROCESS = """
from torch.nn import functional as F
from medgen.metrics import Memorization

def scans(n, seed):
    own = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(own, size=(24, 24), mode="bilinear")
real, synthetic = scans(30, 0), torch.cat([scans(30, 0)[:3].flip(3), scans(5, 1)])
metric = Memorization()
if rank == 0:  # the other process has no real scans
    metric.update(real[:10], real=True, groups=range(10))
    metric.update(real[10:], real=True, groups=range(10, 30))
    metric.update(synthetic[:2], real=False)
else:
    metric.update(synthetic[2:], real=False)
values = {name: value.tolist() for name, value in metric.compute().items()}
search = metric.search()
metric.update(synthetic[:1], real=False)  # after compute each process has its own states again
found = [values, search.closest.index.tolist(), sum(len(s) for s in metric.synthetic_descriptors) // 4096]
"""


def test_states_of_two_processes_add_up(two_processes: Callable[[str], list[Any]]) -> None:
    metric = Memorization()
    metric.update(_scans(30), real=True, groups=range(30))
    metric.update(torch.cat([_scans(30)[:3].flip(3), _scans(5, seed=1)]), real=False)
    expected = {name: value.tolist() for name, value in metric.compute().items()}
    for (values, index, synthetic), kept in zip(two_processes(_PROCESS), (3, 7), strict=True):
        assert values == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
        assert index == metric.search().closest.index.tolist()
        assert synthetic == kept


def test_refuses_sets_that_do_not_compare() -> None:
    metric = Memorization()
    metric.update(_scans(3), real=True)
    for other in (_scans(2, channels=3), torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))):
        with pytest.raises(
            ValueError, match=r"expected synthetic scans in 2D with 1 channel\(s\) as those before, got "
        ):
            metric.update(other, real=False)
    other_way = Memorization()
    other_way.update(_scans(3), real=False)
    with pytest.raises(ValueError, match=r"expected real scans in 2D with 1 channel\(s\)"):
        other_way.update(_scans(3, channels=2), real=True)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric.update(_scans(2) * float("nan"), real=False)
    with pytest.raises(ValueError, match="constant"):
        metric.update(torch.ones(2, 1, 8, 8), real=False)
    with pytest.raises(ValueError, match="expected one for each of 3 real scans, got 2 for real ones"):
        metric.update(_scans(3), real=True, groups=["a", "b"])
    with pytest.raises(ValueError, match="Give groups with real scans only"):
        metric.update(_scans(2), real=False, groups=["a", "b"])
    metric.update(_scans(1), real=False)
    with pytest.raises(ValueError, match=r"at least 2 real and 2 synthetic scans, got \(3, 1\)"):
        metric.compute()
    with pytest.raises(TypeError, match="got a call of the metric"):
        metric(_scans(2), real=True)
    for settings, message in (({"grid": 18}, "multiple of 4"), ({"false_alarm_rate": 2}, "at most 0.5")):
        with pytest.raises(ValueError, match=message):
            Memorization(**settings)  # type: ignore[arg-type]


def test_the_example_of_the_docstring() -> None:
    scans = torch.rand(30, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert _metric(scans[:25], scans[20:].flip(-1)).compute()["copies"].item() == 0.5
