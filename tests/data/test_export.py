"""Written folders are read back with nibabel, Pillow and pypng, by nnU-Net where it is installed, and by medgen."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import png
import pytest
import torch
from PIL import Image

from medgen.data.dataset import load_case, read_dataset
from medgen.data.export import (
    case_paths,
    file_ending,
    is_rgb,
    prepare_output,
    released_on_failure,
    write_case,
    write_dataset_json,
)
from medgen.types import BadInputError, Grid

AFFINE = np.array([[-1.5, 0, 0, 20], [0, 2, 0, -7], [0, 0, 3, 4], [0, 0, 0, 1]], dtype=np.float64)
VOLUME = Grid((5, 6, 7), AFFINE)
PICTURE = Grid((8, 9), np.eye(4), known=False)
SETTINGS = {"seed": 0, "model_hash": "abc"}
CLASSES = {0: "background", 1: "anterior", 2: "posterior"}


def scan(grid: Grid, channels: int = 1, high: int = 60000) -> torch.Tensor:
    values = np.random.default_rng(channels).integers(0, high, (channels, *grid.shape))
    return torch.from_numpy(values.astype(np.float32))


def labels(grid: Grid) -> torch.Tensor:
    label = torch.zeros(grid.shape, dtype=torch.int16)
    label[1:3, 1:3], label[3, 3] = 1, 2
    return label


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def export_volumes(root: Path) -> Path:
    prepare_output(root, SETTINGS)
    for case in ("case_0", "case_1"):
        write_case(root, case, scan(VOLUME, 2), labels(VOLUME), VOLUME, image_dtype="float32")
    write_dataset_json(root, class_names=CLASSES, channel_names={0: "T1", 1: "FLAIR"}, num_training=2, ending=".nii.gz")
    return root


def export_pictures(root: Path, *, rgb: bool) -> Path:
    prepare_output(root, SETTINGS)
    channels, high, dtype = (3, 256, "uint8") if rgb else (1, 60000, "uint16")
    write_case(root, "a", scan(PICTURE, channels, high), labels(PICTURE), PICTURE, image_dtype=dtype, rgb=rgb)
    names = {0: "R", 1: "G", 2: "B"} if rgb else {0: "X-ray"}
    write_dataset_json(root, class_names=CLASSES, channel_names=names, num_training=1, ending=".png")
    return root


def test_a_volume_is_one_nifti_per_channel_on_the_grid_of_its_label(tmp_path: Path) -> None:
    root = export_volumes(tmp_path)
    assert files(root) == [
        "dataset.json",
        *(f"imagesTr/case_{case}_000{channel}.nii.gz" for case in range(2) for channel in range(2)),
        *(f"labelsTr/case_{case}.nii.gz" for case in range(2)),
        "run.json",
    ]
    for channel in range(2):
        image = nib.load(root / f"imagesTr/case_1_000{channel}.nii.gz")
        assert np.array_equal(image.get_fdata(), scan(VOLUME, 2)[channel].numpy())
        assert np.allclose(image.affine, AFFINE)
    label = nib.load(root / "labelsTr/case_1.nii.gz")
    assert np.array_equal(np.asarray(label.dataobj), labels(VOLUME).numpy())
    assert np.allclose(label.affine, AFFINE)


def test_gray_pictures_are_16_bit_png(tmp_path: Path) -> None:
    root = export_pictures(tmp_path, rgb=False)
    image = Image.open(root / "imagesTr/a_0000.png")
    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), scan(PICTURE)[0].numpy())
    label = Image.open(root / "labelsTr/a.png")
    assert label.mode == "L"
    assert np.array_equal(np.asarray(label), labels(PICTURE).numpy())


def test_color_pictures_are_one_file_of_8_or_16_bits(tmp_path: Path) -> None:
    root = export_pictures(tmp_path, rgb=True)
    image = Image.open(root / "imagesTr/a_0000.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), scan(PICTURE, 3, 256).numpy())
    assert not (root / "imagesTr/a_0001.png").exists()

    write_case(root, "b", scan(PICTURE, 3), labels(PICTURE), PICTURE, image_dtype="uint16", rgb=True)
    _, _, rows, info = png.Reader(str(root / "imagesTr/b_0000.png")).read()
    assert (info["bitdepth"], info["planes"]) == (16, 3)
    assert np.array_equal(np.vstack(list(rows)).reshape(8, 9, 3).transpose(2, 0, 1), scan(PICTURE, 3).numpy())


@pytest.mark.parametrize("kind", ["volumes", "gray", "rgb"])
def test_every_file_says_of_itself_that_it_is_synthetic(tmp_path: Path, kind: str) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        export_volumes(root) if kind == "volumes" else export_pictures(root, rgb=kind == "rgb")
    if kind == "rgb":
        for root in roots:
            write_case(root, "b", scan(PICTURE, 3), labels(PICTURE), PICTURE, image_dtype="uint16", rgb=True)
    written = [name for name in files(roots[0]) if "Tr/" in name]
    assert len(written) == {"volumes": 6, "gray": 2, "rgb": 4}[kind]
    for name in written:
        path = roots[0] / name
        if kind == "volumes":
            text = nib.load(path).header["descrip"].item().decode()
        else:
            text = Image.open(path).text["Description"]
        assert text == "medgen synthetic, not a patient"
        assert path.read_bytes() == (roots[1] / name).read_bytes()


def test_the_file_type_holds_the_intensities_without_loss() -> None:
    flat, volume = PICTURE, VOLUME
    assert [file_ending(flat, dtype) for dtype in ("uint8", "uint16", "int16", "float32")] == [
        ".png",
        ".png",
        ".nii.gz",
        ".nii.gz",
    ]
    assert file_ending(volume, "uint16") == ".nii.gz"
    assert is_rgb({0: "R", 1: "G", 2: "B"})
    assert not is_rgb({0: "T1", 1: "T2", 2: "FLAIR"})


def test_a_2d_scan_in_hounsfield_units_goes_to_nifti(tmp_path: Path) -> None:
    prepare_output(tmp_path, {})
    image = scan(PICTURE, 1, 2000) - 1000
    paths = write_case(tmp_path, "ct", image, labels(PICTURE), PICTURE, image_dtype="int16")
    assert np.array_equal(np.squeeze(nib.load(paths.images[0]).get_fdata()), image[0].numpy())
    assert paths.label.name == "ct.nii.gz"


@pytest.mark.parametrize("kind", ["volumes", "gray", "rgb"])
def test_an_exported_folder_is_a_synthetic_dataset_again(tmp_path: Path, kind: str) -> None:
    root = export_volumes(tmp_path) if kind == "volumes" else export_pictures(tmp_path, rgb=kind == "rgb")
    dataset = read_dataset(root)
    assert dataset.synthetic
    assert (dataset.format, dataset.class_names) == ("nnunet", CLASSES)
    assert dataset.spatial_dims == (3 if kind == "volumes" else 2)
    expected = {"volumes": scan(VOLUME, 2), "gray": scan(PICTURE), "rgb": scan(PICTURE, 3, 256)}[kind]
    for case in dataset.cases:
        sample = load_case(case, dataset)
        assert torch.equal(sample.image, expected)
        assert torch.equal(sample.label, labels(sample.grid))
        assert sample.grid.known == (kind == "volumes")


@pytest.mark.parametrize("kind", ["volumes", "gray", "rgb"])
def test_nnunet_accepts_an_exported_folder(tmp_path: Path, kind: str) -> None:
    integrity = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity", reason="nnU-Net is not installed: pip install nnunetv2"
    )
    root = tmp_path / "Dataset001_Synthetic"
    root = export_volumes(root) if kind == "volumes" else export_pictures(root, rgb=kind == "rgb")
    integrity.verify_dataset_integrity(str(root), num_processes=1)


def test_dataset_json_is_synthetic_whatever_the_details_say(tmp_path: Path) -> None:
    path = write_dataset_json(
        tmp_path,
        class_names={1: "x", 0: "background"},
        channel_names={0: "CT"},
        num_training=3,
        ending=".nii.gz",
        details={"synthetic": False, "model": "hippocampus-mr-3d"},
    )
    content = json.loads(path.read_text())
    assert content["synthetic"] is True
    assert content["model"] == "hippocampus-mr-3d"
    assert content["labels"] == {"background": 0, "x": 1}
    assert (content["channel_names"], content["numTraining"], content["file_ending"]) == ({"0": "CT"}, 3, ".nii.gz")


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    names = {0: "background", 1: "x", 2: "x"}
    with pytest.raises(BadInputError, match="one name per class, got x twice"):
        write_dataset_json(tmp_path, class_names=names, channel_names={0: "CT"}, num_training=1, ending=".nii.gz")


# --- the output folder -----------------------------------------------------------------------------------------------


def test_a_run_continues_in_its_own_folder_and_its_leftovers_go(tmp_path: Path) -> None:
    root = tmp_path / "new" / "out"
    settings = {"seed": 3, "model": Path("x")}
    assert prepare_output(root, settings) == "new"
    write_case(root, "a", scan(VOLUME), labels(VOLUME), VOLUME, image_dtype="uint16")
    (root / "imagesTr/.b_0000.nii.gz.77.partial").write_bytes(b"half")
    assert prepare_output(root, settings) == "resumed"
    assert files(root) == ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "run.json"]


def test_another_run_is_refused_with_the_setting_that_differs_and_stays_intact(tmp_path: Path) -> None:
    root = export_volumes(tmp_path)
    before = {name: (root / name).read_bytes() for name in files(root)}
    with pytest.raises(
        BadInputError, match=rf"^{re.escape(str(root))}: .*another run \(seed: 0 there, 1 now\)\..*over"
    ):
        prepare_output(root, {**SETTINGS, "seed": 1})
    assert {name: (root / name).read_bytes() for name in files(root)} == before


@pytest.mark.parametrize("found", ["", "imagesTr/.b_0000.nii.gz.77.partial", "manifest.jsonl"])
def test_a_folder_in_which_another_run_is_at_work_is_refused_even_before_its_first_scan(
    tmp_path: Path, found: str
) -> None:
    prepare_output(tmp_path, SETTINGS)
    if found:
        (tmp_path / found).write_bytes(b"half")
    before = files(tmp_path)
    with pytest.raises(BadInputError, match=r"another run \(seed: 0 there, 1 now\)"):
        prepare_output(tmp_path, {**SETTINGS, "seed": 1})
    assert files(tmp_path) == before
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS


def fail(root: Path, *, claimed: bool = True) -> None:
    with pytest.raises(KeyboardInterrupt), released_on_failure(root, SETTINGS, claimed=claimed, papers=("a.yaml",)):
        raise KeyboardInterrupt


def test_a_run_that_fails_before_it_made_anything_makes_room_for_another(tmp_path: Path) -> None:
    prepare_output(tmp_path, SETTINGS)
    (tmp_path / "a.yaml").touch()
    with released_on_failure(tmp_path, SETTINGS, papers=("a.yaml",)):
        pass
    assert files(tmp_path) == ["a.yaml", "run.json"]
    fail(tmp_path, claimed=False)
    assert files(tmp_path) == ["a.yaml", "run.json"]
    fail(tmp_path)
    assert not list(tmp_path.iterdir())
    assert prepare_output(tmp_path, {**SETTINGS, "seed": 1}) == "new"
    fail(tmp_path)  # the folder is another run's by now
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    "made", ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "manifest.jsonl", "rejected/imagesTr/a.png", "notes.txt"]
)
def test_a_run_that_fails_keeps_its_folder_with_anything_that_is_in_it(tmp_path: Path, made: str) -> None:
    prepare_output(tmp_path, SETTINGS)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("precious")
    fail(tmp_path)
    assert files(tmp_path) == sorted([made, "run.json"])
    assert prepare_output(tmp_path, SETTINGS) == "resumed"


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    root = export_volumes(tmp_path)
    (root / "notes.txt").write_text("mine")
    assert prepare_output(root, {**SETTINGS, "seed": 1}, overwrite=True) == "new"
    assert files(root) == ["notes.txt", "run.json"]
    assert json.loads((root / "run.json").read_text()) == {**SETTINGS, "seed": 1}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["no hash", "damaged", "plan.yaml", "checkpoints"])
def test_a_folder_whose_run_is_no_synthesis_is_never_touched(tmp_path: Path, kind: str, overwrite: bool) -> None:
    root = export_volumes(tmp_path)
    if kind in ("no hash", "damaged"):
        (root / "run.json").write_text('{"plan": {}}' if kind == "no hash" else "{")
    else:
        (root / kind).write_text("mine")
    before = {name: (root / name).read_bytes() for name in files(root)}
    with pytest.raises(BadInputError, match=r"an output of synthesize, got a folder whose run\.json is not of a synth"):
        prepare_output(root, {**SETTINGS, "seed": 1}, overwrite=overwrite)
    assert {name: (root / name).read_bytes() for name in files(root)} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "labelsTr/patient.nii.gz").write_bytes(b"precious")
    with pytest.raises(BadInputError, match=r"expected an empty folder or a run of medgen, .*\(labelsTr\)"):
        prepare_output(tmp_path, {}, overwrite=overwrite)
    assert files(tmp_path) == ["labelsTr/patient.nii.gz"]


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match="file: expected a folder for the output, got a file"):
        prepare_output(tmp_path / "file", {})
    with pytest.raises(BadInputError, match="inner: expected a folder to write to, got"):
        prepare_output(tmp_path / "file" / "inner", {})


# --- a case ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_finished_cases_and_no_half_one(tmp_path: Path) -> None:
    root = export_volumes(tmp_path)
    before = {name: (root / name).read_bytes() for name in files(root)}
    large = Grid((40, 40, 40), AFFINE)
    message = r"case_2_0000\.nii\.gz: .*full disk.*finished work is kept"
    with full_disk(4096), pytest.raises(BadInputError, match=message):
        write_case(root, "case_2", scan(large), labels(large), large, image_dtype="float32")
    assert {name: (root / name).read_bytes() for name in files(root)} == before


def test_the_label_comes_last_so_that_a_case_with_a_label_is_whole(tmp_path: Path) -> None:
    prepare_output(tmp_path, {})
    # A folder in the place of the second channel stops the writing half-way.
    (tmp_path / "imagesTr/a_0001.nii.gz").mkdir()
    with pytest.raises(OSError):
        write_case(tmp_path, "a", scan(VOLUME, 2), labels(VOLUME), VOLUME, image_dtype="float32")
    assert files(tmp_path) == ["imagesTr/a_0000.nii.gz", "run.json"]


@pytest.mark.parametrize("case", ["", "../up", "a b", "a/b", ".hidden", "a.nii.gz", "a.png"])
def test_a_case_name_that_is_no_file_name_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(BadInputError, match=rf"^{re.escape(repr(case))}: expected a case name"):
        case_paths(tmp_path, case, num_files=1, ending=".nii.gz")


def test_image_and_label_must_lie_on_the_grid_and_rgb_must_be_color(tmp_path: Path) -> None:
    prepare_output(tmp_path, {})
    with pytest.raises(BadInputError, match=r"^a: expected image and label of shape \(5, 6, 7\), got .*\(8, 9\)"):
        write_case(tmp_path, "a", scan(VOLUME), labels(PICTURE), VOLUME, image_dtype="float32")
    with pytest.raises(BadInputError, match=r"^a: expected a 2D image of 3 channels .* got 2 channel\(s\) of 2D uint8"):
        write_case(tmp_path, "a", scan(PICTURE, 2), labels(PICTURE), PICTURE, image_dtype="uint8", rgb=True)
    assert files(tmp_path) == ["run.json"]
