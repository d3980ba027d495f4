"""Paired differences against scipy, and words that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from medgen.trial.analysis import adjust, difference, mean_score
from medgen.trial.words import verdict

NAN = math.nan


def test_the_mean_weighs_classes_alike_and_leaves_out_what_a_scan_does_not_show() -> None:
    scores = torch.tensor([[[0.5, NAN], [0.7, 0.2], [NAN, NAN]], [[0.7, NAN], [0.9, 0.4], [NAN, NAN]]])
    assert mean_score(scores) == pytest.approx((0.7 + 0.3) / 2)


def test_with_equal_runs_it_is_the_t_test_of_patients_and_with_equal_patients_that_of_runs() -> None:
    rng = np.random.default_rng(0)
    by_patient, by_run = rng.normal(0.02, 0.05, (1, 11, 1)), rng.normal(0.02, 0.05, (4, 1, 1))
    for varying, axis in ((by_patient, (0, 2)), (by_run, (1, 2))):
        other = rng.normal(0.7, 0.1, (4, 11, 1))
        arm = torch.from_numpy(other + varying)
        found = difference(arm, torch.from_numpy(other), [str(index) for index in range(11)])
        expected = stats.ttest_1samp(np.broadcast_to(varying, (4, 11, 1)).mean(axis=axis), 0)
        assert found.mean == pytest.approx(varying.mean())
        assert found.p == pytest.approx(expected.pvalue)
        assert found.interval == pytest.approx(expected.confidence_interval(0.95))
    assert found.runs_better == np.mean(by_run > 0)


def test_scans_of_one_patient_and_runs_of_one_draw_count_as_one() -> None:
    rng = np.random.default_rng(1)
    delta = torch.from_numpy(np.tile(rng.normal(0.05, 0.02, (1, 3, 1)).repeat(2, axis=1), (2, 1, 1)))
    apart = difference(delta, torch.zeros_like(delta), list("abcdef"))
    together = difference(delta, torch.zeros_like(delta), list("aabbcc"))
    expected = stats.ttest_1samp(delta[0, ::2, 0].numpy(), 0)
    assert together.p == pytest.approx(expected.pvalue)
    assert apart.p < together.p
    alone = difference(delta, torch.zeros_like(delta), list("aaaaaa"))
    assert (alone.interval, alone.p) == (None, 1.0)
    runs = torch.tensor([0.01, 0.01, 0.03, 0.03, 0.05, 0.05]).reshape(6, 1, 1).expand(6, 4, 1)
    dealt = difference(runs, torch.zeros_like(runs), list("abcd"), clusters=[7, 7, 3, 3, 5, 5])
    assert dealt.p == pytest.approx(stats.ttest_1samp([0.01, 0.03, 0.05], 0).pvalue)
    with pytest.raises(ValueError, match="two clusters or more, got 1"):
        difference(runs, torch.zeros_like(runs), list("abcd"), clusters=[0] * 6)


def test_classes_weigh_alike_however_few_scans_show_them() -> None:
    delta = torch.tensor([[0.1, NAN], [0.2, NAN], [0.3, 0.5]]).expand(3, 3, 2)
    found = difference(delta, torch.zeros_like(delta), list("abc"))
    assert found.mean == pytest.approx((0.2 + 0.5) / 2)


@pytest.mark.parametrize(("draws", "runs", "spread"), [(3, 1, 0.0), (3, 1, 0.02), (3, 3, 0.02), (6, 1, 0.01)])
def test_where_an_arm_does_nothing_it_is_seldom_said_to_help(draws: int, runs: int, spread: float) -> None:
    rng = np.random.default_rng(2)
    groups, clusters = [str(index) for index in range(30)], np.repeat(range(draws), runs).tolist()
    wrong, turns = 0, 300
    for _ in range(turns):
        by_draw = rng.normal(0, spread, (draws, 1, 1)).repeat(runs, axis=0)
        noise = rng.normal(0, 0.003, (draws * runs, 1, 1)) + rng.normal(0, 0.02, (draws * runs, 30, 1))
        delta = torch.from_numpy(rng.normal(0, 0.02, (1, 30, 1)) + by_draw + noise)
        wrong += difference(delta, torch.zeros_like(delta), groups, clusters).p < 0.05
    assert wrong <= stats.binom.ppf(0.999, turns, 0.08)  # it errs by 3 of 100 more at most


def test_holm() -> None:
    # By hand: 0.01 * 4, max(0.04, 0.02 * 3), max(0.06, 0.03 * 2), max(0.06, 0.5).
    assert adjust({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.5}
    )


def _result(gain: float, p: float, over: float = 0.02, p_over: float = 0.001, patients: int = 20) -> dict:
    ends = (gain - 0.01, gain + 0.01) if patients > 1 else None
    arm = {
        "words": "real scans, and 1 synthetic one for each",
        "minus_baseline": {"mean": gain, "interval": ends, "p": p / 3, "p_adjusted": p},
        "minus_duplicates": {"mean": over, "interval": ends, "p": p_over / 3, "p_adjusted": p_over},
    }
    return {"metric": "Dice", "test_patients": patients, "arms": {"classical": {"mean": 0.8}, "synthetic_1": arm}}


@pytest.mark.parametrize(
    ("result", "begins"),
    [
        (_result(0.02, 0.001), r"It helps: \+2\.0 points of Dice over classical .*\+1\.0 to \+3\.0"),
        (_result(0.02, 0.001, over=0.001, p_over=0.6), "It is not sure to help more than copies"),
        (_result(0.02, 0.001, over=0.02, p_over=0.09), r"It is not sure .*\+2\.0 over copies \(p = 0\.090\)"),
        (_result(0.02, 0.3), r"No help is shown, and none ruled out: at best \+2\.0"),
        (_result(0.0, 0.9), r"It does not help: at best \+0\.0"),
        (_result(-0.02, 0.3), r"It does not help: at best -2\.0"),
        (_result(-0.02, 0.001), r"It hurts: .*-2\.0"),
        (_result(0.02, 1.0, patients=1), "It cannot be told with 1 test patient: "),
    ],
)
def test_the_verdict_says_what_was_found(result: dict, begins: str) -> None:
    import re

    assert re.match(begins, verdict(result))
