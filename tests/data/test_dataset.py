"""Folders are written with nibabel and Pillow, and read back through medgen."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from medgen.data.dataset import (
    Dataset,
    label_splits,
    load_case,
    load_cases,
    load_label,
    read_dataset,
    read_labels,
    split_cases,
)
from medgen.types import BadInputError

SHARED = Path(os.environ.get("MEDGEN_DATA", Path(__file__).parents[3] / "shared" / "data"))
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 2, 0, -7], [0, 0, 3, 4], [0, 0, 0, 1]], dtype=np.float64)
LABELS = {"0": "background", "1": "anterior", "2": "posterior"}

needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data: set MEDGEN_DATA to its folder")


def scan(seed: int = 0, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.float32)


def labels(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    label[1:3, 1:3], label[3, 3] = 1, 2
    return label


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def msd(root: Path, count: int = 3) -> Path:
    for index in range(count):
        nifti(root / f"imagesTr/hip_{index}.nii.gz", scan(index))
        nifti(root / f"labelsTr/hip_{index}.nii.gz", labels())
    entries = [
        {"image": f"./imagesTr/hip_{index}.nii.gz", "label": f"./labelsTr/hip_{index}.nii.gz"} for index in range(count)
    ]
    content = {"name": "Hip", "modality": {"0": "MRI"}, "labels": LABELS, "numTraining": count, "training": entries}
    write(root / "dataset.json", content)
    return root


def nnunet_v2(root: Path, **changes: object) -> Path:
    for case in ("a", "b_2"):
        for channel in range(2):
            nifti(root / f"imagesTr/{case}_{channel:04d}.nii.gz", scan(channel))
        nifti(root / f"labelsTr/{case}.nii.gz", labels())
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "posterior": 2, "anterior": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    write(root / "dataset.json", {**content, **changes})
    return root


def only(dataset: Dataset, case: str = "hip_0"):
    return next(item for item in dataset.cases if item.case == case)


def edit(root: Path, **changes: object) -> None:
    content = json.loads((root / "dataset.json").read_text())
    write(root / "dataset.json", {**content, **changes})


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_an_msd_folder_is_read_with_its_voxels_affine_and_names(tmp_path: Path) -> None:
    dataset = read_dataset(msd(tmp_path))
    assert (dataset.format, dataset.spatial_dims, dataset.modality) == ("msd", 3, "MR")
    assert dataset.class_names == {0: "background", 1: "anterior", 2: "posterior"}
    assert dataset.channel_names == {0: "MRI"}
    assert not dataset.synthetic
    sample = load_case(only(dataset, "hip_1"), dataset)
    assert np.array_equal(sample.image[0].numpy(), scan(1))
    assert np.array_equal(sample.label.numpy(), labels())
    assert np.allclose(sample.grid.affine, AFFINE)


def test_hidden_files_of_other_systems_are_no_cases(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path)
    write(root / "labelsTr/._a.nii.gz", "resource fork")
    write(root / "imagesTr/.a_0000.nii.gz.tmp", "unfinished")
    assert [case.case for case in read_dataset(root).cases] == ["a", "b_2"]


def test_an_msd_folder_with_four_dimensional_scans_has_channels(tmp_path: Path) -> None:
    root = msd(tmp_path, 1)
    nifti(root / "imagesTr/hip_0.nii.gz", scan(0, (5, 6, 7, 2)))
    edit(root, modality={"0": "T1w", "1": "FLAIR"})
    dataset = read_dataset(root)
    sample = load_case(dataset.cases[0], dataset)
    assert dataset.spatial_dims == 3
    assert sample.image.shape == (2, 5, 6, 7)
    assert np.array_equal(sample.image[1].numpy(), scan(0, (5, 6, 7, 2))[..., 1])


def test_the_validation_list_of_an_msd_folder_is_the_validation_split(tmp_path: Path) -> None:
    root = msd(tmp_path)
    entries = json.loads((root / "dataset.json").read_text())["training"]
    edit(root, training=entries[:2], validation=entries[2:], numTraining=2)
    train, val = split_cases(read_dataset(root))
    assert [case.case for case in train] == ["hip_0", "hip_1"]
    assert [case.case for case in val] == ["hip_2"]


def test_nnunet_v2_channels_follow_their_suffix_and_labels_their_value(tmp_path: Path) -> None:
    dataset = read_dataset(nnunet_v2(tmp_path))
    assert (dataset.format, dataset.modality) == ("nnunet", "MR")
    assert dataset.class_names == {0: "background", 1: "anterior", 2: "posterior"}
    sample = load_case(only(dataset, "b_2"), dataset)
    assert np.array_equal(sample.image.numpy(), np.stack([scan(0), scan(1)]))


def test_nnunet_v2_may_list_its_files(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path, numTraining=1)
    entry = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/b_2.nii.gz"}
    edit(root, dataset={"mixed": entry})
    dataset = read_dataset(root)
    assert [case.case for case in dataset.cases] == ["mixed"]
    assert load_case(dataset.cases[0], dataset).image.shape[0] == 2


def test_nnunet_v1_lists_cases_without_the_channel_suffix(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path)
    entries = [{"image": f"./imagesTr/{x}.nii.gz", "label": f"./labelsTr/{x}.nii.gz"} for x in ("a", "b_2")]
    write(root / "dataset.json", {"modality": {"0": "CT", "1": "CT"}, "labels": LABELS, "training": entries})
    dataset = read_dataset(root)
    assert (dataset.format, dataset.modality) == ("nnunet", "CT")
    assert load_case(only(dataset, "a"), dataset).image.shape == (2, 5, 6, 7)


def test_an_rgb_png_of_nnunet_is_one_file_with_three_channels(tmp_path: Path) -> None:
    picture = scan(0, (8, 9, 3)).astype(np.uint8)
    png(tmp_path / "imagesTr/a_0000.png", picture)
    png(tmp_path / "labelsTr/a.png", labels((8, 9)))
    content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": LABELS, "file_ending": ".png"}
    write(tmp_path / "dataset.json", content)
    dataset = read_dataset(tmp_path)
    assert (dataset.modality, dataset.spatial_dims) == ("RGB", 2)
    assert np.array_equal(load_case(dataset.cases[0], dataset).image.numpy(), picture.transpose(2, 0, 1))


def test_metadata_columns_become_text_group_split_and_meta(tmp_path: Path) -> None:
    for name in "ab":
        png(tmp_path / f"scans/{name}.png", scan(0, (8, 9)).astype(np.uint8))
        png(tmp_path / f"masks/{name}.png", labels((8, 9)))
    write(
        tmp_path / "metadata.csv",
        "file_name,mask,patient,split,caption,text,age\n"
        'scans/a.png,masks/a.png,p1,train,short,"a long, quoted note",54\n'
        "scans/b.png,,p2,Val,only a caption,,\n",
    )
    dataset = read_dataset(tmp_path)
    first, second = dataset.cases
    assert (dataset.format, dataset.spatial_dims, dataset.channel_names) == ("metadata", 2, {0: "image"})
    assert dataset.class_names == {0: "background", 1: "class_1", 2: "class_2"}
    assert (first.case, first.group, first.split, first.text) == ("scans_a", "p1", "train", "a long, quoted note")
    assert first.meta == {"patient": "p1", "caption": "short", "text": "a long, quoted note", "age": "54"}
    assert (second.label, second.split, second.text) == (None, "val", "only a caption")
    assert second.meta == {"patient": "p2", "caption": "only a caption", "text": "", "age": ""}
    assert load_case(second, dataset).label is None


def test_json_lines_may_list_one_file_per_channel(tmp_path: Path) -> None:
    nifti(tmp_path / "t1.nii.gz", scan(1))
    nifti(tmp_path / "t2.nii.gz", scan(2))
    nifti(tmp_path / "seg.nii.gz", labels())
    write(
        tmp_path / "metadata.jsonl",
        '{"id": "x", "image": ["t1.nii.gz", "t2.nii.gz"], "label": "seg.nii.gz", "age": 7}\n\n',
    )
    dataset = read_dataset(tmp_path)
    assert dataset.cases[0].meta == {"age": "7"}
    assert dataset.channel_names == {0: "channel_0", 1: "channel_1"}
    assert np.array_equal(load_case(dataset.cases[0], dataset).image[1].numpy(), scan(2))


def test_classes_json_names_the_classes_and_holds_the_labels_to_them(tmp_path: Path) -> None:
    png(tmp_path / "images/a.png", scan(0, (8, 9)).astype(np.uint8))
    path = png(tmp_path / "labels/a.png", labels((8, 9)))
    write(tmp_path / "classes.json", {"0": "background", "1": "lesion"})
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == {0: "background", 1: "lesion"}
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(path))}: expected label values .*1 \(lesion\), got 2\."):
        load_case(dataset.cases[0], dataset)


def test_plain_folders_pair_by_name_and_take_their_split_from_text_files(tmp_path: Path) -> None:
    for name in "abc":
        png(tmp_path / f"images/{name}.png", scan(0, (8, 9)).astype(np.uint8))
    png(tmp_path / "labels/a.png", labels((8, 9)))
    write(tmp_path / "val.txt", "b.png\n")
    dataset = read_dataset(tmp_path)
    assert dataset.format == "plain"
    assert [case.label is None for case in dataset.cases] == [False, True, True]
    assert [[case.case for case in part] for part in split_cases(dataset)] == [["a", "c"], ["b"]]


def test_gray_pictures_in_a_color_set_become_equal_channels_and_are_noted(tmp_path: Path) -> None:
    gray, color = scan(0, (8, 9)).astype(np.uint8), scan(1, (8, 9, 3)).astype(np.uint8)
    png(tmp_path / "images/a.png", gray)
    png(tmp_path / "images/b.png", color)
    dataset = read_dataset(tmp_path)
    assert dataset.modality == "RGB"
    assert dataset.notes == ["1 gray and 1 RGB images: gray ones are read as RGB of equal channels"]
    assert np.array_equal(load_case(dataset.cases[0], dataset).image.numpy(), np.stack([gray] * 3))
    assert np.array_equal(load_case(dataset.cases[1], dataset).image.numpy(), color.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "alpha.tif", "four.tif"])
def test_a_folder_declares_the_channels_that_its_pictures_are_read_with(tmp_path: Path, kind: str) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    color = np.random.default_rng(0).integers(0, 255, (8, 9, 4), dtype=np.uint8)
    if kind == "alpha.tif":
        color[..., 3] = 255
        tifffile.imwrite(tmp_path / "images" / "a.tif", color, photometric="rgb", extrasamples=["unassalpha"])
    elif kind == "four.tif":
        tifffile.imwrite(
            tmp_path / "images" / "a.tif", color, photometric="minisblack", planarconfig="contig", extrasamples=[0] * 3
        )
    else:
        Image.fromarray(color[..., :3]).convert(kind).save(tmp_path / "images" / "a.png")
    png(tmp_path / "labels" / "a.png", labels((8, 9)))
    dataset = read_dataset(tmp_path)
    channels = {"LA": 1, "L": 1, "four.tif": 4}.get(kind, 3)
    assert len(dataset.channel_names) == channels
    assert load_case(dataset.cases[0], dataset).image.shape[0] == channels


def test_a_label_stored_in_another_axis_order_is_brought_onto_the_image(tmp_path: Path) -> None:
    root = msd(tmp_path, 1)
    label = nib.Nifti1Image(labels(), AFFINE)
    turned = label.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    assert turned.shape != label.shape
    nib.save(turned, root / "labelsTr/hip_0.nii.gz")
    dataset = read_dataset(root)
    assert np.array_equal(load_case(dataset.cases[0], dataset).label.numpy(), labels())


# --- splits ----------------------------------------------------------------------------------------------------------


def grouped(root: Path, count: int = 20) -> Dataset:
    png(root / "images/x.png", scan(0, (8, 9)).astype(np.uint8))
    rows = "".join(f"c{index},images/x.png,p{index // 3}\n" for index in range(count))
    write(root / "metadata.csv", "id,image,patient\n" + rows)
    return read_dataset(root)


def test_a_split_keeps_every_patient_whole_and_reaches_its_share(tmp_path: Path) -> None:
    for count in range(16, 24):
        dataset = grouped(tmp_path, count)
        train, val = split_cases(dataset, val_fraction=0.2)
        assert not {case.group for case in train} & {case.group for case in val}
        assert sorted(case.case for case in train + val) == sorted(case.case for case in dataset.cases)
        assert 0.2 * count <= len(val) < 0.2 * count + 3


def test_a_split_does_not_depend_on_the_order_of_the_cases(tmp_path: Path) -> None:
    dataset = grouped(tmp_path)
    held_out = {case.case for case in split_cases(dataset)[1]}
    dataset.cases.reverse()
    assert {case.case for case in split_cases(dataset)[1]} == held_out


def test_a_given_split_that_tears_a_patient_apart_is_warned_about(tmp_path: Path) -> None:
    dataset = grouped(tmp_path)
    write(tmp_path / "val.txt", "c0\n")
    dataset = read_dataset(tmp_path)
    with pytest.warns(UserWarning, match="1 group.* such as p0"):
        assert len(split_cases(dataset)[1]) == 1
    assert dataset.cases[0].split == "val"


def test_a_single_patient_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="expected cases for training and for validation, got 2 and 0"):
        split_cases(grouped(tmp_path, 2))


# --- bad cases -------------------------------------------------------------------------------------------------------

IMAGE, LABEL = "imagesTr/hip_0.nii.gz", "labelsTr/hip_0.nii.gz"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array[2, 2, 2] = value
    return array


SHIFTED = AFFINE + np.array([[0, 0, 0, 0.5]] * 3 + [[0, 0, 0, 0]])

BAD_CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing image": (IMAGE, lambda path: path.unlink(), "expected"),
    "missing label": (LABEL, lambda path: path.unlink(), "expected"),
    "truncated image": (IMAGE, truncate, "expected"),
    "truncated label": (LABEL, truncate, "expected"),
    "unreadable image": (IMAGE, lambda path: path.write_text("no scan"), "expected"),
    "NaN": (IMAGE, lambda path: nifti(path, with_value(scan(), np.nan)), "expected"),
    "infinity": (IMAGE, lambda path: nifti(path, with_value(scan(), np.inf)), "expected"),
    "constant": (
        IMAGE,
        lambda path: nifti(path, np.full((5, 6, 7), 3, np.float32)),
        "expected an image with contrast, got the constant value 3 in channel 0",
    ),
    "empty label": (LABEL, lambda path: nifti(path, labels() * 0), "got an empty label"),
    "undeclared value": (
        LABEL,
        lambda path: nifti(path, labels() + 6),
        r"expected label values 0 \(background\), 1 \(anterior\), 2 \(posterior\), got 6, 7, 8",
    ),
    "fractional label": (LABEL, lambda path: nifti(path, labels() * np.float32(0.5)), "expected"),
    "other shape": (
        LABEL,
        lambda path: nifti(path, labels((5, 6, 8))),
        r"expected shape \(5, 6, 7\).* got \(5, 6, 8\)",
    ),
    "other affine": (LABEL, lambda path: nifti(path, labels(), SHIFTED), r"voxels up to 0\.866 mm elsewhere"),
    "too many channels": (IMAGE, lambda path: nifti(path, scan(0, (5, 6, 7, 2))), r"1 channel\(s\) \(MRI\), got 2"),
    "2D among 3D": (IMAGE, lambda path: nifti(path, scan(0, (5, 6, 1))), "expected a 3D scan"),
}


@pytest.mark.parametrize("kind", BAD_CASES)
def test_a_bad_case_is_named_by_its_file_and_can_be_skipped(tmp_path: Path, kind: str) -> None:
    name, spoil, words = BAD_CASES[kind]
    root = msd(tmp_path)
    spoil(root / name)
    dataset = read_dataset(root)
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(root / name))}\b.*{words}") as error:
        list(load_cases(dataset, dataset.cases))
    assert "\n" not in str(error.value)
    assert dataset.rejected == []

    good = [sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True)]
    assert good == ["hip_1", "hip_2"]
    assert [(rejection.case, rejection.reason) for rejection in dataset.rejected] == [("hip_0", str(error.value))]
    list(load_cases(dataset, dataset.cases, skip_bad=True))
    assert len(dataset.rejected) == 1


def test_a_header_rounded_by_a_hundredth_of_a_voxel_passes(tmp_path: Path) -> None:
    root = msd(tmp_path, 1)
    nifti(root / LABEL, labels(), AFFINE + 0.002 * np.eye(4, k=3))
    dataset = read_dataset(root)
    load_case(dataset.cases[0], dataset)


def test_skipping_every_case_is_still_an_error(tmp_path: Path) -> None:
    root = msd(tmp_path, 2)
    for path in (root / "imagesTr").iterdir():
        nifti(path, scan() * 0)
    dataset = read_dataset(root)
    with pytest.raises(BadInputError, match=r"at least one good case, got 2 bad ones; the first: .*hip_0"):
        list(load_cases(dataset, dataset.cases, skip_bad=True))


def test_one_color_may_be_empty_but_not_the_whole_picture(tmp_path: Path) -> None:
    picture = scan(0, (8, 9, 3)).astype(np.uint8)
    picture[..., 2] = 0
    png(tmp_path / "images/a.png", picture)
    path = png(tmp_path / "images/b.png", picture * 0)
    dataset = read_dataset(tmp_path)
    load_case(dataset.cases[0], dataset)
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(path))}: expected an image with contrast"):
        load_case(dataset.cases[1], dataset)


def test_a_missing_channel_file_is_named(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path)
    (root / "imagesTr/a_0000.nii.gz").unlink()
    with pytest.raises(BadInputError, match=r"a_0000\.nii\.gz: expected channel 0 of a, got none\. Add the file"):
        read_dataset(root)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path)
    path = nifti(root / "imagesTr/a_0001.nii.gz", scan(), SHIFTED)
    dataset = read_dataset(root)
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(path))}: expected the affine of .*a_0000"):
        load_case(only(dataset, "a"), dataset)


def test_a_png_label_for_a_nifti_image_is_refused(tmp_path: Path) -> None:
    nifti(tmp_path / "images/a.nii.gz", scan(0, (8, 9, 1)))
    png(tmp_path / "labels/a.png", labels((8, 9)))
    dataset = read_dataset(tmp_path)
    with pytest.raises(BadInputError, match=r"a\.png: expected a file with an affine"):
        load_case(dataset.cases[0], dataset)


# --- bad folders -----------------------------------------------------------------------------------------------------

BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no layout": (lambda root: write(root / "notes.txt", "x"), r"expected dataset\.json .* got notes\.txt"),
    "two lists": (
        lambda root: (write(root / "metadata.csv", "image\n"), write(root / "metadata.jsonl", "")),
        "got both",
    ),
    "broken JSON": (lambda root: write(root / "dataset.json", "{"), r"dataset\.json: expected JSON"),
    "JSON of another kind": (lambda root: write(root / "dataset.json", [1]), "expected a JSON object, got list"),
    "foreign JSON": (lambda root: write(root / "dataset.json", {"a": 1}), "expected channel_names .* got a"),
    "regions": (
        lambda root: edit(nnunet_v2(root), labels={"background": 0, "whole": [1, 2], "core": 2}),
        r"got the region whole: \[1, 2\]",
    ),
    "ignore class": (lambda root: edit(nnunet_v2(root), labels={"background": 0, "ignore": 1}), "the class ignore"),
    "gap in classes": (lambda root: edit(msd(root), labels={"0": "b", "2": "x"}), r"without gaps, got \[0, 2\]"),
    "classes without numbers": (lambda root: edit(msd(root), labels={"a": "b"}), "got 'a': 'b'"),
    "no classes": (lambda root: edit(msd(root), labels=None), "Declare the classes"),
    "no channels": (lambda root: edit(msd(root), modality={"1": "MRI"}), "Number channels from 0"),
    "no ending": (lambda root: edit(nnunet_v2(root), file_ending=None), "expected file_ending"),
    "no channel suffix": (
        lambda root: nifti(nnunet_v2(root) / "imagesTr/c.nii.gz", scan()),
        r"c\.nii\.gz: expected a name that ends in its channel, such as CASE_0000",
    ),
    "no cases": (lambda root: edit(msd(root), training=[]), "at least one training case"),
    "bad entry": (lambda root: edit(msd(root), training=["./imagesTr/hip_0.nii.gz"]), "expected entry 0 of training"),
    "one case twice": (
        lambda root: edit(msd(root), training=[{"image": IMAGE, "label": LABEL}] * 2, numTraining=2),
        "one entry per case, got hip_0 twice",
    ),
    "no image column": (lambda root: write(root / "metadata.csv", "id,scan\na,b\n"), "expected a column named image"),
    "no image in a row": (lambda root: write(root / "metadata.csv", "id,image\na,\n"), "line 2: expected a file"),
    "ragged row": (lambda root: write(root / "metadata.csv", "id,image\na,b,c\n"), "line 2: expected 2 columns"),
    "a name that leads out of a folder": (
        lambda root: write(root / "metadata.csv", "id,image\n../../up,a.png\n"),
        r"metadata\.csv: expected identifiers of cases that can be file names .*, got '\.\./\.\./up'",
    ),
    "an absolute path as a name": (
        lambda root: write(root / "metadata.jsonl", '{"id": "/etc/x", "image": "a.png"}'),
        r"metadata\.jsonl: expected identifiers .*, got '/etc/x'",
    ),
    "a name that leads out of a folder in nnU-Net's list": (
        lambda root: edit(nnunet_v2(root), dataset={"../x": {"images": [], "label": ""}}),
        r"dataset\.json: expected identifiers .*, got '\.\./x'",
    ),
    "a hidden name": (
        lambda root: write(root / "metadata.csv", "id,image\n.x,a.png\n"),
        r"metadata\.csv: expected identifiers .*, got '\.x'",
    ),
    "no rows": (lambda root: write(root / "metadata.csv", "id,image\n"), "at least one row"),
    "broken line": (lambda root: write(root / "metadata.jsonl", '{"image": 1'), "one JSON object per line"),
    "no object": (lambda root: write(root / "metadata.jsonl", "[1]"), "line 1: expected a JSON object"),
    "binary table": (lambda root: (root / "metadata.csv").write_bytes(b"id,image\n\xff\xfe,x\n"), "in UTF-8"),
    "unknown name in a split": (
        lambda root: (grouped(root), write(root / "val.txt", "nobody\n")),
        r"val\.txt: expected names of cases, got nobody",
    ),
    "name in two splits": (
        lambda root: (grouped(root), write(root / "val.txt", "c0\n"), write(root / "train.txt", "c0\n")),
        r"val\.txt: expected c0 in one split",
    ),
    "names that do not pair": (
        lambda root: (
            png(root / "images/a.png", scan(0, (8, 9)).astype(np.uint8)),
            png(root / "labels/a_mask.png", labels((8, 9))),
        ),
        r"a_mask\.png: expected an image of the same name",
    ),
    "no images": (lambda root: (root / "images").mkdir(), r"images: expected scans, got an empty folder"),
    "instance numbers": (
        lambda root: (
            png(root / "images/a.png", scan(0, (16, 16)).astype(np.uint8)),
            png(root / "labels/a.png", np.arange(256, dtype=np.uint8).reshape(16, 16)),
        ),
        r"a\.png: expected at most 64 classes, got 256 values",
    ),
    "mask of 0 and 255": (
        lambda root: (
            png(root / "images/a.png", scan(0, (8, 9)).astype(np.uint8)),
            png(root / "labels/a.png", np.minimum(labels((8, 9)), 1) * np.uint8(255)),
        ),
        r"without gaps, got \[0, 255\]; .*a\.png has 255",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, kind: str) -> None:
    spoil, words = BAD_FOLDERS[kind]
    spoil(tmp_path)
    with pytest.raises(BadInputError, match=words) as error:
        read_dataset(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="absent: expected a folder of scans, got nothing there"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(BadInputError, match=r"x\.txt: expected a folder of scans, got a file"):
        read_dataset(write(tmp_path / "x.txt", "x"))


def test_a_wrong_count_and_a_label_without_image_are_warned_about(tmp_path: Path) -> None:
    root = msd(tmp_path / "msd")
    edit(root, numTraining=5)
    with pytest.warns(UserWarning, match=r"numTraining says 5 case\(s\), the folder has 3"):
        read_dataset(root)
    png(tmp_path / "plain/images/a.png", scan(0, (8, 9)).astype(np.uint8))
    for name in "ab":
        png(tmp_path / f"plain/labels/{name}.png", labels((8, 9)))
    with pytest.warns(UserWarning, match=r"b\.png: expected an image of the same name"):
        read_dataset(tmp_path / "plain")


# --- label folders ---------------------------------------------------------------------------------------------------


def test_a_folder_of_label_maps_is_listed_by_name_and_loaded(tmp_path: Path) -> None:
    for name in ("b.v2", "a"):
        nifti(tmp_path / f"{name}.nii.gz", labels())
    write(tmp_path / "notes.txt", "x")
    found = read_labels(tmp_path)
    assert [case for case, _ in found] == ["a", "b.v2"]
    sample = load_label(found[1][1], {0: "background", 1: "x", 2: "y"})
    assert (sample.case, sample.image) == ("b.v2", None)
    assert np.array_equal(sample.label.numpy(), labels())
    with pytest.raises(BadInputError, match=r"a\.nii\.gz: expected label values 0 \(background\), 1 \(x\), got 2"):
        load_label(found[0][1], {0: "background", 1: "x"})


def test_a_label_folder_without_or_with_double_label_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="absent: expected a folder of label maps"):
        read_labels(tmp_path / "absent")
    root = msd(tmp_path / "msd")
    with pytest.raises(BadInputError, match=r"expected label maps .* got .*dataset\.json.*Did you mean .*labelsTr\?"):
        read_labels(root)
    png(root / "labelsTr/hip_0.png", labels((8, 9)))
    with pytest.raises(BadInputError, match="one label map per case"):
        read_labels(root / "labelsTr")


# --- the real sets ---------------------------------------------------------------------------------------------------

REAL = {
    "hippocampus3d": (3, 1, 3, 182, 39),
    "cardiac_acdc": (2, 1, 4, 416, 89),
    "nuclei_dsb2018": (2, 3, 2, 139, 29),
    "cxr_text": (2, 1, 2, 213, 46),
}


@needs_real_data
@pytest.mark.parametrize("name", REAL)
def test_a_real_set_is_read_with_its_counts_and_loads(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} in the real data")
    dataset = read_dataset(SHARED / name)
    train, val = split_cases(dataset)
    figures = (dataset.spatial_dims, len(dataset.channel_names), len(dataset.class_names), len(train), len(val))
    assert figures == REAL[name]
    assert all(len(list(load_cases(dataset, part[:3]))) == 3 for part in (train, val))
    if name == "cxr_text":
        assert Counter(case.label is None for case in dataset.cases) == {True: 155, False: 104}
        assert all(case.text for case in dataset.cases)


def test_label_maps_know_the_split_that_the_data_set_around_them_names(tmp_path: Path) -> None:
    root = nnunet_v2(tmp_path)
    labels = sorted((root / "labelsTr").iterdir())
    assert label_splits(root / "labelsTr") == {}
    assert label_splits(root / "labelsTr" / "absent") == {}
    (root / "val.txt").write_text(f"{labels[0].name}\n")
    splits = label_splits(root / "labelsTr")
    assert splits.pop(labels[0].resolve()) == "val"
    assert splits
    assert set(splits.values()) == {"train"}
