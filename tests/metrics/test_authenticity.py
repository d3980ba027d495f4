import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, norm

from medgen.metrics import auth_pct, c_t


def _features(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_auth_pct_follows_the_definition_pair_by_pair() -> None:
    train, synthetic = _features(30).numpy(), _features(25, seed=1).numpy()
    authentic = 0
    for row in synthetic:
        nearest = min(range(len(train)), key=lambda i: float(np.linalg.norm(train[i] - row)))
        around = min(float(np.linalg.norm(train[i] - train[nearest])) for i in range(len(train)) if i != nearest)
        authentic += float(np.linalg.norm(train[nearest] - row)) > around
    value = auth_pct(torch.from_numpy(train), torch.from_numpy(synthetic)).item()
    assert 0 < authentic < 25
    assert value == pytest.approx(100 * authentic / 25)


def test_auth_pct_by_hand() -> None:
    train = torch.tensor([[0.0], [1.0], [10.0]])
    synthetic = torch.tensor([[0.4], [-1.5], [10.0], [30.0]])  # distances 0.4, 1.5, 0 and 20; bounds 1, 1, 9 and 9
    assert auth_pct(train, synthetic).item() == 50


def test_one_cell_is_the_z_score_of_the_mann_whitney_test() -> None:
    train, held_out, synthetic = _features(50), _features(40, seed=1), 0.8 * _features(60, seed=2)
    nearest = [torch.cdist(rows, train).amin(dim=1).numpy() for rows in (held_out, synthetic)]
    test = mannwhitneyu(nearest[1], nearest[0], alternative="less", method="asymptotic", use_continuity=False)
    assert c_t(train, held_out, synthetic, num_cells=1).item() == pytest.approx(norm.ppf(test.pvalue), rel=1e-9)


def test_ties_count_half() -> None:
    train = torch.tensor([[0.0], [0.0]])
    held_out, synthetic = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [3.0]])
    # Pairs (synthetic, held-out): 1-1 tie, 1-2 less, 3-1 and 3-2 more, so U is 2.5 of 4.
    expected = (2.5 - 2) / math.sqrt(2 * 2 * 5 / 12)
    assert c_t(train, held_out, synthetic, num_cells=1).item() == pytest.approx(expected)


def test_cells_are_weighted_by_their_held_out_scans() -> None:
    places = torch.tensor([[0.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    train = [_features(30, 2, 0), _features(30, 2, 1) + places[1]]
    held_out = [_features(10, 2, 2), _features(30, 2, 3) + places[1]]
    synthetic = [0.5 * _features(25, 2, 4), 2 * _features(25, 2, 5) + places[1]]
    alone = [c_t(t, h, s, num_cells=1).item() for t, h, s in zip(train, held_out, synthetic, strict=True)]
    together = c_t(torch.cat(train), torch.cat(held_out), torch.cat(synthetic), num_cells=2).item()
    assert alone[0] < 0 < alone[1]
    assert together == pytest.approx((10 * alone[0] + 30 * alone[1]) / 40)
    # Without enough synthetic scans the second cell does not count.
    few = torch.cat([synthetic[0], synthetic[1][:2]])
    assert c_t(torch.cat(train), torch.cat(held_out), few, num_cells=2, least_share=0.1).item() == pytest.approx(
        alone[0]
    )


def test_tells_copies_from_new_and_from_misplaced_scans() -> None:
    train, held_out = _features(200), _features(100, seed=1)
    copies = train[:100] + 0.01 * _features(100, seed=2)
    assert c_t(train, held_out, copies).item() < -5
    assert abs(c_t(train, held_out, _features(100, seed=3)).item()) < 2
    assert c_t(train, held_out, 2 * _features(100, seed=4)).item() > 3
    assert auth_pct(train, copies).item() == 0
    assert auth_pct(train, _features(100, seed=3)).item() > 30
    assert c_t(train, held_out, copies, seed=1) == c_t(train, held_out, copies, seed=1)


def test_refuses_what_has_no_answer() -> None:
    x = _features(5)
    with pytest.raises(ValueError, match=r"auth_pct: expected \(N, D\) and \(M, D\)"):
        auth_pct(x, x[:, :2])
    with pytest.raises(ValueError, match="c_t: expected finite features"):
        c_t(x, x, x * float("nan"))
    with pytest.raises(ValueError, match="expected 1 to 5, the training scans, got 6"):
        c_t(x, x, x, num_cells=6)
    with pytest.raises(ValueError, match="expected a cell with held-out scans"):
        c_t(x, x, x, num_cells=2, least_share=1.1)
