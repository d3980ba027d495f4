"""Which real scans gates are fitted on: none that a comparison is tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data.dataset import read_dataset, split_cases
from medgen.filtering.reference import digest_of, training_cases
from medgen.trial.material import load_material
from medgen.types import BadInputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty labelled scans without a split or patients."""
    root = tmp_path_factory.mktemp("reference")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for index in range(40):
        image = np.random.default_rng(index).integers(0, 255, (16, 16), np.uint8)
        Image.fromarray(image).save(root / "images" / f"scan_{index:02}.png")
        Image.fromarray((image > 128).astype(np.uint8)).save(root / "labels" / f"scan_{index:02}.png")
    return root


@pytest.mark.parametrize("seed", [0, 3])
def test_scans_that_a_comparison_is_tested_on_are_left_out(folder: Path, seed: int) -> None:
    dataset = read_dataset(folder)
    cases, notes = training_cases(dataset)
    train, held_out = split_cases(dataset)
    assert cases == train  # as medgen train splits them
    material = load_material(folder, None, None, seed, torch.device("cpu"))
    tested = set(material.test_groups)
    assert tested == {f"case {case.case}" for case in held_out}
    assert notes == [
        f"{len(held_out)} reference scans were left out: medgen train and medgen utility hold them out for tests. Name "
        "validation scans in val.txt to hold out others."
    ]


def test_a_split_that_the_folder_names_is_kept(folder: Path) -> None:
    dataset = read_dataset(folder)
    named = replace(
        dataset,
        cases=[replace(case, split="val" if index < 3 else "train") for index, case in enumerate(dataset.cases)],
    )
    cases, notes = training_cases(named)
    assert [case.case for case in cases] == [f"scan_{index:02}" for index in range(3, 40)]
    assert notes == []
    bare = replace(named, cases=[replace(case, label=None) if case.case > "scan_35" else case for case in named.cases])
    cases, notes = training_cases(bare)
    assert len(cases) == 33
    assert notes == ["4 reference scans have no label map and were left out."]


def test_scans_without_label_maps_change_nothing_of_the_split(folder: Path) -> None:
    """As medgen train splits the scans that a model of label maps learns from."""
    dataset = read_dataset(folder)
    some = [replace(case, label=None) if index % 3 else case for index, case in enumerate(dataset.cases)]
    cases, notes = training_cases(replace(dataset, cases=some))
    assert cases == split_cases(replace(dataset, cases=[case for case in some if case.label]))[0]
    assert notes[0] == "26 reference scans have no label map and were left out."
    assert notes[1].startswith("3 reference scans were left out: medgen train")


def test_validation_scans_without_label_maps_name_no_split(folder: Path) -> None:
    """Those who train on label maps, and test on them, see only the others, and so draw a split."""
    dataset = read_dataset(folder)
    bare = [replace(case, split="val", label=None) for case in dataset.cases[:5]] + dataset.cases[5:]
    cases, _ = training_cases(replace(dataset, cases=bare))
    assert cases == split_cases(replace(dataset, cases=dataset.cases[5:]))[0]
    assert len(cases) == 29


def test_gates_of_another_split_or_seed_are_others(folder: Path) -> None:
    dataset = read_dataset(folder)
    settings = {"steps": None, "seed": 0}
    named = replace(
        dataset, cases=[replace(case, split="val" if case.case < "scan_03" else None) for case in dataset.cases]
    )
    digests = {digest_of(dataset, settings), digest_of(named, settings), digest_of(dataset, settings | {"seed": 3})}
    assert len(digests) == 3
    assert digest_of(dataset, dict(settings)) in digests


def test_one_patient_is_too_few(folder: Path) -> None:
    dataset = read_dataset(folder)
    dataset = replace(dataset, cases=[replace(case, group="one") for case in dataset.cases])
    with pytest.raises(BadInputError, match="expected cases for training and for validation"):
        training_cases(dataset)
