from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from medgen.filtering.tolerance import Kind, fit_tails, held_out_levels, joint_level, require_patients
from medgen.types import BadInputError


def test_tails_of_an_exponential_law_are_its_survival_function() -> None:
    values = stats.laplace(loc=2, scale=3).rvs(200_000, random_state=0)
    tails = fit_tails(values, 1e-9)
    points = np.array([-10.0, -4.0, 8.0, 14.0])
    beyond = np.where(points < 2, stats.laplace.cdf(points, 2, 3), stats.laplace.sf(points, 2, 3))
    np.testing.assert_allclose(tails.levels(points, "both"), 2 * beyond, rtol=0.05)
    np.testing.assert_allclose(tails.levels(points, "high")[2:], beyond[2:], rtol=0.05)
    assert tails.levels(np.array([2.0, np.nan]), "both").tolist() == [1, 1]
    assert tails.levels(points, "low")[2:].tolist() == [1, 1]


def test_bounds_have_the_level_that_was_asked_for() -> None:
    tails = fit_tails(np.random.default_rng(1).normal(size=60), 1e-9)
    for side in ("low", "high", "both"):
        ends = [end for end in tails.bounds(0.003, side) if np.isfinite(end)]
        np.testing.assert_allclose(tails.levels(np.array(ends), side), 0.003)


def test_a_score_that_never_varies_allows_no_more_than_its_resolution() -> None:
    low, high = fit_tails(np.zeros(30), 1e-3).bounds(0.002, "both")
    assert -0.01 < low < 0 < high < 0.01


def test_scales_are_those_of_scipy() -> None:
    values = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(Kind("logit", "low").forward(values), special.logit(values))
    np.testing.assert_allclose([Kind("logit", "low").inverse(x) for x in special.logit(values)], values)
    np.testing.assert_allclose(Kind("log", "both").forward(values), np.log(values))
    # Bounds of few real scans may lie beyond all that a float holds.
    assert [Kind("logit", "low").inverse(x) for x in (-2000.0, 2000.0)] == [0.0, 1.0]
    assert [Kind("log", "both").inverse(x) for x in (-2000.0, 2000.0)] == [0.0, np.inf]


@pytest.mark.parametrize(("count", "share", "fails"), [(19, 0.05, 0), (38, 0.05, 0), (39, 0.05, 1), (9, 0.3, 2)])
def test_the_joint_level_is_the_conformal_order_statistic(count: int, share: float, fails: int) -> None:
    smallest = np.random.default_rng(2).permutation(np.arange(1, count + 1) / 1000)
    level = joint_level(smallest, [f"p{index}" for index in range(count)], share)
    assert int((smallest < level).sum()) == fails
    # ceil((1 - share) (K + 1)) of K scores may be kept, counted from the best.
    assert level == np.sort(smallest)[count - int(np.ceil((1 - share) * (count + 1) - 1e-9))]


def test_patients_weigh_alike_however_many_scans_they_have() -> None:
    patients = ["many"] * 40 + [f"p{index}" for index in range(38)]
    smallest = np.concatenate([np.linspace(0.001, 0.04, 40), np.full(38, 0.5)])
    assert joint_level(smallest, patients, 0.05) == 0.5  # one patient of 39 may fail with all scans
    # Of 39 patients 0.03 * 40 - 1 = 0.2 may fail: 8 of the 40 scans of one of them.
    assert joint_level(smallest, patients, 0.03) == pytest.approx(0.009)


def test_new_patients_fail_no_more_often_than_promised() -> None:
    """Many correlated heavy-tailed scores, some of which few scans have: the share holds without any law."""
    draw = np.random.default_rng(3)
    kinds = {f"s{index}": Kind("linear", "both") for index in range(8)}
    failed = []
    for _ in range(60):
        shared = draw.standard_t(3, size=(80, 1))
        scores = shared + draw.standard_t(2, size=(80, 8))
        scores[:40, 7] = np.nan
        scores[60:70, 7] = np.nan
        real, new = scores[:60], scores[60:]
        columns = {name: real[:, index] for index, name in enumerate(kinds)}
        patients = [f"p{index}" for index in range(60)]
        levels = held_out_levels(columns, kinds, patients)
        level = joint_level(np.min(list(levels.values()), axis=0), patients, 0.1)
        out = np.zeros(20, dtype=bool)
        for index, column in enumerate(columns.values()):
            tails = fit_tails(column[np.isfinite(column)], 1e-9)
            out |= tails.levels(new[:, index], "both") < level
        failed.append(out.mean())
    assert 0.06 < np.mean(failed) < 0.115


def test_a_scan_is_not_judged_by_its_own_patient() -> None:
    values = np.concatenate([np.linspace(0, 1, 20), [50.0, 50.0]])
    patients = [f"p{index}" for index in range(20)] + ["odd", "odd"]
    level = held_out_levels({"a": values}, {"a": Kind("linear", "both")}, patients)["a"]
    assert level[-1] < 1e-6 and level[-2] < 1e-6 and level[10] == 1


@pytest.mark.parametrize(
    ("count", "share", "message"),
    [
        (18, 0.05, r"at least 19 patients.* 5\.0% .*got 18.*--real_rejected 0\.053"),
        (5, 0.05, r"at least 19 patients.*got 5.*--real_rejected 0\.167"),
        (2, 0.4, r"at least 3 patients.*got 2 beside those held out for tests\. Add scans\.$"),
        (50, 1.5, r"real_rejected: expected a share between 0 and 1, got 1\.5"),
    ],
)
def test_too_few_patients_are_refused_with_their_number(count: int, share: float, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        require_patients(count, share)


def test_a_suggested_share_is_taken() -> None:
    require_patients(5, 0.167)
    require_patients(18, 0.053)
    require_patients(19, 0.05)


def test_no_level_is_left_where_too_many_scans_fail_at_any() -> None:
    smallest = np.where(np.arange(40) < 4, 0.0, 0.3)
    assert joint_level(smallest, [f"p{index}" for index in range(40)], 0.05) == 0
    assert joint_level(smallest, [f"p{index}" for index in range(40)], 0.13) == 0.3
