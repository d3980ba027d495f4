"""Scans made from scans: whole, in a region, or where label maps differ; from flags and from a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from medgen import cli
from medgen.data.dataset import load_cases, read_dataset
from medgen.generator import Generator
from medgen.provenance import read_manifest, sha256_array
from medgen.synthesis import EdgeSource, SampleSpec, ScanSource, SourceFile, iter_samples, run, synthesize, table
from medgen.synthesis.labels import prepare
from medgen.types import BadInputError

FAST = {"num_inference_steps": 2, "precision": "fp32", "device": "cpu"}
SIDES, SHAPE = (12, 10), (12, 13, 14)
# Stored as P, L, S with three voxel sizes; the tiny model works on R, A, S at 1 mm.
TURNED = np.array([[0.0, -1.2, 0, 11], [-0.9, 0, 0, 5], [0, 0, 1.1, -4], [0, 0, 0, 1]])


def command(output: Path, model: Path, **arguments: object) -> int:
    words = [f"--{name}={value}" for name, value in {**FAST, **arguments}.items()]
    return cli.main(["synthesize", f"--output={output}", f"--model={model}", *words])


def picture(folder: Path, name: str, array: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return folder / name


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path) if path.suffix == ".png" else nib.load(path).dataobj)


def volume(folder: Path, name: str, array: np.ndarray, affine: np.ndarray = TURNED) -> Path:
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), folder / name)
    return folder / name


def scan_3d(seed: int, dtype: str = "int16") -> np.ndarray:
    """Noise on a ramp, -300 to 900, or 0 to 250 where that is all the type can hold."""
    array = ndimage.gaussian_filter(np.random.default_rng(seed).random(SHAPE), 1) + np.indices(SHAPE)[0] / 20
    array = (array - array.min()) / np.ptp(array)
    array = 250 * array if dtype.startswith("u") else 1200 * array - 300
    return array.astype(dtype)


@pytest.fixture
def folders_3d(tmp_path: Path) -> dict[str, Path]:
    """Two volumes, their label maps, label maps without class 2, and regions of one corner."""
    after, region = np.zeros(SHAPE, dtype=np.uint8), np.zeros(SHAPE, dtype=np.uint8)
    after[3:9, 3:9, 3:9] = 1
    before = after.copy()
    before[4:6, 4:6, 4:6] = 2
    region[1:4, 1:4, 1:4] = 3
    root = tmp_path / "volumes"
    root.mkdir()
    arrays = {"labels": after, "source_labels": before, "regions": region}
    for index in range(2):
        volume(root / "sources", f"case_{index}.nii.gz", scan_3d(index))
        for name, array in arrays.items():
            volume(root / name, f"case_{index}.nii.gz", np.roll(array, index, axis=2))
    return {name: root / name for name in ("sources", *arrays)}


@pytest.fixture
def sources_2d(folders_2d: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The scans of the folders as sources, with regions, and label maps of which one has class 2 no more."""
    for index in range(3):
        region = np.zeros(SIDES, dtype=np.uint8)
        region[2:4, 3:5] = 255
        picture(tmp_path / "regions", f"case_{index}.png", region)
        label = read(folders_2d["labels"] / f"case_{index}.png")
        picture(tmp_path / "changed", f"case_{index}.png", np.where(label == 2, 1, label).astype(np.uint8))
    return {
        "sources": folders_2d["edges"],
        "regions": tmp_path / "regions",
        "source_labels": folders_2d["labels"],
        "labels": tmp_path / "changed",
    }


