import pytest
import torch

from medgen.metrics.resampling import draw_half, draw_halves, draw_subset, group_rows, relabel
from medgen.seeding import stream

GROUPS = [[0, 1, 2], [3], [4, 5], [6, 7], [8, 9, 10], [11]]


def test_groups_in_order_of_appearance() -> None:
    assert group_rows(["b", "a", "b"], 3, offset=10, name="groups") == [[10, 12], [11]]
    assert group_rows(None, 3, offset=10, name="groups") == [[10], [11], [12]]
    with pytest.raises(ValueError, match="real_groups: expected one identifier for each of 3 scans, got 2"):
        group_rows([1, 2], 3, name="real_groups")


def _is_whole(rows: torch.Tensor) -> bool:
    chosen = set(rows.tolist())
    return all(set(group) <= chosen or not set(group) & chosen for group in GROUPS)


def test_half_and_halves_keep_groups_together() -> None:
    for seed in range(20):
        half = draw_half(GROUPS, stream(seed))
        assert _is_whole(half)
        x, y = draw_halves(GROUPS, stream(seed))
        assert _is_whole(x)
        assert sorted([*x.tolist(), *y.tolist()]) == list(range(12))
        assert abs(len(x) - len(y)) <= 2


def test_subset_has_the_asked_size() -> None:
    for size in range(1, 13):
        rows = draw_subset(GROUPS, size, stream(size))
        assert len(set(rows.tolist())) == size


def test_relabeling_moves_whole_groups_and_meets_the_size_as_nearly_as_it_can() -> None:
    for seed in range(20):
        x, y = relabel(GROUPS, 6, stream(seed))
        assert _is_whole(x)
        assert sorted([*x.tolist(), *y.tolist()]) == list(range(12))
        assert 4 <= len(x) <= 8
    x, _ = relabel([[row] for row in range(9)], 4, stream(0))
    assert len(x) == 4
    assert all(len(side) for side in relabel(GROUPS, 12, stream(1)))


def test_draws_depend_on_the_seed_alone() -> None:
    assert torch.equal(draw_half(GROUPS, stream(3)), draw_half(GROUPS, stream(3)))
    assert any(not torch.equal(draw_half(GROUPS, stream(3)), draw_half(GROUPS, stream(seed))) for seed in range(4, 9))
