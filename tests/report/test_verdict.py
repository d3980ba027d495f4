"""The verdict claims what the numbers carry, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from medgen.metrics.score import REFERENCE, Score
from medgen.report.methods import methods_paragraph
from medgen.report.rows import score_rows
from medgen.report.verdict import verdict


def score(
    name: str,
    value: float,
    *,
    floor: float | None = 10.0,
    p: float | None = 0.5,
    n: int = 120,
    d: int = 50,
    **more: Any,
) -> dict[str, Any]:
    sizes: dict[str, Any] = {"groups_real": n, "groups_synthetic": n, "confidence": 0.95, "views": (value,)}
    if floor is not None:
        sizes |= {"floor": floor, "floor_kind": REFERENCE, "floor_n": (n, n), "value_at_floor_n": value}
        sizes |= {"floor_interval": (0.8 * floor, 1.2 * floor), "floor_draws": 1}
    sizes |= {"p_value": p, "permutations": 199, "interval": (0.9 * value, 1.1 * value), "resamples": 50}
    return Score(name=name, value=value, n_real=n, n_synthetic=n, d=d, **{**sizes, **more}).to_json()


def report(**changes: Any) -> dict[str, Any]:
    n = changes.pop("n", 120)
    clean = {
        "copies": 0,
        "share": 0.0,
        "threshold": 0.9,
        "expected_false_alarms": 0.005 * n,
        "auth_pct": 50.0,
        "c_t": 0.1,
        "pairs": [],
        "warnings": [],
    }
    made = {
        "real": {"folder": "r", "scans": 3 * n, "patients": 3 * n, "split": "as given", "train": 2 * n, "val": n},
        "synthetic": {"folder": "s", "scans": n, "patients": None, "marked_synthetic": True},
        "spatial_dims": 2,
        "extractor": {"name": "e", "weights_sha256": "0" * 64, "num_features": 50, "views": ["image"]},
        "scores": {"frechet": score("frechet", 10.5, n=n)},
        "memorization": {**clean, **changes.pop("memorization", {})},
        "seed": 0,
    }
    made["real"] |= changes.pop("real", {})
    made["synthetic"] |= changes.pop("synthetic", {})
    return {**made, **changes}


def frd(value: float, p: float, *, floor_p: float = 0.6, n: int = 120) -> dict[str, Any]:
    floor = {"value": 0.01, "interval": [0, 0.03], "p_value": floor_p, "n_real": n, "n_synthetic": n}
    return {
        "frd-robust": {
            "value": value,
            "squared": value,
            "unit": "u",
            "n_real": n,
            "n_synthetic": n,
            "columns": 693,
            "interval": [0.9 * value, 1.1 * value],
            "p_value": p,
            "floor": floor,
            "warnings": [],
        }
    }


def utility(real: float | None, made: float | None) -> dict[str, Any]:
    return {"utility": {"dice": {"real": [real], "synthetic": [made]}, "classes": ["c"]}}


LIKE = {"mean": 0.3, "std": 0.1, "pairs": 10}
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("nothing found", {}, "good", ["No difference", "smallest p = 0.50 of 1 test", "none of 120 synthetic scans"]),
    (
        "far off",
        {"scores": {"frechet": score("frechet", 21, p=0.005)}},
        "poor",
        ["told apart", "2.1 times the real-versus-real floor (p = 0.005; 120 real and 120 synthetic scans)"],
    ),
    ("a little off", {"scores": {"frechet": score("frechet", 13, p=0.005)}}, "caution", ["told apart", "1.3 times"]),
    (
        "told apart, but within the floor",
        {"scores": {"frechet": score("frechet", 10.5, p=0.005)}},
        "caution",
        ["told apart", "no larger than that between the two parts of the real scans"],
    ),
    (
        "radiomic features tell",
        {"frd": frd(0.6, 0.005)},
        "poor",
        ["FRD (frd-robust) 0.60 where real against real is 0.010"],
    ),
    ("a small radiomic difference", {"frd": frd(0.06, 0.005)}, "caution", ["told apart", "0.060"]),
    ("p too large once corrected", {"frd": frd(0.02, 0.03)}, "good", ["No difference", "of 2 tests"]),
    ("copies", {"memorization": {"copies": 6}}, "poor", ["6 of 120 look like copies of training scans (0.60 expected"]),
    (
        "a flagged scan that may be chance",
        {"memorization": {"copies": 1}},
        "caution",
        ["1 of 120 looks like a copy", "may be chance"],
    ),
    ("more copies than a factorial holds", {"memorization": {"copies": 400}}, "poor", ["400 of 120"]),
    ("drawn to the training scans", {"memorization": {"c_t": -4.2}}, "poor", ["C_T = −4.20"]),
    ("copies not looked for", {"memorization": None}, "caution", ["not looked for"]),
    (
        "too few scans",
        {"n": 12, "scores": {"frechet": score("frechet", 10.5, n=12)}},
        "unknown",
        ["Too few to tell: with 12 real and 12 synthetic scans no difference was found"],
    ),
    (
        "too few patients",
        {"scores": {"frechet": score("frechet", 10.5, groups_real=8)}},
        "unknown",
        ["scans of only 8 patients"],
    ),
    (
        "too few relabelings",
        {"scores": {"frechet": score("frechet", 10.5, permutations=9)}},
        "unknown",
        ["Too few to tell"],
    ),
    (
        "few scans, and yet far off",
        {"n": 12, "scores": {"frechet": score("frechet", 40, p=0.005, n=12)}},
        "poor",
        ["told apart"],
    ),
    ("some scans", {"n": 60, "scores": {"frechet": score("frechet", 9, n=60)}}, "good", ["can go unseen"]),
    (
        "above the floor without significance",
        {"scores": {"frechet": score("frechet", 14, p=0.2)}},
        "caution",
        ["No difference", "above the range of its floor"],
    ),
    ("not tested", {"scores": {"frechet": score("frechet", 14, p=None)}}, "unknown", ["was not tested"]),
    (
        "no floor",
        {"scores": {"frechet": score("frechet", 14, floor=None, p=0.005)}},
        "caution",
        ["14 without a floor", "cannot be judged"],
    ),
    ("not split", {"real": {"train": 360, "val": 360}}, "caution", ["not split before training"]),
    (
        "real parts differ",
        {"frd": frd(0.6, 0.005, floor_p=0.01)},
        "poor",
        ["the two parts of the real scans differ too"],
    ),
    ("fewer scans than features", {"scores": {"frechet": score("frechet", 10, d=1280)}}, "good", ["mostly bias"]),
    (
        "variety is missing",
        {"scores": {"frechet": score("frechet", 10), "recall": score("recall", 0.4, floor=0.8, p=0.005, tail="lower")}},
        "caution",
        ["recall 0.40, real scans among themselves 0.80"],
    ),
    (
        "pairs are alike",
        {"ms_ssim": {"scales": 3, "real": LIKE, "synthetic": {**LIKE, "mean": 0.45}, "synthetic_one_label": None}},
        "caution",
        ["more alike", "0.45 against 0.30"],
    ),
    ("not marked", {"synthetic": {"marked_synthetic": False}}, "caution", ["are the folders swapped"]),
    ("many rejected", {"rejected": [{"set": "real", "case": "c", "reason": "r"}] * 60}, "caution", ["rejected (60)"]),
    (
        "copies of scans that were held out",
        {"memorization": {"held_out": {"copies": 5, "expected_false_alarms": 0.3}}},
        "poor",
        ["5 of 120 are close to a held-out real scan (0.30 expected by chance), which the generator is not to have"],
    ),
    (
        "one close to a held-out scan, by chance",
        {"memorization": {"held_out": {"copies": 1, "expected_false_alarms": 0.6}}},
        "caution",
        ["1 of 120 is close to a held-out real scan (0.60 expected by chance)."],
    ),
    ("a segmenter diverged", {"utility_missing": "diverged"}, "caution", ["diverged, which says nothing about the"]),
    ("utility refused", {"utility_missing": "refused"}, "caution", ["could not be measured, and the warnings say why"]),
    ("utility failed", {"utility_missing": "failed"}, "caution", ["failed, and the warnings say why"]),
    ("no segmenter learned", utility(0.03, 0.02), "caution", ["finds almost nothing (mean Dice 0.030), so what it"]),
    (
        "synthetic scans teach nothing",
        utility(0.8, 0.02),
        "poor",
        ["finds almost nothing in real ones (mean Dice 0.02"],
    ),
    ("no labelled class", utility(None, None), "caution", ["no validation scan shows a labelled class"]),
    ("useful", utility(0.8, 0.7), "good", ["reaches a mean Dice of 0.70 on real scans; trained on real"]),
    (
        "radiomic patients on one side only",
        {"frd": {"frd-robust": {**frd(0.06, 0.005)["frd-robust"], "groups_real": 40, "groups_synthetic": 120}}},
        "caution",
        ["he p-value of FRD (frd-robust) is too small: patients are known for the real scans only"],
    ),
    (
        "radiomic label maps on one side only",
        {"frd": {"frd-robust": {**frd(0.06, 0.005)["frd-robust"], "groups_real": 120, "groups_synthetic": 40}}},
        "caution",
        ["patients are known for the synthetic scans only"],
    ),
    (
        "patients on one side only",
        {"scores": {"frechet": score("frechet", 13, p=0.005, groups_real=40)}},
        "caution",
        ["he p-value of Fréchet distance is too small: patients are known for the real scans only"],
    ),
]


@pytest.mark.parametrize(("changes", "level", "told"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_verdict(changes: dict[str, Any], level: str, told: list[str]) -> None:
    changes = dict(changes)
    searched = changes.pop("memorization", {})
    made = report(**changes, memorization=searched or {})
    if searched is None:
        made["memorization"] = None
    found = verdict(made)
    text = " ".join([found.headline, *found.sentences])
    assert found.level == level, text
    for words in told:
        assert words in text
    assert found.headline.endswith(".") and found.headline[0].isupper()


def test_only_real_differences_are_called_so(full: dict[str, Any]) -> None:
    found = verdict(full)
    assert found.level == "poor" and found.headline.startswith("Synthetic scans are told apart from real ones")
    assert "of 26 looks like a copy of a training scan" in found.headline


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"memorization": {"copies": 6}, "scores": {"frechet": score("frechet", 30, p=0.005)}}, "closest pairs"),
        (
            {
                "scores": {"frechet": score("frechet", 30, p=0.005)},
                "radiomic_shift": {
                    "beyond_chance": 1,
                    "largest": [{"feature": "wavelet-LH_glcm_Contrast", "effect": -1.5}],
                },
            },
            "neighboring gray levels (GLCM Contrast), fine detail from top to bottom (wavelet LH) is on average lower",
        ),
        (
            {
                "scores": {"frechet": score("frechet", 30, p=0.005)},
                "radiomic_shift": {
                    "beyond_chance": 0,
                    "largest": [{"feature": "wavelet-LH_glcm_Contrast", "effect": -1.5}],
                },
            },
            "Compare the two contact sheets",
        ),
        ({}, "train a segmenter"),
        ({"utility_missing": "diverged"}, "broken intensities"),
    ],
)
def test_the_next_step_follows_the_worst_finding(changes: dict[str, Any], step: str) -> None:
    assert step in verdict(report(**changes)).next_step


def test_a_ratio_is_given_only_where_it_says_something(full: dict[str, Any]) -> None:
    rows = {row.key: row for row in score_rows(full)}
    assert rows["frechet"].ratio == pytest.approx(rows["frechet"].at_floor_n / rows["frechet"].floor)
    assert rows["kernel"].ratio is None and rows["frd-robust"].ratio is None and rows["frd-v1"].ratio is None
    # The interval of another n is moved to the value that is compared, and is not wider or narrower there.
    moved, value = rows["frechet"].interval_at_floor_n, rows["frechet"]
    assert moved[1] - moved[0] == pytest.approx(value.interval[1] - value.interval[0])


@pytest.mark.parametrize(("tail", "smallest"), [("upper", 1 / 200), ("both", 2 / 200)])
def test_a_test_of_both_tails_cannot_give_the_p_of_one(tail: str, smallest: float) -> None:
    row = score_rows(report(scores={"vendi": score("vendi", 10, p=0.01, tail=tail)}))[0]
    assert row.smallest_p == pytest.approx(smallest)
    assert row.p_is_smallest == (tail == "both")


def test_the_methods_paragraph_names_data_protocols_and_papers(full: dict[str, Any], minimal: dict[str, Any]) -> None:
    text = methods_paragraph(full)
    for words in (
        "26 synthetic 2D scans were compared with the 24 validation scans of 54 real ones of 40 patients",
        "weights 579357935793",
        "Heusel et al. 2017",
        "Naeem et al. 2020",
        "99 relabelings",
        "frd-robust",
        "Konz, Osuala et al. 2026",
        "Meehan et al. 2020",
        "trained for 100 steps",
        "closest real training scan over flips",
        "The real scans outside the training part (24) were searched",
        "eed 7.",
    ):
        assert words in text
    assert "without a validation part" in methods_paragraph(minimal)
    assert "None" not in text + methods_paragraph(minimal)
