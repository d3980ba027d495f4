from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medgen.data.dataset import load_cases, read_dataset, split_cases
from medgen.generator import Generator
from medgen.provenance import read_manifest, sha256_array
from medgen.synthesis import synthesize
from medgen.types import BadInputError

FAST = {"num_inference_steps": 3, "precision": "fp32", "device": "cpu"}


def voxels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*Tr/*.nii.gz"))}


def test_scans_for_label_files_lie_on_the_files_own_grids(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesize(out, model=str(model_3d), labels=labels_3d, batch_size=2, **FAST)
    for index in range(3):
        source = nib.load(labels_3d / f"case_{index}.nii.gz")
        image = nib.load(out / "imagesTr" / f"synthetic_{index:05d}_0000.nii.gz")
        label = nib.load(out / "labelsTr" / f"synthetic_{index:05d}.nii.gz")
        assert np.array_equal(label.dataobj, source.dataobj)
        for written in (image, label):
            assert np.allclose(written.affine, source.affine, atol=1e-5)
        assert image.shape == source.shape
        assert image.get_data_dtype() == np.int16
        assert 0 <= np.asarray(image.dataobj).min() < np.asarray(image.dataobj).max() <= 1000


def test_the_folder_is_a_readable_data_set_that_says_it_is_synthetic(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    records = synthesize(out, model=str(model_3d), labels=labels_3d, num_samples=5, seed=3, **FAST)
    dataset = read_dataset(out)
    assert dataset.synthetic
    assert [sample.case for sample in load_cases(dataset, dataset.cases)] == [f"synthetic_{i:05d}" for i in range(5)]
    assert records == read_manifest(out / "manifest.jsonl")
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"]["file"] for line in lines] == [f"case_{i % 3}.nii.gz" for i in range(5)]
    assert len({line["seed"] for line in lines}) == 5
    for line in lines:
        assert line["synthetic"] is True
        assert line["model_hash"] == Generator.from_pretrained(model_3d).weights_hash
        assert (line["sampler"], line["num_inference_steps"], line["guidance_scale"]) == ("dpm++2m", 3, 1.5)
        assert line["temperature"] == 0.9
        image = nib.load(out / "imagesTr" / f"{line['case']}_0000.nii.gz")
        assert line["image_sha256"] == sha256_array(np.asarray(image.dataobj)[None].astype(np.int16))
        assert line["shape"] == list(image.shape)
        assert line["model_shape"] == [12, 10, 10] if line["index"] % 3 < 2 else [12, 12, 8]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "synthetic" in card
    assert "5 taken from files" in card
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 600
    arguments = yaml.safe_load((out / "synthesize.yaml").read_text())
    assert (arguments["num_samples"], arguments["seed"], arguments["label_source"]) == (5, 3, "files")


def test_the_saved_arguments_are_a_config_that_gives_the_same_scans(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    from medgen.cli import parse

    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, **FAST)
    folders = {"model": model_3d, "labels": labels_3d, "output": tmp_path / "b"}
    words = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    synthesize(**parse("synthesize", ["--config", str(tmp_path / "a" / "synthesize.yaml"), *words]))
    first, second = voxels(tmp_path / "a"), voxels(tmp_path / "b")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("val", ["", "case_0\ncase_2\n"])
def test_the_split_of_label_maps_is_told_where_there_is_one(
    val: str, model_3d: Path, labels_3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(labels_3d, tmp_path / "images")
    (tmp_path / "val.txt").write_text(val)
    synthesize(tmp_path / "out", model=str(model_3d), labels=labels_3d, num_samples=1, **FAST)
    text = capsys.readouterr().out
    told = "label maps: 2 of val, 1 of train. A network that trains on these scans cannot be tested on val: for that, "
    assert (f"{told}leave out the label maps of val\n" in text) == bool(val)
    assert f"\n1 labelled scan in {tmp_path / 'out'}\n" in text
    assert ("label maps" in text) == bool(val)


def test_of_a_data_set_the_label_maps_of_training_are_taken(
    model_3d: Path, labels_3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInputError, match=r"Did you mean .*labels\?"):
        synthesize(tmp_path / "out", model=str(model_3d), labels=tmp_path, **FAST)
    shutil.copytree(labels_3d, tmp_path / "images")
    (tmp_path / "val.txt").write_text("case_0\n")
    records = synthesize(tmp_path / "named", model=str(model_3d), labels=tmp_path, **FAST)
    assert [record.label["file"] for record in records] == ["labels/case_1.nii.gz", "labels/case_2.nii.gz"]
    told = "label maps: 2 of the training split; 1 left out, of scans that are held out for tests\n"
    assert capsys.readouterr().out.count(told) == 1

    for folder in (tmp_path, labels_3d):  # by its place in the data set, and by its name
        again = tmp_path / f"again-{folder.name}"
        synthesize(
            again, model=str(model_3d), labels=folder, replay=tmp_path / "named" / "manifest.jsonl", device="cpu"
        )
        assert all(
            np.array_equal(*pair)
            for pair in zip(voxels(tmp_path / "named").values(), voxels(again).values(), strict=True)
        )

    (tmp_path / "val.txt").unlink()
    (held_out,) = split_cases(read_dataset(tmp_path))[1]
    records = synthesize(tmp_path / "hashed", model=str(model_3d), labels=tmp_path, **FAST)
    kept = [name for name in ("case_0", "case_1", "case_2") if name != held_out.case]
    assert [record.label["file"] for record in records] == [f"labels/{name}.nii.gz" for name in kept]
    told = "label maps: 2 of the training split; 1 left out, of scans that are held out for tests\n"
    assert capsys.readouterr().out.count(told) == 1

    # Scans to change are those of these label maps.
    both = {"sources": tmp_path / "images", "strength": 0.5}
    records = synthesize(tmp_path / "changed", model=str(model_3d), labels=tmp_path, **both, **FAST)
    assert [record.label["file"] for record in records] == [f"labels/{name}.nii.gz" for name in kept]


@pytest.mark.parametrize(
    ("kept", "val", "message"),
    [
        ((), "", r"expected a data set with label maps, got 3 scans without\. Add them"),
        (
            (0, 2),
            "case_0\ncase_2\n",
            r"labelled scans of the training split, got none.* Or give the folder of its label",
        ),
        (
            (1,),
            "",
            r"for training and for validation, got 1 and 0.* Or give the folder of its label maps, all of which",
        ),
    ],
)
def test_a_data_set_without_label_maps_for_training_is_refused(
    kept: tuple[int, ...], val: str, message: str, model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    shutil.copytree(labels_3d, tmp_path / "images")
    (tmp_path / "val.txt").write_text(val)
    for index in {0, 1, 2} - {*kept}:
        (labels_3d / f"case_{index}.nii.gz").unlink()
    if not kept:
        labels_3d.rmdir()
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model_3d), labels=tmp_path, **FAST)


def test_label_maps_of_a_table_are_told_apart_by_case_and_named_within_its_folder(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    """Folders of patients hold files of one name."""
    labels = ["p0/seg", "p1/seg", "p2/seg", "../labels/case_2"]
    rows = ["image,label,split"]
    for index, label in enumerate(labels):
        folder = tmp_path / "table" / f"p{index}"
        folder.mkdir(parents=True)
        for name in ("scan", "seg"):
            shutil.copy(labels_3d / "case_2.nii.gz", folder / f"{name}.nii.gz")
        rows.append(f"p{index}/scan.nii.gz,{label}.nii.gz,{'val' if index == 1 else 'train'}")
    (tmp_path / "table" / "metadata.csv").write_text("\n".join(rows))
    records = synthesize(tmp_path / "out", model=str(model_3d), labels=tmp_path / "table", **FAST)
    assert [record.label["file"] for record in records] == ["p0/seg.nii.gz", "p2/seg.nii.gz", "case_2.nii.gz"]


@pytest.mark.parametrize("beside", ["dataset.json", "metadata.csv", "notes", "images"])
def test_a_folder_of_label_maps_stays_one_whatever_lies_beside_them(
    beside: str, model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    if beside == "images":  # previews
        shutil.copytree(labels_3d, labels_3d / "images")
    else:
        text = {"dataset.json": "{}", "metadata.csv": "file_name\ncase_0.nii.gz\n", "notes": "id,area\ncase_0,3\n"}
        (labels_3d / beside.replace("notes", "metadata.csv")).write_text(text[beside])
    records = synthesize(tmp_path / "out", model=str(model_3d), labels=labels_3d, **FAST)
    assert [record.label["file"] for record in records] == [f"case_{index}.nii.gz" for index in range(3)]


def test_generated_labels_lie_in_a_field_of_view_of_the_training_set(model_3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesize(out, model=str(model_3d), num_samples=4, **FAST)
    shapes = set()
    for record in read_manifest(out / "manifest.jsonl"):
        label = nib.load(out / "labelsTr" / f"{record.case}.nii.gz")
        shapes.add(label.shape)
        assert "".join(nib.aff2axcodes(label.affine)) == "RAS"
        assert np.allclose(label.header.get_zooms(), 1.0)
        assert 1 in np.unique(label.dataobj)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}
        assert record.label["source"] == "generate"
        assert record.label["attempt"] >= 1
    assert shapes <= {(11, 9, 10), (8, 12, 7)}


def test_generated_grids_keep_the_models_orientation_and_spacing(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    make_generator(3, orientation="LSA", spacing=(1.0, 2.0, 1.5), shapes=((10, 8, 12),)).save_pretrained(tmp_path / "m")
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), num_samples=1, **FAST)
    label = nib.load(tmp_path / "out" / "labelsTr" / "synthetic_00000.nii.gz")
    assert label.shape == (10, 8, 12)
    assert "".join(nib.aff2axcodes(label.affine)) == "LSA"
    assert np.allclose(label.header.get_zooms(), (1.0, 2.0, 1.5))


def test_deformed_labels_are_new_and_keep_every_class(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    array = np.zeros((32, 32), dtype=np.uint8)
    array[8:16, 8:24], array[16:24, 8:24] = 1, 2
    Image.fromarray(array).save(labels / "a.png")
    make_generator(2).save_pretrained(tmp_path / "m")
    out = tmp_path / "out"
    synthesize(out, model=str(tmp_path / "m"), labels=labels, label_source="deform", num_samples=3, **FAST)
    made = [np.asarray(Image.open(path)) for path in sorted((out / "labelsTr").glob("*.png"))]
    assert len({label.tobytes() for label in [array, *made]}) == 4
    assert all(set(np.unique(label)) == {0, 1, 2} for label in made)
    assert all("rotation" in record.label["deformation"] for record in read_manifest(out / "manifest.jsonl"))


def test_a_crowd_of_touching_parts_is_deformed_without_counting_them(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    """Cells that nearly touch merge and part under any deformation, so their number cannot be kept."""
    make_generator(2).save_pretrained(tmp_path / "m")
    (tmp_path / "labels").mkdir()
    cells = np.zeros((48, 48), dtype=np.uint8)
    for row in range(2, 44, 6):
        for column in range(2, 44, 6):
            cells[row : row + 5, column : column + 5] = 1  # one pixel of ground between any two
    Image.fromarray(cells).save(tmp_path / "labels" / "a.png")
    out = tmp_path / "out"
    records = synthesize(
        out, model=str(tmp_path / "m"), labels=tmp_path / "labels", label_source="deform", num_samples=2, **FAST
    )
    assert [record.label["keep_components"] for record in records] == [False, False]
    made = np.asarray(Image.open(out / "labelsTr" / "synthetic_00000.png"))
    assert abs(int((made > 0).sum()) / int(cells.sum()) - 1) < 0.3


@pytest.mark.parametrize(("channels", "dtype", "mode"), [(1, "uint16", "I;16"), (3, "uint8", "RGB")])
def test_pictures_are_written_as_png_of_the_training_sets_kind(
    make_generator: Callable[..., Generator], tmp_path: Path, channels: int, dtype: str, mode: str
) -> None:
    make_generator(2, channels=channels, image_dtype=dtype).save_pretrained(tmp_path / "m")
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), num_samples=1, **FAST)
    with Image.open(tmp_path / "out" / "imagesTr" / "synthetic_00000_0000.png") as picture:
        assert picture.mode == mode
        assert picture.size == (10, 12)
    assert (tmp_path / "out" / "contact_sheet.png").exists()


def test_a_killed_run_continues_to_the_same_voxels(
    model_3d: Path, labels_3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = {"model": str(model_3d), "labels": labels_3d, "num_samples": 8, "batch_size": 3, **FAST}
    arguments["num_inference_steps"] = 25
    synthesize(whole, **arguments)
    program = (
        "import sys, json; from medgen.synthesis import synthesize; synthesize(sys.argv[1], **json.loads(sys.argv[2]))"
    )
    text = json.dumps({**arguments, "labels": str(labels_3d)})
    process = subprocess.Popen([sys.executable, "-c", program, str(cut), text], stderr=subprocess.DEVNULL)
    while not (cut / "manifest.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {record.case for record in read_manifest(cut / "manifest.jsonl")}
    assert 1 <= len(finished) < 8
    kept = {name: (cut / "labelsTr" / f"{name}.nii.gz").stat().st_mtime_ns for name in finished}
    (cut / "imagesTr" / ".synthetic_00007_0000.nii.gz.99.partial").write_bytes(b"half")
    with (cut / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"case": "synthetic_00007", "ind')
    assert "already there" not in capsys.readouterr().out
    again = synthesize(cut, **arguments)
    assert f"{len(finished)} of 8 scans are already there; going on\n" in capsys.readouterr().out
    assert [record.image_sha256 for record in again] == [
        r.image_sha256 for r in read_manifest(whole / "manifest.jsonl")
    ]
    assert {name: (cut / "labelsTr" / f"{name}.nii.gz").stat().st_mtime_ns for name in finished} == kept
    assert sorted(path.name for path in cut.rglob("*")) == sorted(path.name for path in whole.rglob("*"))


def test_a_damaged_scan_is_made_again_with_the_threads_that_the_run_began_with(model_3d: Path, tmp_path: Path) -> None:
    """Their number decides the rounding; the process that goes on may have another one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = synthesize(tmp_path / "out", model=str(model_3d), num_samples=2, **FAST)
    finally:
        torch.set_num_threads(before)
    assert first[0].runtime["threads"] == 2
    victim = tmp_path / "out" / "imagesTr" / "synthetic_00001_0000.nii.gz"
    victim.write_bytes(victim.read_bytes()[:50])
    assert synthesize(tmp_path / "out", model=str(model_3d), num_samples=2, **FAST) == first
    assert sha256_array(np.asarray(nib.load(victim).dataobj)[None].astype(np.int16)) == first[1].image_sha256


def test_two_processes_make_what_one_makes(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    arguments = {"model": str(model_3d), "labels": str(labels_3d), "num_samples": 6, "batch_size": 2, **FAST}
    alone = synthesize(tmp_path / "alone", **{**arguments, "labels": labels_3d})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        "import sys, json; from medgen.synthesis import synthesize; synthesize(sys.argv[1], **json.loads(sys.argv[2]))"
    )
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "both"), json.dumps(arguments)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    together = read_manifest(tmp_path / "both" / "manifest.jsonl")
    assert [record.case for record in together] == [record.case for record in alone]
    for name, image in voxels(tmp_path / "alone").items():
        assert np.abs(voxels(tmp_path / "both")[name].astype(int) - image).max() <= 1  # 1e-3 of the range


def test_a_folder_of_another_run_is_refused_unless_overwritten(model_3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesize(out, model=str(model_3d), num_samples=1, **FAST)
    before = (out / "manifest.jsonl").read_bytes()
    with pytest.raises(BadInputError, match=r"expected an empty folder or the same run.*seed: 0 there, 1 now"):
        synthesize(out, model=str(model_3d), num_samples=1, seed=1, **FAST)
    assert (out / "manifest.jsonl").read_bytes() == before
    synthesize(out, model=str(model_3d), num_samples=1, seed=1, overwrite=True, **FAST)
    assert (out / "manifest.jsonl").read_bytes() != before


def test_a_bad_label_map_stops_the_run_before_it_starts(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    bad = np.full((11, 9, 10), 7, dtype=np.uint8)
    nib.save(nib.Nifti1Image(bad, np.eye(4)), labels_3d / "case_9.nii.gz")
    with pytest.raises(BadInputError, match=r"case_9\.nii\.gz: expected label values 0 .*, got 7"):
        synthesize(tmp_path / "out", model=str(model_3d), labels=labels_3d, **FAST)
    assert not (tmp_path / "out").exists()


def test_skipped_label_maps_are_listed_and_the_rest_is_made(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    (labels_3d / "case_1.nii.gz").write_bytes(b"no image")
    out = tmp_path / "out"
    records = synthesize(out, model=str(model_3d), labels=labels_3d, skip_bad=True, **FAST)
    assert [record.label["file"] for record in records] == ["case_0.nii.gz", "case_2.nii.gz"]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [item["case"] for item in rejected] == ["case_1"]
    assert "case_1.nii.gz" in rejected[0]["reason"]
    assert "## Left out (1)" in (out / "README.md").read_text(encoding="utf-8")


def test_no_file_of_the_output_says_where_things_lie_on_this_machine(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    (labels_3d / "case_1.nii.gz").write_bytes(b"no image")
    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, skip_bad=True, **FAST)
    synthesize(replay=tmp_path / "a" / "manifest.jsonl", model=str(model_3d), labels=labels_3d)
    texts = [path for path in tmp_path.glob("a*/*.*") if path.suffix != ".png"]
    assert {path.name for path in texts} >= {"manifest.jsonl", "synthesize.yaml", "dataset.json", "rejected.jsonl"}
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text, path
        assert str(model_3d.parent) not in text, path
    assert "case_1.nii.gz" in (tmp_path / "a" / "rejected.jsonl").read_text()
    assert "| Model | `tiny-3d`, SHA-256" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_a_label_that_no_deformation_keeps_is_left_out_when_asked(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    make_generator(2).save_pretrained(tmp_path / "m")
    (tmp_path / "labels").mkdir()
    good, sieve = np.zeros((32, 32), dtype=np.uint8), np.zeros((32, 32), dtype=np.uint8)
    good[8:16, 8:24], good[16:24, 8:24] = 1, 2
    sieve[2:30, 2:30] = 1
    sieve[4:28:3, 4:28:3] = 0  # holes of one pixel: one of 64 is always lost
    Image.fromarray(good).save(tmp_path / "labels" / "a.png")
    Image.fromarray(sieve).save(tmp_path / "labels" / "b.png")
    arguments = {"model": str(tmp_path / "m"), "labels": tmp_path / "labels", "label_source": "deform", **FAST}
    with pytest.raises(BadInputError, match=r"b\.png"):
        synthesize(tmp_path / "strict", **arguments)
    records = synthesize(tmp_path / "out", skip_bad=True, **arguments)
    assert [record.case for record in records] == ["synthetic_00000"]
    assert "synthetic_00001" in (tmp_path / "out" / "rejected.jsonl").read_text()
    assert synthesize(tmp_path / "out", skip_bad=True, **arguments) == records


def test_a_model_without_label_generator_asks_for_labels(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    make_generator(3, label=False).save_pretrained(tmp_path / "m")
    with pytest.raises(BadInputError, match=r"expected one with a label generator, got one without. Give --labels"):
        synthesize(tmp_path / "out", model=str(tmp_path / "m"), num_samples=1, **FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"sampler": "ddim"}, "sampler: expected one of"),
        ({"precision": "fp8"}, "precision: expected 'auto', 'fp32' or 'bf16', got 'fp8'"),
        ({"label_source": "deform"}, "label_source 'deform': expected label files, got 0"),
        ({"sampler_spacing": "log"}, "spacing: expected 'default' or one of"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected 1 to"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected a finite number"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"max_memory_gb": 0.0}, "max_memory_gb: expected a finite number above 0, got 0"),
        ({"max_memory_gb": float("inf")}, "max_memory_gb: expected a finite number above 0, got inf"),
    ],
)
def test_an_argument_that_cannot_be_is_one_clear_error(
    model_3d: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", **{"model": str(model_3d), "num_samples": 1, **FAST, **change})
    assert not (tmp_path / "out").exists()  # so the corrected command finds no other run there


def test_a_run_that_did_not_fit_goes_on_with_less_memory(
    model_3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"model": str(model_3d), "num_samples": 3, **FAST}
    decode = Generator.decode

    def small(self: Generator, latents: torch.Tensor, **bound: object) -> torch.Tensor:
        if len(latents) > 1:
            raise MemoryError
        return decode(self, latents, **bound)

    monkeypatch.setattr(Generator, "decode", small)
    with pytest.raises(MemoryError, match="Lower batch_size"):
        synthesize(tmp_path / "out", batch_size=3, **arguments)
    records = synthesize(tmp_path / "out", batch_size=1, max_memory_gb=4.0, **arguments)
    assert [(len(record.batch), record.max_memory_gb) for record in records] == [(1, 4.0)] * 3
    saved = yaml.safe_load((tmp_path / "out" / "synthesize.yaml").read_text())
    assert (saved["batch_size"], saved["max_memory_gb"]) == (1, 4.0)


def test_the_corrected_command_after_a_run_that_failed_before_its_first_scan_works(
    model_3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"model": str(model_3d), "num_samples": 1, **FAST}
    refused = []

    def fails(self: Generator, latents: torch.Tensor, **bound: object) -> torch.Tensor:
        with pytest.raises(BadInputError, match=r"another run \(seed: 0 there, 1 now\)") as caught:
            synthesize(tmp_path / "out", seed=1, **arguments)  # beside the run that is at work
        refused.append(caught)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "decode", fails)
        with pytest.raises(MemoryError):
            synthesize(tmp_path / "out", **arguments)
    assert len(refused) == 1
    assert not list((tmp_path / "out").iterdir())
    assert len(synthesize(tmp_path / "out", seed=1, **arguments)) == 1


