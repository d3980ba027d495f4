"""What benchmarks decide by themselves: which scans count, which draws may be compared, and by what share."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medgen.data.case import Case
from medgen.trial.analysis import difference

GATES = {"pairs": 60, "accepted": 56, "reasons": {}}
SETTINGS = {"steps": 600, "ratios": (0.25, 1.0)}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module


def test_a_draw_is_read_as_it_was_measured_and_not_stamped_anew(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folds = script("folds")
    monkeypatch.setattr(folds, "ROOT", tmp_path)
    scores = {"real": torch.rand(3, 4, 2, dtype=torch.float64)}
    scores["real"][1, 2, 0] = torch.nan
    path = folds.fold_file("trial", 0)
    path.parent.mkdir(parents=True)
    folds.write_fold(path, folds.Fold(GATES, {"arms": {}}, scores, ["a", "b", "c", "d"]), SETTINGS)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "commit": "that of then"}))
    kept = folds.read_fold(path, SETTINGS)
    assert torch.allclose(kept.scores["real"].double(), scores["real"], equal_nan=True)
    assert (kept.gates, kept.groups, kept.measured_by["commit"]) == (GATES, ["a", "b", "c", "d"], "that of then")
    with pytest.raises(SystemExit, match=r"expected a draw with \{'steps': 700\}, got .*600.*Remove the file"):
        folds.read_fold(path, {"steps": 700})
    assert folds.read_fold(folds.fold_file("trial", 1), SETTINGS) is None


def test_draws_are_joined_only_with_the_same_patients_and_recipe(script: Callable[[str], ModuleType]) -> None:
    folds = script("folds")
    recipe = {"steps": 600, "patch": [32, 32]}
    first = folds.Fold(GATES, {"recipe": {"steps": 600, "patch": [16, 32]}}, {}, ["a", "b"])
    folds.require_one_kind({0: first, 1: first}, recipe)  # patches fit the scans of a draw
    with pytest.raises(SystemExit, match=r"draw 2: expected the test patients of the first draw"):
        folds.require_one_kind({0: first, 2: folds.Fold(GATES, first.result, {}, ["a", "c"])}, recipe)
    with pytest.raises(SystemExit, match=r"draw 0: expected segmenters trained by .*500.*, got .*600"):
        folds.require_one_kind({0: first}, {"steps": 500})


def test_test_scans_that_are_training_scans_do_not_count(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    cases = []
    for name, content in {"a": b"1", "b": b"2", "c": b"1"}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        cases.append(Case(case=name, images=[path]))
    assert script("common").unseen(cases[1:], cases[:1]) == [cases[1]]


def test_the_interval_of_a_share_is_what_a_paired_test_does_not_refuse(
    script: Callable[[str], ModuleType],
) -> None:
    """Fieller's interval, whose ends are where the difference to that share of the gap is just significant."""
    utility = script("utility")
    noise = torch.Generator().manual_seed(0)
    floor = 0.5 + 0.1 * torch.randn(9, 12, 1, generator=noise, dtype=torch.float64)
    ceiling = 0.9 + 0.01 * torch.randn(3, 12, 1, generator=noise, dtype=torch.float64)
    arm = 0.7 + 0.1 * torch.randn(9, 12, 1, generator=noise, dtype=torch.float64)
    groups, clusters = [f"p{row}" for row in range(12)], [row // 3 for row in range(9)]
    found = utility.share_of_gap(arm, floor, ceiling, groups, clusters)
    gap = float(ceiling.mean() - floor.mean())
    assert found["share_of_gap"] == pytest.approx(float(arm.mean() - floor.mean()) / gap)
    low, high = found["share_of_gap_interval"]
    assert low < found["share_of_gap"] < high
    top = ceiling.mean(dim=0).expand_as(arm)
    for share, refused in ((low, False), (high, False), (low - 0.011, True), (high + 0.011, True)):
        p = difference(arm, floor + share * (top - floor), groups, clusters).p
        assert (p < 0.05) == refused
    # Where there may be no gap, a share has no end.
    for little in (0.0, 0.05):
        alike = floor + little * torch.randn(9, 12, 1, generator=noise, dtype=torch.float64) + 1e-4
        assert utility.share_of_gap(arm, floor, alike, groups, clusters)["share_of_gap_interval"] is None
    sure = [level + torch.zeros(9, 12, 1, dtype=torch.float64) for level in (0.7, 0.5, 0.9)]
    found = utility.share_of_gap(*sure, groups, clusters)
    assert found["share_of_gap_interval"] == pytest.approx((0.5, 0.5))


def test_spread_tells_trainings_from_draws(script: Callable[[str], ModuleType]) -> None:
    means = torch.tensor([0.1, 0.3, 0.5, 0.7])
    found = script("utility").spread(means[:, None, None].expand(4, 5, 1), [0, 0, 1, 1])
    assert found["std_over_trainings"] == pytest.approx(0.02**0.5)
    assert found["std_over_draws"] == pytest.approx(0.08**0.5)
