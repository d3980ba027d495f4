from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import (
    AsDiscreted,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    ScaleIntensityd,
    Spacingd,
)
from PIL import Image

from medgen.provenance import sha256_file
from medgen.transforms import SyntheticBank
from medgen.types import BadInputError

KEYS = ("image", "label")


def load() -> LoadImaged:
    return LoadImaged(KEYS, ensure_channel_first=True)


def test_pairs_are_the_stored_voxels_in_their_stored_types(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank", spacing=1.5, channels=2)
    bank = SyntheticBank(folder)
    assert len(bank) == 4
    for (image, label), item in zip(bank, bank.items, strict=True):
        files = [nib.load(folder / "imagesTr" / f"{item.case}_{channel:04d}.nii.gz") for channel in (0, 1)]
        np.testing.assert_array_equal(image.array, np.stack([np.asarray(file.dataobj) for file in files]))
        np.testing.assert_array_equal(image.affine, files[0].affine)
        stored = nib.load(folder / "labelsTr" / f"{item.case}.nii.gz")
        np.testing.assert_array_equal(label.array[0], np.asarray(stored.dataobj))
        assert (image.array.dtype, label.array.dtype) == (np.int16, np.uint8)
        assert Path(image.file) == folder / "imagesTr" / f"{item.case}_0000.nii.gz"
    assert not image.array.flags.writeable


def test_flat_pictures_lie_as_monai_loads_them(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank", dims=2)
    image, label = SyntheticBank(folder)[1]
    for array, name in (
        (image.array, "imagesTr/synthetic_00001_0000.png"),
        (label.array, "labelsTr/synthetic_00001.png"),
    ):
        np.testing.assert_array_equal(array[0], np.asarray(Image.open(folder / name)).T)


def test_scans_go_through_the_transforms_that_real_ones_go_through(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank")
    prepare = [
        load(),
        Orientationd(KEYS, "LPS", labels=None),
        Spacingd(KEYS, (2.0, 2.0, 2.0), mode=("bilinear", "nearest")),
        ScaleIntensityd("image"),
        CropForegroundd(KEYS, source_key="label"),
    ]
    bank = SyntheticBank(folder, preprocess=prepare)
    for (image, label), item in zip(bank, bank.items, strict=True):
        name = folder / "imagesTr" / f"{item.case}_0000.nii.gz"
        expected = Compose(prepare)({"image": str(name), "label": str(folder / item.label_file)})
        np.testing.assert_array_equal(image.array, expected["image"].numpy())
        np.testing.assert_array_equal(label.array, expected["label"].numpy())
        np.testing.assert_allclose(image.affine, expected["image"].affine)
        assert image.array.dtype == np.float32
        assert item.facts.spacing == (2.0, 2.0, 2.0)
        assert item.facts.orientation == ("L", "P", "S")


def test_any_function_can_prepare_and_other_keys_can_be_used(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank")

    def read(files):
        scan, seg = (torch.from_numpy(np.asarray(nib.load(files[key]).dataobj))[None] for key in ("scan", "seg"))
        return {"scan": scan / 4, "seg": seg}

    bank = SyntheticBank(folder, image_key="scan", label_key="seg", preprocess=read)
    stored = np.asarray(nib.load(folder / "imagesTr" / "synthetic_00000_0000.nii.gz").dataobj)
    np.testing.assert_array_equal(bank[0][0].array[0], stored / np.float32(4))
    assert bank[0][0].affine is None


def test_a_pickled_bank_reads_the_same_file_and_a_copy_is_the_bank(make_bank, tmp_path):
    bank = SyntheticBank(make_bank(tmp_path / "bank"))
    bank[0]
    reopened = pickle.loads(pickle.dumps(bank))
    np.testing.assert_array_equal(reopened[3][0].array, bank[3][0].array)
    assert "memmap" not in str(reopened.__getstate__())
    assert copy.deepcopy(bank) is bank


def test_the_packed_file_goes_with_the_bank_and_not_with_a_worker(make_bank, tmp_path):
    bank = SyntheticBank(make_bank(tmp_path / "bank"))
    home = bank._path.parent
    worker = multiprocessing.get_context("fork").Process(target=_drop, args=([bank],))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert bank._path.is_file()
    del bank, worker
    gc.collect()
    assert not home.exists()


def _drop(held: list) -> None:
    """Do in a worker what the end of the bank does."""
    [finalizer] = [each for each in weakref.finalize._registry if each.peek()[0] is held[0]]
    finalizer()


def test_a_cached_file_is_used_again_only_for_the_same_scans_and_transforms(make_bank, tmp_path):
    folder, cache = make_bank(tmp_path / "bank"), tmp_path / "cache"
    first = SyntheticBank(folder, cache_dir=cache)
    before = first._path.stat().st_mtime_ns
    again = SyntheticBank(folder, cache_dir=cache)
    assert (again._path, again._path.stat().st_mtime_ns) == (first._path, before)
    assert again.items == first.items
    np.testing.assert_array_equal(again[2][0].array, first[2][0].array)
    again_2 = again[2][0].array.copy()
    scaled = [
        SyntheticBank(folder, cache_dir=cache, preprocess=[load(), ScaleIntensityd("image", maxv=maxv)])
        for maxv in (1, 2)
    ]
    assert len({first._path, *(bank._path for bank in scaled)}) == 3
    assert [bank[0][0].array.max() for bank in scaled] == [1, 2]
    first._path.write_bytes(first._path.read_bytes()[:-9])
    mended = SyntheticBank(folder, cache_dir=cache)
    assert mended._path == first._path
    np.testing.assert_array_equal(mended[2][0].array, again_2)


def test_classes_that_a_label_shows_are_known_also_where_it_is_one_hot(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank", classes=[(1,), (1, 2)])
    for prepare in ([load()], [load(), AsDiscreted("label", to_onehot=3)]):
        bank = SyntheticBank(folder, preprocess=prepare)
        assert [item.classes for item in bank.items] == [(0, 1), (0, 1, 2), (0, 1), (0, 1, 2)]


def _lines(folder: Path) -> list[str]:
    return (folder / "manifest.jsonl").read_text().splitlines(keepends=True)


def _spoil(folder: Path, how: str) -> None:
    manifest = folder / "manifest.jsonl"
    if how == "no manifest":
        manifest.unlink()
    elif how == "empty":
        manifest.write_text("")
    elif how == "damaged":
        lines = _lines(folder)
        manifest.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    elif how == "cut off":
        manifest.write_text("".join(_lines(folder))[:-30])
    elif how == "rejected":
        lines = [json.loads(line) | {"gates": {"reasons": [], "scores": {}}} for line in _lines(folder)]
        lines[2]["gates"]["reasons"] = ["dice_head"]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif how == "missing":
        (folder / "imagesTr" / "synthetic_00002_0000.nii.gz").unlink()
    elif how == "altered":
        target = folder / "labelsTr" / "synthetic_00001.nii.gz"
        target.write_bytes((folder / "labelsTr" / "synthetic_00000.nii.gz").read_bytes() + b" ")
    elif how == "not listed":
        content = json.loads((folder / "dataset.json").read_text())
        content["dataset"] = {"x": {"images": ["imagesTr/synthetic_00000_0000.nii.gz"], "label": "labelsTr/x"}}
        (folder / "dataset.json").write_text(json.dumps(content))
    elif how == "classes":
        content = json.loads((folder / "dataset.json").read_text())
        content["labels"].popitem()
        (folder / "dataset.json").write_text(json.dumps(content))
    elif how == "channels":
        content = json.loads((folder / "dataset.json").read_text())
        content["channel_names"]["1"] = "CT"
        (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no manifest", r"bank: expected a bank of synthetic scans with manifest.jsonl, got none"),
        ("empty", "expected at least one scan, got an empty bank"),
        ("damaged", "manifest.jsonl: line 2: expected JSON"),
        ("cut off", "expected a record of every scan, got none of synthetic_00003"),
        (
            "missing",
            "synthetic_00002_0000.nii.gz: expected the file that .* lists for synthetic_00002, got none",
        ),
        ("rejected", r"got synthetic_00002, which they rejected \(dice_head\)"),
        ("altered", r"synthetic_00001.nii.gz: expected the file that .* \(SHA-256 .*, got another"),
        ("not listed", "expected a record of every scan, got none of x"),
        ("classes", r"expected label values 0 \(background\), 1 \(head\), got 2"),
        ("channels", r"expected 2 channel\(s\) \(MR0, CT\), got 1"),
    ],
)
def test_a_bank_that_is_not_whole_is_refused(make_bank, tmp_path, how, message):
    folder = make_bank(tmp_path / "bank")
    _spoil(folder, how)
    with pytest.raises(BadInputError, match=message):
        SyntheticBank(folder)


def test_scans_of_several_channel_counts_are_refused(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank", channels=2)
    lines = [json.loads(line) for line in _lines(folder)]
    (folder / "imagesTr" / "synthetic_00003_0001.nii.gz").unlink()
    del lines[3]["files"]["imagesTr/synthetic_00003_0001.nii.gz"]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadInputError, match=r"synthetic_00003_0000.nii.gz: expected 2 channel\(s\).*got 1"):
        SyntheticBank(folder)


def _store_anew(folder: Path, indices: tuple[int, ...], affine: np.ndarray, *, turned: bool) -> None:
    """Some scans with another affine, turned about to show the same in space, as other software stores them."""
    lines = [json.loads(line) for line in _lines(folder)]
    for index in indices:
        for name in lines[index]["files"]:
            voxels = np.asarray(nib.load(folder / name).dataobj)
            nib.save(nib.Nifti1Image(voxels[::-1].copy() if turned else voxels, affine), folder / name)
            lines[index]["files"][name] = sha256_file(folder / name)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_scans_of_several_orientations_are_refused_unless_made_alike(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank")
    expected = [image.array.copy() for image, _ in SyntheticBank(folder)]
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = 8
    _store_anew(folder, (1, 3), mirrored, turned=True)
    with pytest.raises(BadInputError, match=r"one orientation, got LAS of synthetic_00001 and RAS .*Orientationd"):
        SyntheticBank(folder)
    bank = SyntheticBank(folder, preprocess=[load(), Orientationd(KEYS, "RAS", labels=None)])
    for (image, _), array in zip(bank, expected, strict=True):
        np.testing.assert_array_equal(image.array, array)


def test_scans_of_several_voxel_sizes_are_refused_unless_made_alike(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank")
    _store_anew(folder, (1,), np.diag([1.05, 1.0, 1.0, 1.0]), turned=False)
    assert len(SyntheticBank(folder)) == 4
    _store_anew(folder, (2,), np.diag([1.0, 1.0, 3.0, 1.0]), turned=False)
    with pytest.raises(BadInputError, match=r"one voxel size, got 1 x 1 x 3 mm of synthetic_00002 and .*Spacingd"):
        SyntheticBank(folder)
    spacing = Spacingd(KEYS, (2.0, 2.0, 2.0), mode=("bilinear", "nearest"))
    assert len(SyntheticBank(folder, preprocess=[load(), spacing])) == 4


def test_labels_of_several_channel_counts_are_refused(make_bank, tmp_path):
    def some_one_hot(data):
        made = load()(data)
        return AsDiscreted("label", to_onehot=3)(made) if "00002" in data["label"] else made

    with pytest.raises(BadInputError, match="labels of one number of channels, got 3 of synthetic_00002 and 1 of"):
        SyntheticBank(make_bank(tmp_path / "bank"), preprocess=some_one_hot)


def test_a_bank_without_labels_is_for_images_alone(make_bank, tmp_path):
    folder = make_bank(tmp_path / "bank", labelled=False)
    with pytest.raises(BadInputError, match="expected a label map for every scan, got none for synthetic_00000"):
        SyntheticBank(folder)
    assert SyntheticBank(folder, label_key=None)[0][1] is None


class _Counts:
    """Gives another result each time, which MONAI cannot know."""

    calls = 0

    def __call__(self, data):
        self.calls += 1
        return {"image": data["image"] + self.calls, "label": data["label"]}


def _nan(data):
    return {"image": data["image"] * float("nan"), "label": data["label"]}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ([load(), RandFlipd(KEYS)], "expected deterministic transforms.*got RandFlipd"),
        (Compose([load(), Compose([RandFlipd(KEYS)])]), "expected deterministic transforms.*got RandFlipd"),
        ([load(), _Counts()], "expected the same result each time"),
        ([EnsureChannelFirstd(KEYS)], "failed on synthetic_00000: .*begin with the transform that loads them"),
        (lambda data: data, "image of synthetic_00000: expected an array.*got str"),
        ([load(), CropForegroundd("image", source_key="label")], "expected image and label of one shape"),
        ([LoadImaged(KEYS)], r"expected images of shape \(C, H, W, D\), got \(9, 8, 7\)"),
        ([load(), ScaleIntensityd(KEYS)], "expected whole class values, got 0.5"),
        ([load(), _nan], "expected finite intensities"),
    ],
)
def test_transforms_that_cannot_be_right_are_refused(make_bank, tmp_path, prepare, message):
    with pytest.raises(BadInputError, match=message):
        SyntheticBank(make_bank(tmp_path / "bank"), preprocess=prepare)
