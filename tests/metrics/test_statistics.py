import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from medgen.metrics import (
    frechet_distance_from_features,
    gaussian_kernel_distance,
    kernel_distance,
    prdc,
    score_features,
    vendi_score,
)
from medgen.metrics.distances import from_function
from medgen.metrics.inference import _wilson

VALUES = ["frechet", "kernel", "gaussian_kernel", "precision", "recall", "density", "coverage", "vendi"]
QUICK: dict[str, Any] = {"resamples": 20, "permutations": 19, "floor_draws": 10, "progress": False}
NONE: dict[str, Any] = {"resamples": 0, "permutations": 0, "floor_draws": 0, "progress": False}


def _features(n: int, seed: int, *, d: int = 8, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _mean_gap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.mean() - x.mean()


MEAN_GAP = from_function("gap", _mean_gap, tail="both")


def test_values_are_those_of_the_pure_functions_averaged_over_views() -> None:
    real, synthetic = _features(30, 0).view(15, 2, 8), _features(24, 1, shift=0.5).view(12, 2, 8)
    scores = score_features(real, synthetic, **NONE)
    assert list(scores) == VALUES
    expected: dict[str, list[float]] = {name: [] for name in VALUES}
    for x, y in zip(real.unbind(1), synthetic.unbind(1), strict=True):
        expected["frechet"].append(frechet_distance_from_features(x, y).item())
        expected["kernel"].append(kernel_distance(x, y).item())
        expected["gaussian_kernel"].append(gaussian_kernel_distance(x, y).item())
        for name, value in prdc(x, y).items():
            expected[name].append(value.item())
        expected["vendi"].append(vendi_score(y).item())
    for name, score in scores.items():
        assert score.views == pytest.approx(expected[name], rel=1e-9)
        assert score.value == pytest.approx(sum(expected[name]) / 2, rel=1e-9)
        assert (score.n_real, score.n_synthetic, score.d) == (15, 12, 8)


def test_takes_arrays_and_one_view_without_its_axis() -> None:
    real, synthetic = _features(12, 0), _features(12, 1)
    plain = score_features(real.numpy(), synthetic.numpy(), distances=["kernel"], **NONE)["kernel"]
    assert plain == score_features(real[:, None], synthetic[:, None], distances=["kernel"], **NONE)["kernel"]


def test_equal_seeds_give_equal_scores_and_other_seeds_do_not() -> None:
    real, synthetic = _features(24, 0), _features(20, 1, shift=0.3)
    first, again = (score_features(real, synthetic, seed=3, **QUICK) for _ in range(2))
    other = score_features(real, synthetic, seed=4, **QUICK)
    assert first == again
    assert all(first[name].interval != other[name].interval for name in ("frechet", "kernel", "vendi"))


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    x, y = _features(60, 0, d=1), _features(40, 1, d=1, shift=0.4)
    score = score_features(x, y, distances=[MEAN_GAP], **{**NONE, "resamples": 2000})["gap"]
    assert score.interval is not None
    error = (x.var().item() / 60 + y.var().item() / 40) ** 0.5
    # Student's t with 39 degrees of freedom; 2000 half-samples give the spread to about 2 %.
    assert (score.interval[1] - score.interval[0]) / 2 == pytest.approx(2.0227 * error, rel=0.06)
    assert sum(score.interval) / 2 == pytest.approx(score.value)


def test_the_interval_of_a_mean_over_patients_counts_patients() -> None:
    x = _features(20, 0, d=1).repeat_interleave(5, 0)
    y = _features(16, 1, d=1).repeat_interleave(5, 0)
    groups = [np.arange(20).repeat(5), np.arange(16).repeat(5)]
    score = score_features(
        x, y, distances=[MEAN_GAP], real_groups=groups[0], synthetic_groups=groups[1], **{**NONE, "resamples": 2000}
    )["gap"]
    assert score.interval is not None
    error = (x[::5].var().item() / 20 + y[::5].var().item() / 16) ** 0.5
    assert (score.interval[1] - score.interval[0]) / 2 == pytest.approx(2.1314 * error, rel=0.06)
    assert (score.groups_real, score.groups_synthetic) == (20, 16)
    assert score.warnings == ("Only 16 synthetic patients, who are what counts.",)


def test_intervals_cover_the_expected_value_of_gaussians() -> None:
    # The truth of the Fréchet distance at this n, bias and all, is the mean over many pairs of sets.
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _features(40, 2 * seed), 1.2 * _features(40, 2 * seed + 1, shift=0.4)

    names = ["frechet", "kernel"]
    truth = {
        name: np.mean([score_features(*draw(seed), distances=[name], **NONE)[name].value for seed in range(500, 700)])
        for name in names
    }
    hits = dict.fromkeys(names, 0)
    for seed in range(50):
        for name, score in score_features(*draw(seed), distances=names, **{**NONE, "resamples": 40}).items():
            assert score.interval is not None
            hits[name] += score.interval[0] <= truth[name] <= score.interval[1]
    # 47.5 of 50 less three standard errors of a binomial.
    assert all(count >= 43 for count in hits.values()), hits


def test_a_saturated_share_still_has_an_interval() -> None:
    x = _features(20, 0)
    score = score_features(x, x, distances=["prdc"], **{**NONE, "resamples": 20})["precision"]
    assert score.value == 1
    assert score.interval == (pytest.approx(20 / (20 + norm.ppf(0.975) ** 2)), 1)


def test_wilson_equals_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263.
    assert _wilson(81 / 263, 263, 0.95) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_the_floor_is_of_disjoint_halves_of_the_real_scans() -> None:
    real, synthetic = _features(41, 0), _features(60, 1, shift=1)
    score = score_features(real, synthetic, distances=["frechet"], **QUICK)["frechet"]
    assert score.floor_n == (20, 20)
    assert score.floor_kind is not None
    assert score.floor_kind.startswith("random halves of the real scans")
    assert score.floor is not None
    assert score.floor_interval is not None
    assert score.value_at_floor_n is not None
    assert score.floor_interval[0] <= score.floor <= score.floor_interval[1]
    assert score.floor < score.value < score.value_at_floor_n  # bias grows as n falls


def test_the_floor_of_halves_leaves_patients_whole() -> None:
    # Each patient has two equal scans: halves that cut patients would be nearer to each other than patients are.
    real = _features(20, 0, d=30).repeat_interleave(2, 0)
    whole, cut = (
        score_features(real, real, distances=["prdc"], nearest_k=1, real_groups=groups, **{**NONE, "floor_draws": 20})
        for groups in (np.arange(20).repeat(2), None)
    )
    assert whole["coverage"].floor == 0  # a ball of radius 0 around each pair of equal scans
    assert cut["coverage"].floor is not None
    assert cut["coverage"].floor > 0.2


def test_the_floor_against_a_reference_of_any_size() -> None:
    real, synthetic = _features(30, 0), _features(20, 1, shift=0.5)
    for count, size, draws in ((50, 20, 10), (20, 20, 1), (12, 12, 1)):
        reference = _features(count, 2)
        score = score_features(real, synthetic, real_reference=reference, distances=["frechet"], **QUICK)["frechet"]
        assert (score.floor_kind, score.floor_n) == ("real scans against the real reference", (30, size))
        assert score.floor_draws == draws
        if draws == 1:
            assert score.floor == pytest.approx(frechet_distance_from_features(real, reference).item(), rel=1e-6)
        assert score.floor_interval is not None
        assert (score.value_at_floor_n == score.value) is (size == 20)


def test_warns_of_patients_on_both_sides_of_the_floor() -> None:
    real, synthetic, reference = (_features(24, seed) for seed in range(3))
    settings = {"real_groups": range(24), "reference_groups": range(20, 44), "distances": ["kernel"]}
    score = score_features(real, synthetic, real_reference=reference, **settings, **QUICK)["kernel"]
    assert score.warnings == ("4 patients are in both real and real_reference: the floor is too low.",)


def test_p_values_are_uniform_for_equal_distributions_and_small_for_a_shift() -> None:
    names = ["frechet", "kernel", "vendi"]
    p_values: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(60):
        x, y = _features(15, 2 * seed), _features(15, 2 * seed + 1)
        for name, score in score_features(x, y, distances=names, **{**NONE, "permutations": 19}).items():
            assert score.p_value is not None
            p_values[name].append(score.p_value)
    for values in p_values.values():
        assert 0.4 < np.mean(values) < 0.65  # 0.525 for one-sided ranks of 20
        assert np.mean(np.array(values) <= 0.1) < 0.25
    shifted = score_features(_features(15, 0), _features(15, 1, shift=1), **{**NONE, "permutations": 39})
    assert all(shifted[name].p_value == 1 / 40 for name in ("frechet", "kernel", "gaussian_kernel", "coverage"))


def test_the_smallest_p_value_of_a_two_sided_test_is_twice_that_of_a_one_sided() -> None:
    x = _features(15, 0)
    for shift in (-3, 3):
        score = score_features(x, x + shift, distances=[MEAN_GAP], **{**NONE, "permutations": 39})["gap"]
        assert (score.tail, score.p_value) == ("both", 2 / 40)


def test_equal_sets_are_not_told_apart() -> None:
    x = _features(20, 0)
    scores = score_features(x, x, **QUICK)
    assert scores["frechet"].value == pytest.approx(0, abs=1e-9)
    # Density and diversity are another matter: a relabeling puts both copies of some scans into one set.
    for name in ("frechet", "kernel", "gaussian_kernel", "precision", "recall", "coverage"):
        assert scores[name].p_value == 1


def test_slow_tests_take_a_subset_and_say_so() -> None:
    real, synthetic = _features(30, 0), _features(26, 1)
    scores = score_features(real, synthetic, max_permutation_scans=12, **QUICK)
    assert scores["frechet"].permutation_n == scores["vendi"].permutation_n == (12, 12)
    assert scores["kernel"].permutation_n == scores["recall"].permutation_n == (30, 26)


def test_extrapolates_to_the_frechet_distance_of_the_gaussians() -> None:
    d = 6
    synthetic = 1.5 * _features(600, 1, d=d) + 0.5
    truth = d * (0.5**2 + 0.5**2)
    score = score_features(
        _features(600, 0, d=d),
        synthetic,
        distances=["frechet", "gaussian_kernel", "kernel"],
        **{**NONE, "floor_draws": 4},
    )
    frechet = score["frechet"]
    assert frechet.extrapolated == pytest.approx(truth, rel=0.12)
    assert frechet.floor_extrapolated is not None
    assert frechet.floor is not None
    assert abs(frechet.floor_extrapolated) < 0.25 * frechet.floor
    unbiased = gaussian_kernel_distance(_features(600, 0, d=d), synthetic, unbiased=True).item()
    assert score["gaussian_kernel"].extrapolated == pytest.approx(unbiased, rel=1e-6)
    assert score["kernel"].extrapolated == score["kernel"].value


def test_says_when_n_is_too_small_for_the_dimension() -> None:
    score = score_features(
        _features(90, 0, d=500), _features(90, 1, d=500), distances=["frechet"], **{**NONE, "floor_draws": 4}
    )["frechet"]
    assert "n = 90 scans is less than d = 500 features" in score.warnings[0]
    assert "n is too small to extrapolate" in score.warnings[1]


def test_says_why_a_field_is_missing() -> None:
    few = score_features(_features(7, 0), _features(7, 1), **QUICK)
    assert few["frechet"].missing["interval"] == "half of the scans are 3, which is less than 6"
    assert few["frechet"].missing["floor"] == "half of the scans are 3, which is less than 6"
    assert few["frechet"].missing["extrapolated"] == "expected at least 40 scans a side, got 7"
    assert few["frechet"].missing["floor_extrapolated"] == "there is no floor"
    assert few["vendi"].missing["extrapolated"] == "how this value depends on n is not known"
    assert "Only 7 scans a side" in few["kernel"].warnings[0]
    groups = score_features(_features(30, 0), _features(30, 1), real_groups=[0, 1, 2] * 10, **QUICK)["kernel"]
    assert groups.missing["interval"] == "expected at least 4 patients in each set, got 3"
    assert groups.warnings == ("Only 3 real patients, who are what counts.",)
    single = score_features(_features(3, 0), _features(3, 1), distances=["kernel"], **QUICK)["kernel"]
    assert single.missing["interval"] == "expected at least 4 scans in each set, got 3"
    none = score_features(_features(30, 0), _features(30, 1), **NONE)["kernel"]
    assert none.missing["p_value"] == "no permutations were asked for"
    assert none.missing["floor"] == "no floor was asked for"
    assert none.missing["interval"] == "no resamples were asked for"


def test_json_has_plain_types_only() -> None:
    scores = score_features(_features(12, 0), _features(12, 1), **QUICK)
    text = json.dumps({name: score.to_json() for name, score in scores.items()}, allow_nan=False)
    back = json.loads(text)
    assert back["frechet"]["interval"] == list(scores["frechet"].interval or ())
    assert back["vendi"]["extrapolated"] is None
    assert all(value is not None or key in score["missing"] for score in back.values() for key, value in score.items())


def test_refuses_bad_input() -> None:
    x, y = _features(20, 0), _features(20, 1)
    with pytest.raises(ValueError, match=r"synthetic: expected features .* of at least 6 scans, got shape \(5, 8\)"):
        score_features(x, y[:5])
    with pytest.raises(ValueError, match=r"real: expected features .*got shape \(20,\)"):
        score_features(x[:, 0], y)
    with pytest.raises(
        ValueError, match=r"expected one number of views and features in all sets, got .*'synthetic': \(1, 7\)"
    ):
        score_features(x, y[:, :7])
    bad = y.clone()
    bad[3, 2], bad[3, 5], bad[7, 0] = float("nan"), float("inf"), float("nan")
    with pytest.raises(ValueError, match="synthetic: expected finite features, got NaN or infinity in 2 of 20 scans"):
        score_features(x, bad)
    with pytest.raises(ValueError, match="synthetic_groups: expected one identifier for each of 20 scans, got 3"):
        score_features(x, y, synthetic_groups=[1, 2, 3])
    with pytest.raises(ValueError, match="confidence: expected a level between 0 and 1, got 95"):
        score_features(x, y, confidence=95)
    with pytest.raises(ValueError, match="permutations: expected 0 or at least 2, got 1"):
        score_features(x, y, permutations=1)
    with pytest.raises(ValueError, match="max_permutation_scans: expected at least 2, got 1"):
        score_features(x, y, max_permutation_scans=1)


def test_relabeled_sets_too_small_for_a_score_leave_its_p_value_out() -> None:
    source = np.random.default_rng(0)
    real, synthetic = source.normal(size=(12, 5)), source.normal(size=(6, 5))
    groups = [f"p{row // 3}" for row in range(12)]  # of three scans each: a relabeled set of two groups has five or six
    scores = score_features(real, synthetic, real_groups=groups, permutations=40, progress=False)
    assert scores["precision"].p_value is None
    assert "too few" in scores["precision"].missing["p_value"]
    assert scores["frechet"].p_value is not None
