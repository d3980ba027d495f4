"""A table beside `dataset.json`: what it says of the cases is read, whom it names is checked."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medgen.data.dataset import read_dataset
from medgen.data.metadata import text_columns
from medgen.types import BadInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """nnU-Net v2 with three cases."""
    root = tmp_path / "set"
    for name, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (root / name).mkdir(parents=True)
        for case in "abc":
            array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 2
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / name / f"{case}{ending}.nii.gz")
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content | {"numTraining": 3}))
    return root


def test_rows_give_texts_groups_splits_and_facts_by_case(folder: Path) -> None:
    before = read_dataset(folder)
    assert [case.meta for case in before.cases] == [{}, {}, {}]
    table = "id,file_name,label,patient,split,age,text\nc,,,p2,Val,,a note\na,other.nii.gz,,p1,train,50,\n"
    (folder / "metadata.csv").write_text(table)
    after = read_dataset(folder)
    assert [(case.case, case.images, case.label) for case in after.cases] == [
        (case.case, case.images, case.label) for case in before.cases
    ]
    assert [(case.text, case.group, case.split) for case in after.cases] == [
        (None, "p1", "train"),
        (None, None, None),
        ("a note", "p2", "val"),
    ]
    assert [case.meta for case in after.cases] == [
        {"patient": "p1", "age": "50", "text": ""},
        {"patient": "", "age": "", "text": ""},
        {"patient": "p2", "age": "", "text": "a note"},
    ]
    assert after.format == "nnunet"


def test_the_text_is_that_of_the_first_column_that_is_filled_and_is_known_to_be(folder: Path) -> None:
    (folder / "metadata.csv").write_text("id,report,caption,text\na,r,c,t\nb,r,c,\nc,r,,\n")
    cases = read_dataset(folder).cases
    assert [case.text for case in cases] == ["t", "c", "r"]
    assert text_columns(cases) == {"text": 1, "caption": 1, "report": 1}
    assert list(text_columns([cases[1], cases[0], cases[1]]).items()) == [("text", 1), ("caption", 2)]
    (folder / "metadata.csv").unlink()
    assert text_columns(read_dataset(folder).cases) == {}


def test_a_split_of_dataset_json_comes_first_and_json_lines_count_too(folder: Path) -> None:
    pairs = {case: {"image": f"imagesTr/{case}_0000.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in "abc"}
    content = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "organ"}}
    content |= {"training": [pairs["a"], pairs["b"]], "validation": [pairs["c"]]}
    (folder / "dataset.json").write_text(json.dumps(content))
    rows = [{"case": "c_0000", "split": "train"}, {"case": "a_0000", "split": "test", "text": "a note"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = read_dataset(folder)
    assert dataset.format == "msd"
    assert {case.case: (case.split, case.text) for case in dataset.cases} == {
        "a_0000": ("test", "a note"),
        "b_0000": (None, None),
        "c_0000": ("val", None),
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,text\nd,a note\n", r"metadata\.csv, line 2: expected a case .* in id, such as a, .* got 'd'\. Correct"),
        ("id,text\na,one\na,two\n", r"line 3: expected a case of dataset\.json .* at most once, got 'a' again"),
        ("name,text\na,one\n", r"expected a column named id or case or case_id .*, got name, text\. Rename"),
    ],
)
def test_rows_of_nobody_are_refused(folder: Path, table: str, message: str) -> None:
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(BadInputError, match=message):
        read_dataset(folder)


def test_two_tables_are_refused(folder: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(BadInputError, match=r"expected metadata\.csv or metadata\.jsonl, got both"):
        read_dataset(folder)
