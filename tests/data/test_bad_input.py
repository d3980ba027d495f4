"""Bad scans among good ones: each is named, each can be skipped, and none takes the rest of the folder with it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from medgen.data.dataset import load_cases, read_dataset
from medgen.data.intensity import Normalization
from medgen.data.io import read_image
from medgen.types import BadInputError

CLASSES = '{"0": "background", "1": "cell"}'


def picture(seed: int = 0, channels: int | None = None) -> np.ndarray:
    shape = (12, 13) if channels is None else (12, 13, channels)
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def mask(shape: tuple[int, int] = (12, 13)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[3:7, 4:9] = 1
    return label


def png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def volume(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def pictures(root: Path, channels: int | None = None) -> Path:
    """Three labelled pictures in nnU-Net's layout, which declares channels and classes."""
    for name in "abc":
        png(root / f"imagesTr/{name}_0000.png", picture(ord(name), channels))
        png(root / f"labelsTr/{name}.png", mask())
    names = '{"0": "X-ray"}' if channels is None else '{"0": "R", "1": "G", "2": "B"}'
    content = f'{{"channel_names": {names}, "labels": {{"background": 0, "cell": 1}}, "file_ending": ".png"}}'
    (root / "dataset.json").write_text(content)
    return root


IMAGE, LABEL = "imagesTr/a_0000.png", "labelsTr/a.png"

# What is spoilt, how, in a set of how many channels, and what the message says after the name of the file.
BAD_PICTURES: dict[str, tuple[str, Callable[[Path], object], int | None, str]] = {
    "missing label": (LABEL, Path.unlink, None, "expected a file, got nothing there. Check the path"),
    "truncated image": (IMAGE, truncate, None, "expected a readable png .*truncated: copy it again"),
    "truncated label": (LABEL, truncate, None, "expected a readable png .*truncated: copy it again"),
    "truncated RGB": (IMAGE, truncate, 3, "expected a readable png .*truncated: copy it again"),
    "nothing but the header": (IMAGE, lambda path: truncate(path, 0.1), None, "expected a readable png"),
    "empty file": (IMAGE, lambda path: path.write_bytes(b""), None, "expected a readable png"),
    "no picture": (IMAGE, lambda path: path.write_text("no scan"), None, "expected a readable png"),
    # The comment lies where a PNG states its depth, so that nothing but the signature tells the two apart.
    "another format": (
        IMAGE,
        lambda path: Image.fromarray(picture()).save(path, "JPEG", comment="scanned"),
        None,
        "expected a readable png file",
    ),
    "constant": (IMAGE, lambda path: png(path, picture() * 0 + 7), None, "expected an image with contrast.* value 7"),
    "constant RGB": (IMAGE, lambda path: png(path, picture(0, 3) * 0), 3, "expected an image with contrast.* value 0"),
    "RGB among gray": (IMAGE, lambda path: png(path, picture(0, 3)), None, r"expected 1 channel\(s\) .*, got 3"),
    "alpha in use": (IMAGE, lambda path: png(path, picture(0, 4)), 3, "expected no transparency"),
    "empty label": (LABEL, lambda path: png(path, mask() * 0), None, "got an empty label"),
    "undeclared value": (LABEL, lambda path: png(path, mask() * 255), None, r"1 \(cell\), got 255\. Correct"),
    "colors for classes": (LABEL, lambda path: png(path, picture(0, 3)), None, "a label map with one channel, got 3"),
    "other shape": (LABEL, lambda path: png(path, mask((13, 12))), None, r"shape \(12, 13\) .*got \(13, 12\)"),
    "other size of the image": (
        LABEL,
        lambda path: png(path.parents[1] / IMAGE, picture()[:8]),
        None,
        r"expected shape \(8, 13\) as in .*a_0000\.png, got \(12, 13\)",
    ),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_named_by_its_file_and_can_be_skipped(tmp_path: Path, kind: str) -> None:
    name, spoil, channels, words = BAD_PICTURES[kind]
    root = pictures(tmp_path, channels)
    spoil(root / name)
    dataset = read_dataset(root)
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(root / name))}: .*{words}") as error:
        list(load_cases(dataset, dataset.cases))
    assert "\n" not in str(error.value)
    assert [sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True)] == ["b", "c"]
    assert [(item.case, item.reason) for item in dataset.rejected] == [("a", str(error.value))]


def test_a_label_without_its_picture_is_a_bad_case_and_no_bad_folder(tmp_path: Path) -> None:
    root = pictures(tmp_path)
    (root / IMAGE).unlink()
    dataset = read_dataset(root)
    assert [sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True)] == ["b", "c"]
    assert re.fullmatch(r".*a_0000\.png: expected a file, got nothing there\..*", dataset.rejected[0].reason)


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_missing_file_of_a_metadata_table_is_named(tmp_path: Path, name: str) -> None:
    for case in "ab":
        png(tmp_path / f"{case}_image.png", picture(ord(case)))
        png(tmp_path / f"{case}_label.png", mask())
    (tmp_path / "metadata.csv").write_text("image,label\na_image.png,a_label.png\nb_image.png,b_label.png\n")
    (tmp_path / f"a_{name}.png").unlink()
    dataset = read_dataset(tmp_path)
    with pytest.raises(BadInputError, match=rf"a_{name}\.png: expected a file, got nothing there"):
        list(load_cases(dataset, dataset.cases))
    assert len(list(load_cases(dataset, dataset.cases, skip_bad=True))) == 1


