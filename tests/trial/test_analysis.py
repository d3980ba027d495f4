"""Paired differences against scipy, and words that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from medgen.trial.analysis import adjust, difference, least_p, mean_score
from medgen.trial.words import verdict

NAN = math.nan


def test_the_mean_weighs_classes_alike_and_leaves_out_what_a_scan_does_not_show() -> None:
    scores = torch.tensor([[[0.5, NAN], [0.7, 0.2], [NAN, NAN]], [[0.7, NAN], [0.9, 0.4], [NAN, NAN]]])
    assert mean_score(scores) == pytest.approx((0.7 + 0.3) / 2)


def test_signs_are_changed_as_scipy_does_it() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.03, 0.1):
        arm, other = rng.normal(0.7 + shift, 0.1, (3, 11, 1)), rng.normal(0.7, 0.1, (3, 11, 1))
        groups = [str(index) for index in range(11)]
        found = difference(torch.from_numpy(arm), torch.from_numpy(other), groups)
        exact = stats.permutation_test(
            ((arm - other).mean(axis=(0, 2)),), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert found.mean == pytest.approx((arm - other).mean())
        assert found.p == pytest.approx(exact.pvalue, abs=0.015)
        assert found.runs_better == np.mean((arm - other).mean(axis=(1, 2)) > 0)


def test_scans_of_one_patient_count_as_one() -> None:
    delta = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1]).reshape(1, 6, 1)
    apart = difference(delta, torch.zeros_like(delta), list("abcdef"))
    together = difference(delta, torch.zeros_like(delta), list("aaabbb"))
    assert apart.p == pytest.approx(2 / 2**6, abs=0.01)
    assert together.p == pytest.approx(0.5, abs=0.02)
    assert apart.interval == pytest.approx((0.1, 0.1))
    assert difference(delta, torch.zeros_like(delta), list("aaaaaa")).interval is None
    assert least_p(6) == 2 / 2**6


def test_the_interval_covers_the_truth_at_its_rate() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for turn in range(60):
        by_patient, by_run = rng.normal(0.05, 0.1, (1, 30, 1)), rng.normal(0, 0.02, (6, 1, 1))
        delta = torch.from_numpy(by_patient + by_run + rng.normal(0, 0.02, (6, 30, 1)))
        low, high = difference(delta, torch.zeros_like(delta), [str(i) for i in range(30)], seed=turn).interval or (
            1,
            0,
        )
        held += low <= 0.05 <= high
    assert 52 <= held <= 60  # 57 of 60 expected


def test_holm() -> None:
    # By hand: 0.01 * 4, max(0.04, 0.02 * 3), max(0.06, 0.03 * 2), max(0.06, 0.5).
    assert adjust({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.5}
    )


def _result(gain: float, p: float, over: float = 0.02, p_over: float = 0.001, patients: int = 20) -> dict:
    ends = (gain - 0.01, gain + 0.01)
    arm = {
        "words": "real scans, and 1 synthetic one for each",
        "minus_baseline": {"mean": gain, "interval": ends, "p": p},
        "minus_duplicates": {"mean": over, "interval": ends, "p": p_over},
        "p_adjusted": p,
    }
    return {"metric": "Dice", "test_patients": patients, "arms": {"classical": {"mean": 0.8}, "synthetic_1": arm}}


@pytest.mark.parametrize(
    ("result", "begins"),
    [
        (_result(0.02, 0.001), r"It helps: \+2\.0 points of Dice over classical .*\+1\.0 to \+3\.0"),
        (_result(0.02, 0.001, over=0.001, p_over=0.6), "It helps no more than copies"),
        (_result(0.02, 0.3), r"It does not help: at best \+2\.0"),
        (_result(-0.02, 0.3), r"It does not help: at best -2\.0"),
        (_result(-0.02, 0.001), r"It hurts: .*-2\.0"),
        (_result(0.02, 0.3, patients=4), "It cannot be told with 4 test patients"),
    ],
)
def test_the_verdict_says_what_was_found(result: dict, begins: str) -> None:
    import re

    assert re.match(begins, verdict(result))
