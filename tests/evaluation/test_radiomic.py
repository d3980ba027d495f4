"""Sections of the report that rest on radiomic features, from tables made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.data.case import Case, Dataset
from medgen.evaluation.radiomic import radiomic_distances, radiomic_shift
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import Split
from medgen.metrics.protocols import PROTOCOLS
from medgen.types import BadInputError

NAMES = PROTOCOLS["frd-robust"].columns(2)
ALL = Split("all", list(range(40)), list(range(40)))


def _scans(count: int, seed: int, shift: dict[str, float], *, protocol: str = "frd-robust") -> Scans:
    cases = [Case(f"c{row}", (Path(f"c{row}.png"),), group=f"p{row // 2}") for row in range(count)]
    dataset = Dataset(Path("set"), "plain", cases, {0: "background"}, {0: "MR"}, None, 2)
    names = PROTOCOLS[protocol].columns(2)
    table = 10 + np.random.default_rng(seed).normal(size=(count, len(names)))
    for name, size in shift.items():
        table[:, names.index(name)] += size
    scans = Scans(dataset, cases, torch.zeros(count, 1, 2), {protocol: table}, {protocol: {}})
    scans.shapes, scans.labels = [(32, 32)] * count, [None] * count
    return scans


def test_the_features_that_moved_lead_the_list_with_their_sign_and_one_of_each_bunch() -> None:
    real = _scans(40, 0, {})
    made = _scans(40, 1, {"glcm_Contrast": -4, "firstorder_Mean": 8})
    twin = NAMES.index("firstorder_Median")
    for scans in (real, made):
        scans.radiomics["frd-robust"][:, twin] = 2 * scans.radiomics["frd-robust"][:, NAMES.index("firstorder_Mean")]
    section = radiomic_shift(real, made, ALL, "frd-robust", 0)
    found = section["largest"]
    assert len(found) == 10
    assert section["beyond_chance"] == 3  # the twin is not shown, and is counted
    assert section["features"] == sum(not name.startswith("diagnostics") for name in NAMES)
    assert [entry["p_value"] for entry in found[:2]] == [1 / 200, 1 / 200]
    assert min(entry["p_value"] for entry in found[2:]) > 0.05
    assert {found[0]["feature"]} <= {"firstorder_Mean", "firstorder_Median"}
    assert found[0]["effect"] == pytest.approx(8, rel=0.2)
    assert found[1]["feature"] == "glcm_Contrast"
    assert found[1]["effect"] == pytest.approx(-4, rel=0.25)
    assert sum(entry["feature"] in ("firstorder_Mean", "firstorder_Median") for entry in found) == 1
    contrast = NAMES.index("glcm_Contrast")
    for name, scans in (("real", real), ("synthetic", made)):
        column = scans.radiomics["frd-robust"][:, contrast]
        assert found[1][name] == pytest.approx({"mean": column.mean(), "std": column.std()})
    gap = found[1]["synthetic"]["mean"] - found[1]["real"]["mean"]
    spread = ((found[1]["synthetic"]["std"] ** 2 + found[1]["real"]["std"] ** 2) / 2) ** 0.5
    assert found[1]["effect"] == pytest.approx(gap / spread)


def test_the_p_values_of_features_hold_what_they_promise() -> None:
    found = [
        radiomic_shift(_scans(40, 2 * run, {}), _scans(40, 2 * run + 1, {}), ALL, "frd-robust", run)
        for run in range(40)
    ]
    beyond = sum(section["beyond_chance"] > 0 for section in found)
    assert beyond <= 6  # of 40 pairs of like sets, 2 are expected; more than 6 has probability 0.003
    assert all(0 < entry["p_value"] <= 1 for section in found for entry in section["largest"])


def test_scans_of_one_patient_are_no_independent_evidence_of_a_shift() -> None:
    real, made = _scans(40, 0, {}), _scans(40, 1, {})
    for scans, sign in ((real, 0), (made, 1)):  # each patient has a level of its own
        levels = np.random.default_rng(sign).normal(size=(2, 1))
        scans.radiomics["frd-robust"][:, :1] += 50 * np.repeat(levels, 20, axis=0)
        scans.cases = [replace(case, group=f"p{row // 20}") for row, case in enumerate(scans.cases)]
    together = radiomic_shift(real, made, ALL, "frd-robust", 0)
    for scans in (real, made):
        scans.cases = [replace(case, group=None) for case in scans.cases]
    alone = radiomic_shift(real, made, ALL, "frd-robust", 0)
    assert together["largest"][0]["effect"] == alone["largest"][0]["effect"]
    assert alone["largest"][0]["p_value"] < 0.05 < together["largest"][0]["p_value"]


def test_the_section_counts_patients_and_relabelings() -> None:
    split = Split("as given", list(range(20)), list(range(20, 32)))
    for protocol, expected in (("frd-v1", None), ("frd-robust", 199)):
        real, made = _scans(32, 0, {}, protocol=protocol), _scans(12, 1, {}, protocol=protocol)
        made.cases = [replace(case, group=None) for case in made.cases]
        section = radiomic_distances(real, made, split, "whole", 0)[protocol]
        assert (section["groups_real"], section["groups_synthetic"]) == (6, 12)
        assert section["permutations"] == expected
        assert expected is None or section["p_value"] * (expected + 1) == pytest.approx(round(section["p_value"] * 200))


def test_biased_protocols_compare_equal_numbers_and_the_robust_one_all() -> None:
    split = Split("as given", list(range(20)), list(range(20, 32)))
    for protocol, expected in (("frd-v1", 12), ("frd-robust", None)):
        real, made = _scans(32, 0, {}, protocol=protocol), _scans(26, 1, {}, protocol=protocol)
        section = radiomic_distances(real, made, split, "whole", 0)[protocol]
        assert (section["n_real"], section["n_synthetic"]) == ((12, 12) if expected else (12, 26))
        assert (section["floor"]["n_real"], section["floor"]["n_synthetic"]) == ((12, 12) if expected else (12, 20))
        assert section["unit"] == PROTOCOLS[protocol].unit


def test_scans_without_features_are_left_out_and_too_few_are_refused() -> None:
    real, made = _scans(12, 0, {}), _scans(12, 1, {})
    made.radiomics["frd-robust"][:4] = np.nan
    made.excluded["frd-robust"] = {"no label": 4}
    split = Split("all", list(range(12)), list(range(12)))
    section = radiomic_distances(real, made, split, "label", 0)["frd-robust"]
    assert section["n_synthetic"] == 8
    assert section["excluded"]["synthetic"] == {"no label": 4}
    made.radiomics["frd-robust"][:11] = np.nan
    with pytest.raises(
        BadInputError, match=r"at least 2 synthetic scans with radiomic features .*, got 1 of 12 \(4x no"
    ):
        radiomic_distances(real, made, split, "label", 0)