def write_scan(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack", compression="zlib")
    elif path.suffix == ".png":
        png(path, array)
    else:
        volume(path, np.stack([array] * 3, axis=-1))


@pytest.mark.parametrize("declared", [True, False], ids=["classes.json", "undeclared"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".png", ".tif"])
def test_a_file_damaged_anywhere_spoils_no_case_but_its_own(tmp_path: Path, ending: str, declared: bool) -> None:
    for name in "abc":
        write_scan(tmp_path / f"images/{name}{ending}", picture(ord(name)))
        write_scan(tmp_path / f"labels/{name}{ending}", mask())
    if declared:
        (tmp_path / "classes.json").write_text(CLASSES)
    path = tmp_path / f"images/a{ending}"
    whole = path.read_bytes()
    flips = [whole[:n] + bytes([whole[n] ^ 0xFF]) + whole[n + 1 :] for n in range(0, min(len(whole), 348), 29)]
    cuts = [whole[:n] for n in range(0, min(len(whole), 400), 47)]
    damages = [*flips, *cuts, b"this is no scan" * 40]
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        dataset = read_dataset(tmp_path)
        assert {"b", "c"} <= {sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True)}
        assert all(str(path) in rejection.reason for rejection in dataset.rejected)
        refused += len(dataset.rejected)
    assert refused >= len(cuts)


def test_a_damaged_label_of_a_folder_without_declared_classes_is_left_to_its_case(tmp_path: Path) -> None:
    for name in "ab":
        write_scan(tmp_path / f"images/{name}.png", picture(ord(name)))
        write_scan(tmp_path / f"labels/{name}.png", mask())
    truncate(tmp_path / "labels/a.png")
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == {0: "background", 1: "class_1"}
    assert [sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True)] == ["b"]
    assert re.match(r".*labels/a\.png: expected a readable png", dataset.rejected[0].reason)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    png(tmp_path / "a.png", picture())
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadInputError, match=r"a\.png: expected a readable png file, got an error \(.*denied"):
        read_image(tmp_path / "a.png")


# --- what a model needs beyond a sound file


def spaced(root: Path) -> Path:
    for name, spacing in (("a", (1.0, 1.0, 2.5)), ("b", (1.0, 1.0, 1.0)), ("c", (1.0, 1.002, 1.0))):
        volume(root / f"images/{name}.nii.gz", np.stack([picture(ord(name))] * 3, axis=-1), spacing)
        volume(root / f"labels/{name}.nii.gz", np.stack([mask()] * 3, axis=-1), spacing)
    return root


FITS = [
    (Normalization(), "expected varying intensities between percentiles"),
    (Normalization("window", 300, 400), "expected intensities inside the window 300 to 400"),
]


@pytest.mark.parametrize(("normalization", "words"), FITS, ids=["percentile", "window"])
def test_a_scan_that_cannot_be_normalized_is_named_and_can_be_skipped(
    tmp_path: Path, normalization: Normalization, words: str
) -> None:
    root = spaced(tmp_path)
    bad = np.zeros((12, 13, 3), np.int16)
    bad[5, 5, 1] = 90  # not constant, so that the file itself is sound
    volume(root / "images/a.nii.gz", bad, (1.0, 1.0, 2.5))
    for name in "bc":
        volume(root / f"images/{name}.nii.gz", np.stack([picture(ord(name)) + np.int16(200)] * 3, axis=-1))
    volume(root / "labels/c.nii.gz", np.stack([mask()] * 3, axis=-1))
    dataset = read_dataset(root)
    check = lambda case, sample: normalization.fit(sample.image, source=case.images[0])  # noqa: E731
    with pytest.raises(BadInputError, match=rf"^{re.escape(str(root / 'images/a.nii.gz'))}: {words}"):
        list(load_cases(dataset, dataset.cases, check=check))
    good = [sample.case for sample in load_cases(dataset, dataset.cases, skip_bad=True, check=check)]
    assert good == ["b", "c"]


@pytest.mark.parametrize("method", ["percentile", "window", "zscore"])
def test_a_constant_channel_is_named_with_its_file(method: str) -> None:
    image = torch.stack([torch.arange(16.0).view(4, 4), torch.full((4, 4), 3.0)])
    normalization = Normalization(method, low=0, high=15)
    with pytest.raises(
        BadInputError, match=r"^x/a\.nii\.gz, channel 1: expected varying intensities, got the constant 3"
    ):
        normalization.fit(image, source=Path("x/a.nii.gz"))
    with pytest.raises(BadInputError, match=r"^x/a\.nii\.gz: expected varying intensities, got the constant 3"):
        normalization.fit(image[1:], source=Path("x/a.nii.gz"))
