"""What is said of two sets before any score."""

from __future__ import annotations

from pathlib import Path

import pytest

from medgen.data.case import Case, Dataset
from medgen.evaluation.caveats import caveats, differing_names, lift_shared, shared_names
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import HALVES, Split

SPLIT = Split("train and val as given", list(range(30)), list(range(30, 60)))


def _scans(count: int = 60, *, synthetic: bool = False, names: dict[int, str] | None = None) -> Scans:
    cases = [Case(f"c{row}", (Path(f"c{row}.png"),)) for row in range(count)]
    named = names or {0: "background", 1: "ball", 2: "core"}
    scans = Scans(Dataset(Path("set"), "plain", cases, named, {0: "MR"}, None, 2, synthetic), cases)
    scans.shapes, scans.labels = [(64, 60)] * count, ["digest"] * count
    scans.classes = [frozenset({1, 2})] * count
    return scans


@pytest.fixture
def real() -> Scans:
    return _scans()


@pytest.fixture
def made() -> Scans:
    return _scans(40, synthetic=True)


def test_like_sets_have_no_caveat(real: Scans, made: Scans) -> None:
    assert caveats(real, made, SPLIT) == []
    made.shapes = [(32, 60)] * 40  # half the size is no other kind of scan
    real.shapes[3] = (20, 30)
    assert caveats(real, made, SPLIT) == []


def test_a_class_that_only_one_set_shows_is_named(real: Scans, made: Scans) -> None:
    made.classes = [frozenset({1})] * 40
    assert caveats(real, made, SPLIT)[0].startswith("No synthetic label map shows core, but real ones do")
    real.classes, made.classes = made.classes, real.classes
    assert caveats(real, made, SPLIT)[0].startswith("No real label map shows core, but synthetic ones do")


def test_missing_label_maps_are_counted(real: Scans, made: Scans) -> None:
    made.labels[:3], made.classes[:3] = [None] * 3, [frozenset()] * 3
    assert caveats(real, made, SPLIT) == ["3 of 40 synthetic scans have no label map."]
    real.labels, real.classes = [None] * 60, [frozenset()] * 60
    assert caveats(real, made, SPLIT)[0].startswith("No real scan has a label map, but synthetic ones have.")
    made.labels, made.classes = [None] * 40, [frozenset()] * 40
    assert caveats(real, made, SPLIT) == []  # then nothing was to be compared


def test_far_smaller_scans_are_named_and_so_is_a_far_smaller_set(real: Scans, made: Scans) -> None:
    real.shapes[7] = (16, 16)
    found = caveats(real, made, SPLIT)
    assert len(found) == 1
    assert found[0].startswith(
        "1 real scan is far smaller than the others of the set, such as c7 (16 × 16; median 64 × 60)"
    )
    real.shapes[8] = real.shapes[7]
    assert caveats(real, made, SPLIT)[0].startswith("2 real scans are far smaller")
    made.shapes = [(20, 20)] * 40
    assert caveats(real, made, SPLIT)[1].startswith(
        "The synthetic scans are far smaller than the real ones (median 20 × 20 against 64 × 60)"
    )


def test_few_training_scans_and_swapped_or_unsplit_folders_are_said(real: Scans, made: Scans) -> None:
    few = Split("train and val as given", list(range(12)), list(range(12, 60)))
    assert caveats(real, made, few) == ["Only 12 real training scans: the floors are uncertain."]
    everything = list(range(60))
    assert "has learned from all of its scans" in caveats(real, made, Split(HALVES, everything, everything))[0]
    assert caveats(real, _scans(40), SPLIT) == [
        "set does not mark itself as synthetic. Check that the folders are not swapped."
    ]


def test_both_sets_get_one_name_for_each_label_value() -> None:
    real = _scans(names={0: "background", 1: "class_1", 2: "tail"}).dataset
    made = _scans(names={0: "background", 1: "head", 2: "Tail", 3: "body"}).dataset
    assert shared_names(real, made) == {0: "background", 1: "head", 2: "tail", 3: "body"}
    assert differing_names(real, made) == []
    made.class_names = {0: "background", 1: "head", 2: "body"}
    assert "2 (tail in real, body in synthetic scans)" in differing_names(real, made)[0]
    made.class_names = {0: "nothing", 1: "class_1", 2: "class_2"}
    assert differing_names(real, made) == []
    assert shared_names(real, made)[1] == "class_1"


def test_what_every_score_warns_of_is_said_once() -> None:
    scores = {"a": {"warnings": ["few", "own"]}, "b": {"warnings": ["few"]}}
    assert lift_shared(scores) == ["few"]
    assert scores == {"a": {"warnings": ["own"]}, "b": {"warnings": []}}
    assert lift_shared({}) == []
