import pytest
import torch

from medgen.metrics import (
    frechet_distance_from_features,
    gaussian_kernel_distance,
    kernel_distance,
    prdc,
    vendi_score,
)
from medgen.metrics.distances import NAMES, Pool, build_distance, from_function


def _pool(d: int, p: int = 60) -> Pool:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1) ** -0.5
    return Pool(torch.randn(p, d, generator=generator, dtype=torch.float64) * scale + 3)


def _pairs(p: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(20, 30), (9, 12), (30, 30), (40, 11)]
    return [torch.randperm(p, generator=generator)[: n + m].split([n, m]) for n, m in sizes]  # type: ignore[misc]


def _direct(name: str, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    if name == "prdc":
        return [value.item() for value in prdc(x, y).values()]
    functions = {
        "frechet": frechet_distance_from_features,
        "kernel": kernel_distance,
        "gaussian_kernel": gaussian_kernel_distance,
        "vendi": lambda _, y: vendi_score(y),
    }
    return [functions[name](x, y).item()]


@pytest.mark.parametrize("d", [5, 200])
@pytest.mark.parametrize("name", NAMES)
def test_any_two_subsets_of_the_pool_give_what_their_features_give(name: str, d: int) -> None:
    pool, distance = _pool(d), build_distance(name)
    values = distance.evaluate(pool, _pairs())
    for value, (x, y) in zip(values, _pairs(), strict=True):
        assert value.tolist() == pytest.approx(_direct(name, pool.features[x], pool.features[y]), rel=1e-7)


def test_the_reported_frechet_distance_is_exact() -> None:
    distance, pool = build_distance("frechet"), _pool(200)
    (x, y), *_ = _pairs()
    assert distance.exact is not None
    expected = frechet_distance_from_features(pool.features[x], pool.features[y]).item()
    assert distance.exact(pool, [(x, y)]).item() == pytest.approx(expected, rel=1e-12)


def test_neighbors_that_lie_beyond_the_sorted_ones_are_found() -> None:
    # 300 scans of one cloud; the rows of a far one are each other's neighbors only after all of the near cloud.
    features = torch.cat([torch.randn(300, 3), 5 + 5 * torch.randn(12, 3)]).double()
    rows = torch.arange(300, 312)
    distance, pool = build_distance("prdc"), Pool(features)
    value = distance.evaluate(pool, [(rows[:6], rows[6:])])[0]
    assert value.tolist() == pytest.approx(_direct("prdc", features[300:306], features[306:]))


def test_a_users_function_becomes_a_distance() -> None:
    distance = from_function("shift", lambda x, y: (x.mean() - y.mean()).abs())
    pool = _pool(4)
    (x, y), *_ = _pairs()
    expected = (pool.features[x].mean() - pool.features[y].mean()).abs().item()
    assert distance.evaluate(pool, [(x, y)]).tolist() == [[pytest.approx(expected)]]


def test_refuses_names_that_do_not_exist() -> None:
    with pytest.raises(
        ValueError, match="distance: expected one of frechet, kernel, gaussian_kernel, prdc, vendi, got 'fid'"
    ):
        build_distance("fid")
    with pytest.raises(ValueError, match="nearest_k: expected at least 1, got 0"):
        build_distance("prdc", nearest_k=0)