@pytest.mark.parametrize(("spatial_dims", "dtype"), [(2, "float32"), (3, "uint8")])
def test_colors_that_no_png_holds_are_one_file_per_channel(
    make_generator: Callable[..., Generator], tmp_path: Path, spatial_dims: int, dtype: str
) -> None:
    make_generator(spatial_dims, channels=3, image_dtype=dtype).save_pretrained(tmp_path / "m")
    out = tmp_path / "out"
    synthesize(out, model=str(tmp_path / "m"), num_samples=1, **FAST)
    names = sorted(path.name for path in (out / "imagesTr").iterdir())
    assert names == [f"synthetic_00000_000{channel}.nii.gz" for channel in range(3)]
    dataset = read_dataset(out)
    assert [sample.image.shape[0] for sample in load_cases(dataset, dataset.cases)] == [3]


def test_a_training_run_is_never_overwritten(model_3d: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("plan.yaml", "run.json", "README.md"):
        (run / name).write_text("{}")
    with pytest.raises(BadInputError, match=r"run\.json is not of a synthesis, such as a training run"):
        synthesize(run, model=str(model_3d), num_samples=1, overwrite=True, **FAST)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "checkpoints", "plan.yaml", "run.json"]
    assert (run / "run.json").read_text() == "{}"


def test_an_output_that_holds_its_own_input_is_refused(model_3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    synthesize(out, model=str(model_3d), num_samples=1, **FAST)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BadInputError, match="labelsTr: expected labels outside of the output folder, got it inside"):
        synthesize(out, model=str(model_3d), labels=out / "labelsTr", overwrite=True, **FAST)
    with pytest.raises(BadInputError, match=r"manifest\.jsonl: expected replay outside of the output folder"):
        synthesize(out, model=str(model_3d), replay=out / "manifest.jsonl", overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_whose_scans_were_removed_makes_them_again(model_3d: Path, tmp_path: Path) -> None:
    first = synthesize(tmp_path / "out", model=str(model_3d), num_samples=2, **FAST)
    for name in ("imagesTr", "labelsTr"):
        shutil.rmtree(tmp_path / "out" / name)
    assert synthesize(tmp_path / "out", model=str(model_3d), num_samples=2, **FAST) == first
    assert len(voxels(tmp_path / "out")) == 4


def test_a_sample_without_an_acceptable_label_is_left_out_when_asked(
    make_generator: Callable[..., Generator],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # About a third of the draws of this untrained model have more than one part.
    monkeypatch.setattr("medgen.synthesis.labels.MAX_ATTEMPTS", 1)
    make_generator(2, constant_classes=(1, 2), max_parts=1).save_pretrained(tmp_path / "m")
    arguments = {"model": str(tmp_path / "m"), "num_samples": 8, **FAST}
    with pytest.raises(BadInputError, match="got none in 1 draws"):
        synthesize(tmp_path / "strict", **arguments)
    records = synthesize(tmp_path / "out", skip_bad=True, **arguments)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert all("got none in 1 draws" in item["reason"] for item in rejected)
    made, left_out = {record.case for record in records}, {item["case"] for item in rejected}
    assert made
    assert left_out
    assert not made & left_out
    assert len(made | left_out) == 8
    assert synthesize(tmp_path / "out", skip_bad=True, **arguments) == records
    capsys.readouterr()
    synthesize(model=str(tmp_path / "m"), replay=tmp_path / "out" / "manifest.jsonl")
    assert f"{len(records)} of {len(records)} equal the replayed manifest" in capsys.readouterr().out


def test_bars_leave_few_lines_in_a_log_and_go_on_within_a_batch(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    words = ["--model", model_3d, "--labels", labels_3d, "--num_samples", 6, "--num_inference_steps", 20]
    command = [sys.executable, "-m", "medgen", "synthesize", *map(str, words)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TQDM")}
    quick = {"TQDM_MININTERVAL": "0", "TQDM_MAXINTERVAL": "0"}
    lines = {}
    for name, more in {"calm": {}, "every": quick}.items():
        output = ["--output", str(tmp_path / name)]
        done = subprocess.run([*command, *output], capture_output=True, text=True, check=True, env=environment | more)
        lines[name] = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.startswith("synthesize:")]
    assert len(lines["calm"]) < 5 and "6/6" in lines["calm"][-1]
    assert [line.partition("step=")[2][:2].rstrip("]") for line in lines["every"] if "4/6" in line][-1] == "20"
    assert {f"step={step}]" for step in range(1, 21)} <= {line.rpartition(", ")[2] for line in lines["every"]}