def near(region: np.ndarray, width: float) -> np.ndarray:
    """Voxels at most this far away, by comparing every voxel with every one of the region."""
    places, marked = np.argwhere(np.ones(region.shape)), np.argwhere(region)
    distance = np.sqrt(((places[:, None] - marked[None]) ** 2).sum(-1)).min(1)
    return (distance <= width + 1e-9).reshape(region.shape)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*Tr/*"))
        if not path.name.startswith(".")
    }


def conditions_csv(folder: Path, *rows: str) -> Path:
    path = folder / "conditions.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_pictures_are_made_from_pictures(model_all: Path, sources_2d: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(out, model_all, sources=sources_2d["sources"], strength=0.4, prompts="effusion") == 0
    assert not (out / "labelsTr").exists()
    for index, record in enumerate(read_manifest(out / "manifest.jsonl")):
        source = sources_2d["sources"] / f"case_{index}.png"
        with Image.open(out / "imagesTr" / f"synthetic_{index:05d}_0000.png") as written:
            made, mark = np.asarray(written), written.info["Description"]
        assert (made.dtype, made.shape) == (np.uint8, SIDES)
        assert mark == "medgen synthetic, made from the scan of a patient"
        assert (made != read(source)).mean() > 0.5
        assert record.image_sha256 == sha256_array(made[None])
        assert record.label == {"source": "none"}
        assert record.conditions["text"] == "effusion"
        assert record.conditions["source"] == {
            "files": [{"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}],
            "strength": 0.4,
            "voxels": 120,
            "band": 3,
        }
    assert index == 2
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "made from a source scan where one was given" in card and "protect these images" in card
    assert "`--sources FOLDER`" in card and "--regions" not in card
    assert "in the units and the type of the source scans" in card
    assert read_dataset(out).synthetic


def test_a_scan_depends_on_its_seed_alone_and_on_the_strength(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    given = {"model": str(model_all), "sources": sources_2d["sources"], **FAST}
    one = synthesize(tmp_path / "one", strength=0.4, batch_size=1, **given)
    two = synthesize(tmp_path / "two", strength=0.4, batch_size=4, num_samples=5, **given)
    other = synthesize(tmp_path / "other", strength=0.8, **given)
    assert [record.image_sha256 for record in one] == [record.image_sha256 for record in two][:3]
    assert len({record.image_sha256 for record in (*two, *other)}) == 8
    assert two[3].conditions["source"]["files"] == two[0].conditions["source"]["files"]
    assert all(len(record.batch) == 1 for record in two)


def test_beyond_a_region_and_its_band_every_voxel_stays(
    model_3d: Path, folders_3d: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folders_3d["source_labels"] = folders_3d["labels"]
    assert command(out, model_3d, **folders_3d) == 0
    for index in range(2):
        source = nib.load(folders_3d["sources"] / f"case_{index}.nii.gz")
        made = nib.load(out / "imagesTr" / f"synthetic_{index:05d}_0000.nii.gz")
        region = np.asarray(nib.load(folders_3d["regions"] / f"case_{index}.nii.gz").dataobj) > 0
        label = nib.load(out / "labelsTr" / f"synthetic_{index:05d}.nii.gz")
        before, after = np.asarray(source.dataobj), np.asarray(made.dataobj)
        assert after.dtype == np.int16 and (after[~near(region, 3)] == before[~near(region, 3)]).all()
        assert (after != before)[region].mean() > 0.9
        for written in (made, label):
            assert np.array_equal(written.affine, source.affine)
            assert nib.aff2axcodes(written.affine) == ("P", "L", "S")
        assert np.array_equal(label.dataobj, nib.load(folders_3d["labels"] / f"case_{index}.nii.gz").dataobj)
    record = read_manifest(out / "manifest.jsonl")[0]
    assert record.conditions["source"]["strength"] == 1.0
    assert (record.conditions["source"]["voxels"], record.conditions["source"]["band"]) == (27, 3)
    assert record.conditions["source"]["region"]["file"] == "case_0.nii.gz"
    dataset = read_dataset(out)
    assert [sample.case for sample in load_cases(dataset, dataset.cases)] == ["synthetic_00000", "synthetic_00001"]
    assert "some of them from scans of patients" in (out / "dataset.json").read_text()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_lesion_goes_and_comes_where_the_label_maps_differ(
    model_3d: Path,
    model_all: Path,
    sources_2d: dict[str, Path],
    folders_3d: dict[str, Path],
    tmp_path: Path,
    spatial_dims: int,
) -> None:
    given, model = (sources_2d, model_all) if spatial_dims == 2 else (folders_3d, model_3d)
    names = ["labels", "source_labels"]
    for way, (after, before) in {"out": names, "in": names[::-1]}.items():
        folders = {"sources": given["sources"], "labels": given[after], "source_labels": given[before]}
        assert command(tmp_path / way, model, num_samples=2, **folders) == 0
        for index, path in enumerate(sorted(folders["sources"].iterdir())[:2]):
            image = read(next((tmp_path / way / "imagesTr").glob(f"synthetic_{index:05d}_0000.*")))
            label = read(next((tmp_path / way / "labelsTr").glob(f"synthetic_{index:05d}.*")))
            assert np.array_equal(label, read(folders["labels"] / path.name))
            changed = read(folders["labels"] / path.name) != read(folders["source_labels"] / path.name)
            region = near(changed, 2)
            assert (image == read(path))[~near(region, 3)].all()
            assert (image != read(path))[region].mean() > 0.5
            record = read_manifest(tmp_path / way / "manifest.jsonl")[index]
            assert record.conditions["source"]["label"]["file"] == path.name
            assert record.conditions["source"]["voxels"] == region.sum()
    card = (tmp_path / "in" / "README.md").read_text(encoding="utf-8")
    assert "`--source_labels FOLDER`" in card and "2 taken from files" in card


def test_a_lesion_comes_into_a_scan_without_any(model_3d: Path, folders_3d: dict[str, Path], tmp_path: Path) -> None:
    for path in folders_3d["source_labels"].iterdir():
        volume(path.parent, path.name, np.zeros(SHAPE, dtype=np.uint8))
    names = ("sources", "labels", "source_labels")
    records = synthesize(tmp_path / "out", model=str(model_3d), **{name: folders_3d[name] for name in names}, **FAST)
    assert [record.label["file"] for record in records] == ["case_0.nii.gz", "case_1.nii.gz"]
    with pytest.raises(BadInputError, match=r"case_0\.nii\.gz: expected at least one voxel of a class"):
        swapped = {"labels": folders_3d["source_labels"], "source_labels": folders_3d["labels"]}
        synthesize(tmp_path / "b", model=str(model_3d), sources=folders_3d["sources"], **swapped, **FAST)


def test_edges_texts_and_attributes_steer_an_edit(
    model_all: Path, sources_2d: dict[str, Path], folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    given = {"model": str(model_all), "num_samples": 1, "sources": sources_2d["sources"], **FAST}
    given["regions"] = sources_2d["regions"]
    labels = dict.fromkeys(("labels", "source_labels"), sources_2d["labels"])
    ways: list[dict[str, Any]] = [
        {},
        {"edge_maps": folders_2d["edge_maps"]},
        {"prompts": "pa"},
        {"attributes": {"view": "AP"}},
        labels,
        {"edges": folders_2d["edges"], **labels, "prompts": "pa", "attributes": {"age": 60}},
    ]
    records = [synthesize(tmp_path / f"{index}", **given, **way)[0] for index, way in enumerate(ways)]
    assert len({record.image_sha256 for record in records}) == len(ways)
    assert records[-1].conditions.keys() == {"edge", "source", "text", "attributes"}


def test_a_table_says_what_each_scan_is_made_from(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = conditions_csv(
        tmp_path,
        "source,region,source_label,label,strength,text",
        "scans/case_0.png,,,,0.3,effusion",
        "scans/case_1.png,regions/case_1.png,,,,",
        "scans/case_2.png,,labels/case_2.png,changed/case_2.png,0.9,pa",
        ",,,labels/case_0.png,,",
        "scans/case_0.png,,,,,",
    )
    assert command(tmp_path / "a", model_all, conditions=path, strength=0.5) == 0
    records = read_manifest(tmp_path / "a" / "manifest.jsonl")
    assert [record.conditions.get("source", {}).get("strength") for record in records] == [0.3, 0.5, 0.9, None, 0.5]
    assert records[1].conditions["source"]["region"]["file"] == "regions/case_1.png"
    assert records[2].conditions["source"]["label"]["file"] == "labels/case_2.png"
    assert [record.label.get("file") for record in records][2:4] == ["changed/case_2.png", "labels/case_0.png"]
    kinds = [Image.open(path).mode for path in sorted((tmp_path / "a" / "imagesTr").iterdir())]
    assert kinds == ["L", "L", "L", "I;16", "L"]
    again = {"model": str(model_all), "replay": tmp_path / "a" / "manifest.jsonl"}
    synthesize(tmp_path / "b", **again, **dict.fromkeys(sources_2d, tmp_path))
    assert "5 of 5 equal the replayed manifest voxel for voxel" in capsys.readouterr().out
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_replay_asks_for_every_folder_and_checks_every_file(
    model_3d: Path, folders_3d: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders_3d["regions"] = folders_3d["source_labels"]
    synthesize(tmp_path / "a", model=str(model_3d), strength=0.7, **folders_3d, **FAST)
    again = {"model": str(model_3d), "replay": tmp_path / "a" / "manifest.jsonl"}
    for name, kind in {"sources": "source scans", "regions": "regions", "source_labels": "label maps"}.items():
        given = {key: folder for key, folder in folders_3d.items() if key != name}
        with pytest.raises(BadInputError, match=rf"the folder of its {kind} \(case_0\.nii\.gz.*--{name} FOLDER"):
            synthesize(tmp_path / "b", **again, **given)
    with pytest.raises(BadInputError, match="strength: expected none beside replay"):
        synthesize(tmp_path / "b", **again, **folders_3d, strength=0.7)
    lines = (tmp_path / "a" / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "second.jsonl").write_text(lines[1], encoding="utf-8")
    synthesize(tmp_path / "b", model=str(model_3d), replay=tmp_path / "second.jsonl", **folders_3d)
    assert "1 of 1 equal the replayed manifest voxel for voxel" in capsys.readouterr().out
    assert digests(tmp_path / "b").items() <= digests(tmp_path / "a").items()
    volume(folders_3d["sources"], "case_1.nii.gz", scan_3d(5))
    with pytest.raises(BadInputError, match=r"case_1\.nii\.gz: expected the source scan that .* got another"):
        synthesize(tmp_path / "c", **again, **folders_3d)


def test_an_interrupted_run_goes_on_to_the_same_scans(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": str(model_all), **sources_2d, "batch_size": 2, **FAST}
    del given["regions"]
    synthesize(tmp_path / "out", **given)
    whole = digests(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text("".join(lines[:1]) + lines[1][:40], encoding="utf-8")
    for path in (tmp_path / "out").glob("*Tr/synthetic_0000[12]*"):
        path.unlink()
    kept = tmp_path / "out" / "imagesTr" / "synthetic_00000_0000.png"
    written = kept.stat().st_mtime_ns
    capsys.readouterr()
    synthesize(tmp_path / "out", **given)
    assert "1 of 3 scans are already there; going on" in capsys.readouterr().out
    assert digests(tmp_path / "out") == whole
    assert kept.stat().st_mtime_ns == written
    assert [json.loads(line)["conditions"] for line in lines] == [
        record.conditions for record in read_manifest(manifest)
    ]
    with pytest.raises(BadInputError, match=r"expected an empty folder or the same run.*conditions_sha256"):
        synthesize(tmp_path / "out", **given, strength=0.5)


@pytest.mark.parametrize(
    ("stored", "slope", "written"),
    [
        ("uint8", 1, "uint8"),
        ("int16", 1, "int16"),
        (">i2", 1, "int16"),
        ("uint16", 1, "uint16"),
        ("int32", 1, "int16"),
        ("float32", 1, "float32"),
        ("float64", 1, "float32"),
        ("int16", 0.5, "float32"),
    ],
)
def test_the_type_of_a_volume_stays(model_3d: Path, tmp_path: Path, stored: str, slope: float, written: str) -> None:
    image = nib.Nifti1Image(scan_3d(0, stored), TURNED)
    image.header.set_data_dtype(stored)
    if slope != 1:
        image.header.set_slope_inter(slope, 0)
    (tmp_path / "sources").mkdir()
    nib.save(image, tmp_path / "sources" / "a.nii")
    region = np.zeros(SHAPE, dtype=np.uint8)
    region[2:4, 2:4, 2:4] = 1
    volume(tmp_path / "regions", "a.nii.gz", region)
    folders = {name: tmp_path / name for name in ("sources", "regions")}
    synthesize(tmp_path / "out", model=str(model_3d), **folders, **FAST)
    made = nib.load(tmp_path / "out" / "imagesTr" / "synthetic_00000_0000.nii.gz")
    assert made.get_data_dtype() == np.dtype(written)
    before = np.asarray(nib.load(tmp_path / "sources" / "a.nii").dataobj)
    far = ~near(region > 0, 3)
    assert np.array_equal(np.asarray(made.dataobj)[far], before.astype(written)[far])
    assert (np.asarray(made.dataobj) != before)[region > 0].any()


def test_a_slice_with_geometry_stays_nifti_and_a_mixed_folder_gets_a_table(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    label, scan = (read(sources_2d[name] / "case_0.png") for name in ("labels", "sources"))
    mixed = {"sources": tmp_path / "mixed", "labels": tmp_path / "mixed_labels"}
    volume(mixed["sources"], "a.nii.gz", scan[..., None], affine)
    volume(mixed["labels"], "a.nii.gz", label[..., None], affine)
    picture(mixed["sources"], "b.png", scan)
    picture(mixed["labels"], "b.png", label)
    out = tmp_path / "out"
    records = synthesize(out, model=str(model_all), strength=0.5, **mixed, **FAST)
    names = [sorted(record.files) for record in records]
    assert [name.rpartition("synthetic")[2] for name in names[0]] == ["_00000_0000.nii.gz", "_00000.nii.gz"]
    assert [name.rpartition("synthetic")[2] for name in names[1]] == ["_00001_0000.png", "_00001.png"]
    made = nib.load(out / "imagesTr" / "synthetic_00000_0000.nii.gz")
    assert (made.shape, made.get_data_dtype()) == ((*SIDES, 1), np.uint8)
    assert np.allclose(made.affine, affine) and np.allclose(made.header.get_zooms(), (0.7, 0.8, 3.0))
    assert not (out / "dataset.json").exists()
    dataset = read_dataset(out)
    assert [case.label is not None for case in dataset.cases] == [True, True]
    assert len(list(load_cases(dataset, dataset.cases))) == 2


def test_a_gray_picture_has_three_equal_channels_for_a_model_in_color(
    make_generator: Callable[..., Generator], folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    make_generator(2, channels=3, image_dtype="uint8").save_pretrained(tmp_path / "m")
    Image.open(folders_2d["edges"] / "case_1.png").convert("RGB").save(folders_2d["edges"] / "case_1.png")
    given = {"sources": folders_2d["edges"], "strength": 0.3, "num_samples": 2}
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), **given, **FAST)
    assert [Image.open(path).mode for path in (tmp_path / "out" / "imagesTr").iterdir()] == ["RGB", "RGB"]


def test_channels_of_a_source_are_files_of_their_own(
    make_generator: Callable[..., Generator], tmp_path: Path, folders_3d: dict[str, Path]
) -> None:
    make_generator(3, channels=3).save_pretrained(tmp_path / "m")
    for channel in range(3):
        volume(tmp_path / "channels", f"case_0_{channel:04d}.nii.gz", scan_3d(channel))
    given = {"sources": tmp_path / "channels", "labels": folders_3d["labels"], "strength": 0.3}
    (folders_3d["labels"] / "case_1.nii.gz").unlink()
    (record,) = synthesize(tmp_path / "out", model=str(tmp_path / "m"), **given, **FAST)
    assert [file["file"] for file in record.conditions["source"]["files"]] == [
        f"case_0_{channel:04d}.nii.gz" for channel in range(3)
    ]
    assert len(list((tmp_path / "out" / "imagesTr").iterdir())) == 3
    with pytest.raises(BadInputError, match=r"case_0\.nii\.gz: expected the 3 channel\(s\) of the model.* got 1"):
        given["sources"] = folders_3d["sources"]
        synthesize(tmp_path / "b", model=str(tmp_path / "m"), **given, **FAST)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": None}, r"strength: expected a share in \(0, 1\] for source scans .* Give --strength 0\.5"),
        ({"strength": None, "labels": "changed"}, r"strength: expected .* by --source_labels beside --labels"),
        ({"strength": 0.0}, r"strength: expected a share in \(0, 1\], got 0\.0"),
        ({"strength": 1.2, "regions": "regions"}, r"strength: expected a share in \(0, 1\], got 1\.2"),
        ({"strength": 0.001}, "num_inference_steps: expected 1 to 1, .* at strength 0.001, got 2"),
        ({"sources": None}, "strength: expected source scans beside, got none. Give them with --sources FOLDER"),
        (
            {"sources": None, "strength": None, "regions": "regions"},
            "regions: expected source scans beside, got none",
        ),
        ({"source_labels": "labels"}, "source_labels: expected the label maps that the results are to have"),
        ({"label_source": "generate"}, "label_source 'generate': expected 'files' or 'none' beside source scans"),
        ({"label_source": "deform", "labels": "changed"}, "label_source 'deform': expected 'files' or 'none' beside"),
        ({"sources": "nothing"}, "nothing: expected a folder of scans, got none"),
        ({"sources": "flat"}, r"case_0\.png: expected varying intensities, got the constant 7"),
        ({"sources": "color"}, r"case_0\.png: expected the 1 channel\(s\) of the model 'tiny-2d' \(MR\), got 3"),
        ({"sources": "volume"}, r"case_0\.nii\.gz: expected a 2D scan for the model 'tiny-2d', got 3D"),
        (
            {"sources": "single", "labels": "changed"},
            r"case_1\.png: expected a source scan of the same name \(.*single",
        ),
        (
            {"labels": "fewer"},
            r"scans.case_1\.png: expected a label map of the same name \(.*fewer.case_1\.\*\), got none",
        ),
        (
            {"labels": "changed", "regions": "regions"},
            r"changed.case_0\.png: expected the label map of the source scan .*, got none\. Give it with --source_l",
        ),
        ({"regions": "fewer"}, r"case_1\.png: expected a region of the same name \(.*fewer.case_1\.\*\)"),
        (
            {"source_labels": "fewer", "labels": "changed"},
            r"case_1\.png: expected a source label map of the same name \(.*fewer.case_1\.\*\)",
        ),
        (
            {"edge_maps": "fewer_maps", "strength": 1.0},
            r"case_1\.png: expected edges of the same name \(.*fewer_maps.case_1\.\*\)",
        ),
        ({"regions": "large"}, r"large.case_0\.png: expected shape \(12, 10\) as in .*case_0\.png, got \(14, 10\)"),
        ({"labels": "large"}, r"large.case_0\.png: expected shape \(12, 10\) as in .*case_0\.png, got \(14, 10\)"),
        (
            {"source_labels": "large", "labels": "changed"},
            r"large.case_0\.png: expected shape \(12, 10\) as in .*case_0\.png, got \(14, 10\)",
        ),
        ({"edge_maps": "large_maps"}, r"large_maps.case_0\.png: expected shape \(12, 10\) as in .*, got \(14, 10\)"),
        ({"regions": "empty"}, r"empty.case_0\.png: expected a region, which is not 0 somewhere, got none"),
        (
            {"labels": "labels", "source_labels": "labels"},
            r"case_0\.png: expected a label that differs from .*case_0\.png, got the same",
        ),
        (
            {"labels": "labels", "source_labels": "changed", "regions": "regions"},
            r"case_0\.png: expected the label outside of the region, where the scan stays, got \d+ other voxels",
        ),
        ({"conditions": "conditions.csv"}, "sources: expected none beside conditions"),
        ({"conditions": "conditions.csv", "sources": None}, r"strength: expected source scans, got none in .*\.csv"),
    ],
)
def test_what_cannot_be_is_one_clear_error_before_anything_is_written(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    scan = read(sources_2d["sources"] / "case_0.png")
    picture(tmp_path / "fewer", "case_0.png", (scan > 0).astype(np.uint8))
    picture(tmp_path / "single", "case_0.png", scan)
    picture(tmp_path / "flat", "case_0.png", np.full(SIDES, 7, dtype=np.uint8))
    picture(tmp_path / "empty", "case_0.png", np.zeros(SIDES, dtype=np.uint8))
    picture(tmp_path / "color", "case_0.png", np.stack([scan] * 3, axis=-1))
    large = np.zeros((14, 10), dtype=np.uint8)
    large[4:6, 4:6] = 1
    picture(tmp_path / "large", "case_0.png", large)
    picture(tmp_path / "fewer_maps", "case_0.png", (255 * (scan > 150)).astype(np.uint8))
    picture(tmp_path / "large_maps", "case_0.png", 255 * large)
    volume(tmp_path / "volume", "case_0.nii.gz", scan_3d(0))
    conditions_csv(tmp_path, "text", "pa")
    changed = {"sources": "scans", "strength": 0.5, **given}
    plain = {"strength", "label_source"}
    arguments = {
        name: value if name in plain or value is None else tmp_path / str(value) for name, value in changed.items()
    }
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model_all), **arguments, **FAST)
    assert not (tmp_path / "out").exists()


def test_a_volume_elsewhere_in_space_is_refused(model_3d: Path, folders_3d: dict[str, Path], tmp_path: Path) -> None:
    folders_3d["source_labels"] = folders_3d["labels"]
    moved = TURNED.copy()
    moved[0, 3] += 3
    for name in ("regions", "labels"):
        path = folders_3d[name] / "case_1.nii.gz"
        kept = path.read_bytes()
        volume(folders_3d[name], path.name, np.asarray(nib.load(path).dataobj), moved)
        with pytest.raises(BadInputError, match=rf"{name}.case_1\.nii\.gz: expected the affine of .* 3 mm elsewhere"):
            synthesize(tmp_path / "out", model=str(model_3d), **folders_3d, **FAST)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["source,strength", "scans/case_0.png,"], r"line 2: strength: expected a share in \(0, 1\] for source scans"),
        (["source,strength", "scans/case_0.png,2"], r"line 2: strength: expected a share in \(0, 1\], got 2\.0"),
        (["source,strength", "scans/case_0.png,half"], "line 2: strength: expected a number, got 'half'"),
        (["source,strength", "scans/none.png,0.5"], r"line 2: .*none\.png: expected a file, got nothing there"),
        (["source,region", ",regions/case_0.png"], "line 2: expected a source beside region, got none"),
        (
            ["source,source_label", "scans/case_0.png,labels/case_0.png"],
            r"line 2: .*case_0\.png: expected the label map that the result is to have",
        ),
        (
            ["source,region,label", "scans/case_0.png,regions/case_0.png,changed/case_0.png"],
            r"line 2: .*case_0\.png: expected the label map of the source scan .* column source_label of the table",
        ),
        (["source,region", "scans/case_0.png,empty.png"], r"line 2: .*empty\.png: expected a region"),
        (["source,strength,edge_map", "scans/case_0.png,1,large.png"], r"large\.png: expected shape \(12, 10\)"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path, rows: list[str], message: str
) -> None:
    picture(tmp_path, "empty.png", np.zeros(SIDES, dtype=np.uint8))
    picture(tmp_path, "large.png", np.zeros((14, 10), dtype=np.uint8))
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model_all), conditions=conditions_csv(tmp_path, *rows), **FAST)
    path = conditions_csv(tmp_path, "source,strength", "scans/case_0.png,0.5")
    with pytest.raises(BadInputError, match="line 2: label_source 'generate': expected 'files' or 'none' beside"):
        synthesize(tmp_path / "out", model=str(model_all), conditions=path, label_source="generate", **FAST)
    assert not (tmp_path / "out").exists()


def test_an_attribute_of_the_model_keeps_its_column(make_generator: Callable[..., Generator]) -> None:
    config = make_generator(2, conditions=("mask", "view")).config
    assert table._source_columns(config) == ["source", "source_label", "region", "strength"]
    config = replace(config, attributes={"region": config.attributes["view"]})
    assert table._source_columns(config) == ["source", "source_label", "strength"]


def test_what_is_bad_is_left_out_when_asked_and_no_path_is_told(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    def left_out(name: str, **arguments: object) -> tuple[list[str], dict[str, str]]:
        records = synthesize(tmp_path / name, model=str(model_all), skip_bad=True, **arguments, **FAST)
        text = (tmp_path / name / "rejected.jsonl").read_text()
        assert str(tmp_path) not in text
        sources = [record.conditions["source"]["files"][0]["file"] for record in records]
        return sources, {row["case"]: row["reason"] for row in map(json.loads, text.splitlines())}

    picture(sources_2d["regions"], "case_0.png", np.zeros(SIDES, dtype=np.uint8))
    (sources_2d["regions"] / "case_1.png").unlink()
    made, reasons = left_out("flags", sources=sources_2d["sources"], regions=sources_2d["regions"])
    assert made == ["case_2.png"]
    assert reasons["case_0"].startswith("case_0.png: expected a region, which is not 0 somewhere")
    assert reasons["case_1"].startswith("case_1.png: expected a region of the same name (case_1.*)")
    path = sources_2d["labels"] / "case_1.png"
    path.write_bytes((sources_2d["source_labels"] / "case_1.png").read_bytes())
    del sources_2d["regions"]
    made, reasons = left_out("same", **sources_2d)
    assert made == ["case_0.png", "case_2.png"]
    assert reasons == {"case_1": reasons["case_1"]}
    assert reasons["case_1"].startswith("case_1.png: expected a label that differs from case_1.png, got the same")
    table_path = conditions_csv(
        tmp_path, "source,region", "scans/case_0.png,regions/case_0.png", "scans/case_2.png,regions/case_2.png"
    )
    made, reasons = left_out("table", conditions=table_path)
    assert made == ["scans/case_2.png"]
    assert reasons["conditions.csv, line 2"].startswith("regions/case_0.png: expected a region")


def test_sources_without_a_label_map_are_listed_once(
    model_all: Path, sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    (sources_2d["labels"] / "case_1.png").unlink()
    picture(sources_2d["labels"], "case_2.png", np.zeros(SIDES, dtype=np.uint8))
    given = {"sources": sources_2d["sources"], "labels": sources_2d["labels"], "strength": 0.5}
    records = synthesize(tmp_path / "out", model=str(model_all), skip_bad=True, **given, **FAST)
    assert [record.label["file"] for record in records] == ["case_0.png"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["case"]: row["reason"] for row in rows}
    assert len(rows) == 2
    assert reasons["case_1"].startswith("case_1.png: expected a label map of the same name (case_1.*), got none")
    assert reasons["case_2"].startswith("case_2.png: expected at least one voxel of a class")


@pytest.mark.parametrize("way", ["sources", "edges", "channels", "source", "none"])
def test_the_split_of_source_and_edge_scans_is_told_where_there_is_one(
    make_generator: Callable[..., Generator],
    sources_2d: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    way: str,
) -> None:
    channels = 3 if way == "channels" else 1
    make_generator(2, channels=channels, conditions=("mask", "edge")).save_pretrained(tmp_path / "m")
    root = tmp_path / "set"
    names = {str(channel): f"MR{channel}" for channel in range(channels)}
    content = {"channel_names": names, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps(content))
    for index in range(3):
        scan, label = (read(sources_2d[name] / f"case_{index}.png") for name in ("sources", "labels"))
        picture(root / "labelsTr", f"case_{index}.png", label)
        for channel in range(channels):
            picture(root / "imagesTr", f"case_{index}_{channel:04d}.png", scan)
    if way != "none":
        (root / "val.txt").write_text("case_1\ncase_2\n")
    table_path = conditions_csv(root, "source,strength", "imagesTr/case_1_0000.png,0.3", "imagesTr/case_1_0000.png,1")
    whole = {"sources": root / "imagesTr", "strength": 0.5}
    given = {"edges": {"edges": root / "imagesTr"}, "source": {"conditions": table_path}}.get(way, whole)
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), num_samples=1, **given, **FAST)
    text = capsys.readouterr().out
    kind = "edge scans" if way == "edges" else "source scans"
    listing = "1 of val" if way == "source" else "1 of train, 2 of val"
    warning = f"{kind}: {listing}. A network that trains on these scans cannot be tested on val: for that, leave out "
    assert (f"{warning}the {kind} of val\n" in text) == (way != "none")
    assert ("cannot be tested" in text) == (way != "none")


def test_no_folder_is_told_of_what_fails_while_sampling(
    make_generator: Callable[..., Generator], sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    generator = make_generator(2, conditions=("mask", "edge"))
    (tmp_path / "out").mkdir()
    names = {"label": sources_2d["labels"], "edge": tmp_path / "maps", "scan": sources_2d["sources"]}
    files = {name: SourceFile(folder / "case_0.png", "-") for name, folder in names.items()}
    spec = SampleSpec("a", 0, 0, "files", file=files["label"])
    specs = [
        replace(spec, edge=EdgeSource((files["edge"],), ready=True)),
        replace(spec, scan=ScanSource((files["scan"],), 0.5)),
        replace(spec, scan=ScanSource((files["scan"],), 0.5, region=replace(files["scan"], path=Path("/no/r.png")))),
    ]
    assert len([prepare(each, generator) for each in specs[:2]]) == 2
    for folder in names.values():
        (folder / "case_0.png").rename(folder / "gone.png")
    (names["label"] / "gone.png").rename(names["label"] / "case_0.png")
    for each in specs[:2]:
        with pytest.raises(BadInputError, match=str(tmp_path)) as error:
            prepare(each, generator)
        run._reject(tmp_path / "out", frozenset("a"), True, each, error.value)
    (names["scan"] / "gone.png").rename(names["scan"] / "case_0.png")
    with pytest.raises(BadInputError, match=r"/no/r\.png") as error:
        prepare(specs[2], generator)
    run._reject(tmp_path / "out", frozenset("a"), True, specs[2], error.value)
    reasons = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(reasons) == 3
    for reason, name in zip(reasons, ("case_0.png", "case_0.png", "r.png"), strict=True):
        assert json.loads(reason)["reason"].startswith(f"{name}: expected a file, got nothing there")


def test_sources_inside_the_output_are_refused(model_all: Path, sources_2d: dict[str, Path], tmp_path: Path) -> None:
    for name in ("sources", "regions"):
        with pytest.raises(BadInputError, match=f"expected {name} outside of the output folder, got it inside"):
            given = {**sources_2d, "labels": None, "source_labels": None}
            synthesize(sources_2d[name], model=str(model_all), **given, **FAST)
    path = conditions_csv(tmp_path, "source,strength", "scans/case_0.png,0.5")
    with pytest.raises(BadInputError, match=r"case_0\.png: expected conditions outside of the output folder"):
        synthesize(tmp_path / "scans", model=str(model_all), conditions=path, **FAST)


def test_a_model_that_is_steered_by_nothing_makes_scans_from_scans(
    make_generator: Callable[..., Generator], sources_2d: dict[str, Path], tmp_path: Path
) -> None:
    make_generator(2, label=False, conditions=()).save_pretrained(tmp_path / "m")
    given = {"model": str(tmp_path / "m"), "sources": sources_2d["sources"], "regions": sources_2d["regions"]}
    records = synthesize(tmp_path / "out", **given, **FAST)
    assert [record.label_sha256 for record in records] == [None] * 3
    with pytest.raises(BadInputError, match="labels: expected none, because the model 'tiny-2d' is steered by nothing"):
        synthesize(tmp_path / "b", **given, labels=sources_2d["labels"], **FAST)


def test_samples_made_from_scans_come_lazily_in_the_type_of_the_scan(
    make_generator: Callable[..., Generator], folders_3d: dict[str, Path]
) -> None:
    file = SourceFile(folders_3d["sources"] / "case_0.nii.gz", "-")
    spec = SampleSpec("a", 0, 0, "none", scan=ScanSource((file,), 0.5))
    (sample,) = iter_samples(make_generator(3), [spec])
    assert (sample.image.dtype, sample.image.shape, sample.label) == (torch.int16, (1, *SHAPE), None)
    with pytest.raises(BadInputError, match="label_source 'generate': expected 'files' or 'none'"):
        next(iter_samples(make_generator(3), [replace(spec, source="generate")]))
