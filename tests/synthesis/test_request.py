"""Prompts, label maps, edges and attributes from flags or from a table, and what is refused of them."""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import png
import pytest
import torch
import yaml
from PIL import Image
from skimage.filters import sobel

from medgen.conditions.edge import EdgeSettings
from medgen.data.dataset import load_cases, read_dataset
from medgen.data.geometry import place
from medgen.generator import Generator
from medgen.provenance import SampleRecord, read_manifest
from medgen.synthesis import find_edges, synthesize
from medgen.synthesis.inputs import place_edges
from medgen.types import BadInputError

FAST = {"num_inference_steps": 2, "precision": "fp32", "device": "cpu"}


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "imagesTr").glob("*.png"))]


def table(folder: Path, *rows: str) -> Path:
    path = folder / "conditions.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_flags_combine_by_file_name_and_in_turn(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Chest X-ray, PA\nno finding\n")
    (folders_2d["edges"] / "extra.png").write_bytes((folders_2d["edges"] / "case_0.png").read_bytes())
    records = synthesize(
        tmp_path / "out",
        model=str(model_all),
        labels=folders_2d["labels"],
        edges=folders_2d["edges"],
        prompts=str(tmp_path / "prompts.txt"),
        attributes={"view": "PA", "age": 60, "spacing": [0.5, 0.5]},
        guidance_scale={"text": 5.0},
        num_samples=4,
        **FAST,
    )
    names = ["case_0.png", "case_1.png", "case_2.png", "case_0.png"]
    assert [record.label["file"] for record in records] == names
    assert [record.conditions["edge"][0]["file"] for record in records] == names
    assert [record.conditions["text"] for record in records] == ["Chest X-ray, PA", "no finding"] * 2
    first = records[0]
    assert first.conditions["attributes"] == {"view": "PA", "age": "60", "spacing": "[0.5, 0.5]"}
    content = (folders_2d["edges"] / "case_0.png").read_bytes()
    assert first.conditions["edge"] == [{"file": "case_0.png", "sha256": hashlib.sha256(content).hexdigest()}]
    assert first.guidance_scale == {
        "mask": 1.5,
        "edge": 1.5,
        "text": 5.0,
        "view": 1.5,
        "age": 1.5,
        "code": 1.5,
        "spacing": 1.5,
    }
    assert first.network_evaluations == 2 * 3  # nothing, all but the text, all
    assert "guidance mask 1.5, edge 1.5, text 5, " in (said := capsys.readouterr().out)
    assert ", 6 network evaluations a scan\n" in said
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Steered by | label map (4), text (4), edges (4), view (4), age (4), spacing (4) |" in card
    assert "`--labels FOLDER` and `--edges FOLDER`" in card
    rows = list(csv.DictReader((tmp_path / "out" / "metadata.csv").open()))
    assert [(row["text"], row["view"], row["age"]) for row in rows][1] == ("no finding", "PA", "60")
    saved = yaml.safe_load((tmp_path / "out" / "synthesize.yaml").read_text())
    assert (saved["labels"], saved["edges"], saved["prompts"]) == ("labels", "scans", "prompts.txt")
    assert str(tmp_path) not in (tmp_path / "out" / "synthesize.yaml").read_text()


def test_the_saved_arguments_give_the_same_scans_through_the_command_line(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    from medgen.cli import parse

    words = ["--model", str(model_all), "--edge_maps", str(folders_2d["edge_maps"])]
    first = [*words, "--prompts", "chest: {pa} [ap]", "--attributes", "{view: PA, age: 60}", "--num_inference_steps"]
    first += ["2", "--guidance_scale", "{text: 4, mask: 1}", "--guidance_interval", "0.1,0.9", "--device", "cpu"]
    made = synthesize(**parse("synthesize", ["--output", str(tmp_path / "a"), *first]))
    config = ["--config", str(tmp_path / "a" / "synthesize.yaml"), "--output", str(tmp_path / "b")]
    again = synthesize(**parse("synthesize", [*config, *words]))
    assert made == again
    assert made[0].conditions["text"] == "chest: {pa} [ap]"
    assert made[0].guidance_interval == [0.1, 0.9]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({}, 8), ({"prompts": "pa"}, 1), ({"prompts": "many.txt"}, 5), ({"prompts": "many.txt", "labels": "labels"}, 5)],
)
def test_the_number_of_scans_is_that_of_the_longest_list(
    model_all: Path,
    folders_2d: dict[str, Path],
    tmp_path: Path,
    arguments: dict[str, str],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.txt").write_text("pa\nap\nchest\nray\nfinding\n")
    paths = {name: Path(value) if name == "labels" else value for name, value in arguments.items()}
    assert len(synthesize(tmp_path / "out", model=str(model_all), **paths, **FAST)) == count


def test_a_table_gives_each_scan_its_own_conditions(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    path = table(
        tmp_path,
        "label,edge,edge_map,prompt,view,age",
        "labels/case_0.png,,,effusion,PA,",
        ",scans/case_1.png,,,,40",
        "labels/case_2.png,,maps/case_2.png,,,",
        '"",,,"pa, no finding",,',
    )
    arguments = {"model": str(model_all), "conditions": path, "attributes": {"age": 70}, **FAST}
    records = synthesize(tmp_path / "out", **arguments)
    assert [record.label["source"] for record in records] == ["files", "none", "files", "none"]
    assert [record.label.get("file") for record in records] == ["labels/case_0.png", None, "labels/case_2.png", None]
    digest = records[1].conditions["edge"][0]["sha256"]
    assert [record.conditions for record in records][:2] == [
        {"text": "effusion", "attributes": {"age": "70", "view": "PA"}},
        {"edge": [{"file": "scans/case_1.png", "sha256": digest}], "attributes": {"age": "40"}},
    ]
    assert list(records[2].conditions) == ["edge_map", "attributes"]
    assert records[3].conditions["text"] == "pa, no finding"
    # The folder reads back: labels where there are any.
    dataset = read_dataset(tmp_path / "out")
    samples = list(load_cases(dataset, dataset.cases))
    assert [sample.label is not None for sample in samples] == [True, False, True, False]
    assert [sample.text for sample in samples] == ["effusion", None, None, "pa, no finding"]
    assert samples[0].meta["view"] == "PA"
    assert dataset.class_names == {0: "background", 1: "head", 2: "tail"}
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert synthesize(tmp_path / "out", **arguments) == records
    path.write_text(path.read_text().replace("effusion", "ray"))
    with pytest.raises(BadInputError, match=r"expected an empty folder or the same run.*conditions_sha256"):
        synthesize(tmp_path / "out", **arguments)


def test_scans_without_label_maps_are_a_data_set_that_medgen_reads(model_all: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = synthesize(out, model=str(model_all), prompts="chest", label_source="none", num_samples=2, **FAST)
    assert [record.label for record in records] == [{"source": "none"}] * 2
    assert {record.label_sha256 for record in records} == {None}
    assert list(records[0].files) == ["imagesTr/synthetic_00000_0000.png"]
    assert not (out / "labelsTr").exists()
    dataset = read_dataset(out)
    samples = list(load_cases(dataset, dataset.cases))
    assert [(sample.case, sample.label) for sample in samples] == [("synthetic_00000", None), ("synthetic_00001", None)]
    assert (out / "contact_sheet.png").exists()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| Labels | 2 without |" in card
    assert "`metadata.csv` lists the scans." in card
    assert synthesize(out, model=str(model_all), prompts="chest", label_source="none", num_samples=2, **FAST) == records
    # The next run in the folder leaves nothing of this one.
    synthesize(out, model=str(model_all), num_samples=1, overwrite=True, **FAST)
    assert (out / "dataset.json").exists()
    assert not (out / "metadata.csv").exists()
    assert not (out / "classes.json").exists()


def test_channels_without_label_maps_read_back_too(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    make_generator(3, channels=3, conditions=("text",)).save_pretrained(tmp_path / "m")
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), prompts="chest", num_samples=1, **FAST)
    dataset = read_dataset(tmp_path / "out")
    assert [sample.image.shape[0] for sample in load_cases(dataset, dataset.cases)] == [3]


@pytest.mark.parametrize(
    ("conditions", "arguments", "source"),
    [
        (("mask", "text"), {"prompts": "chest"}, "generate"),
        (("mask", "edge"), {"edge_maps": True}, "none"),
        (("mask", "edge"), {"edge_maps": True, "label_source": "generate"}, "generate"),
        (("text",), {"prompts": "chest"}, "none"),
        ((), {}, "none"),
    ],
)
def test_where_labels_come_from_by_default(
    make_generator: Callable[..., Generator],
    folders_2d: dict[str, Path],
    tmp_path: Path,
    conditions: tuple[str, ...],
    arguments: dict[str, object],
    source: str,
) -> None:
    make_generator(2, conditions=conditions).save_pretrained(tmp_path / "m")
    given = {name: folders_2d[name] if name == "edge_maps" else value for name, value in arguments.items()}
    records = synthesize(tmp_path / "out", model=str(tmp_path / "m"), num_samples=1, **given, **FAST)
    assert records[0].label["source"] == source


def test_a_scan_without_a_label_lies_on_the_grid_of_its_edges(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    make_generator(3, conditions=("edge",)).save_pretrained(tmp_path / "m")
    (tmp_path / "maps").mkdir()
    affine = np.array([[0, 1.25, 0, 4], [-1, 0, 0, 5], [0, 0, 0.9, 6], [0, 0, 0, 1]])
    edges = np.zeros((9, 12, 8), dtype=np.float32)
    edges[4] = 1
    nib.save(nib.Nifti1Image(edges, affine), tmp_path / "maps" / "a.nii.gz")
    synthesize(tmp_path / "out", model=str(tmp_path / "m"), edge_maps=tmp_path / "maps", **FAST)
    image = nib.load(tmp_path / "out" / "imagesTr" / "synthetic_00000_0000.nii.gz")
    assert image.shape == (9, 12, 8)
    assert np.allclose(image.affine, affine, atol=1e-5)


def test_edge_maps_are_scaled_by_the_greatest_value_of_their_type(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    config = make_generator(2, conditions=("edge",), edge=EdgeSettings(method="sobel")).config
    values = np.linspace(0, 1, 120).reshape(12, 10)
    Image.fromarray((255 * values).round().astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((65535 * values).round().astype(np.uint16)).save(tmp_path / "b.png")
    with (tmp_path / "c.png").open("wb") as file:
        png.Writer(10, 12, greyscale=True, bitdepth=1).write(file, (values > 0.5).astype(int).tolist())
    found, _ = find_edges(tmp_path, config, ready=True)
    for name, expected, step in (("a", values, 1 / 255), ("b", values, 1 / 65535), ("c", values > 0.5, 1e-6)):
        grid = torch.tensor(np.asarray(expected, dtype=np.float32))
        placed = place_edges(found[name], place_of((12, 10), config), config)
        assert (placed[0] - grid).abs().max() <= step


def place_of(shape: tuple[int, ...], config: object) -> object:
    from medgen.types import Grid

    return place(Grid(shape, np.eye(4), known=False), orientation=None)


def test_edges_of_a_scan_lie_where_its_gradient_is_strongest(
    make_generator: Callable[..., Generator], folders_2d: dict[str, Path]
) -> None:
    config = make_generator(2, conditions=("edge",)).config
    found, _ = find_edges(folders_2d["edges"], config, ready=False)
    edges = place_edges(found["case_0"], place_of((12, 10), config), config)[0].numpy()
    gradient = sobel(np.asarray(Image.open(folders_2d["edges"] / "case_0.png"), dtype=float))
    assert edges.any()
    assert gradient[edges > 0].mean() > 2 * gradient[edges == 0].mean()


def test_channels_of_a_scan_count_as_one_source_of_edges(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    config = make_generator(3, conditions=("edge",)).config
    for channel in (0, 1):
        array = np.zeros((9, 9, 9), dtype=np.float32)
        array[3 + channel :] = 100
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"a_000{channel}.nii.gz")
    config.channel_names = {0: "T1", 1: "T2"}
    found, _ = find_edges(tmp_path, config, ready=False)
    assert [file.path.name for file in found["a"].files] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    config.channel_names = {0: "T1"}  # then these are two scans with a number in their name
    assert list(find_edges(tmp_path, config, ready=False)[0]) == ["a_0000", "a_0001"]


def test_unknown_words_are_told_once_and_a_long_prompt_is_cut_if_asked(model_all: Path, tmp_path: Path) -> None:
    arguments = {"model": str(model_all), "label_source": "none", "batch_size": 1, "num_samples": 3, **FAST}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        synthesize(tmp_path / "a", prompts="effusion zebra", **arguments)
    assert [str(each.message) for each in caught] == ["words that the text encoder does not know: zebra"]
    long = "chest x ray pa no finding effusion ap"
    with pytest.raises(BadInputError, match=r"prompts: text .* 'effusion ap' would be cut.*--truncate_prompts"):
        synthesize(tmp_path / "b", prompts=long, **arguments)
    with pytest.warns(UserWarning, match="'effusion ap' is cut"):
        cut = synthesize(tmp_path / "b", prompts=long, truncate_prompts=True, **arguments)
    short = synthesize(tmp_path / "c", prompts=long.removesuffix(" effusion ap"), **arguments)
    assert [record.image_sha256 for record in cut] == [record.image_sha256 for record in short]
    assert cut[0].conditions["text"] == long


def test_a_number_far_from_the_training_scans_is_told_once(model_all: Path, tmp_path: Path) -> None:
    arguments = {"model": str(model_all), "label_source": "none", "num_samples": 2, **FAST}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        synthesize(tmp_path / "near", attributes={"age": 89}, **arguments)
        assert not caught
        synthesize(tmp_path / "far", attributes={"age": 400}, **arguments)
    (message,) = [str(each.message) for each in caught]
    assert message.startswith("attribute 'age': 400 is far from the training scans (mean 50, standard deviation 10)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": " "}, "prompts: expected a prompt, got an empty one"),
        ({"prompts": "zebra"}, "prompts: text 'zebra': expected words that the text encoder knows, got none"),
        ({"attributes": {"view": "lateral"}}, "attribute 'view': expected one of AP, PA, .* got 'lateral'"),
        ({"attributes": {"age": "old"}}, "attribute 'age': expected a finite number.* got 'old'"),
        ({"attributes": {"view": False}}, "attribute 'view': expected a word or a number, got False.*in quotes"),
        ({"attributes": {"sex": "F"}}, r"attribute 'sex': expected none, .*steered by mask, .*; not by sex"),
        ({"guidance_scale": {"sex": 2.0}}, r"guidance_scale: expected conditions among mask, .*, got sex"),
        ({"guidance_scale": {"mask": -1.0}}, "guidance_scale: expected a finite number"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval: expected two rising shares"),
        ({"guidance_rescale": 2.0}, "guidance_rescale: expected a share"),
        ({"edges": "scans", "edge_maps": "maps"}, "edges: expected scans .* got both"),
        ({"edges": "nothing"}, "nothing: expected a folder of scans, got none"),
        ({"edge_maps": "prompts"}, "prompts: expected edge maps .* got none"),
        ({"edges": "scans", "labels": "labels", "label_source": "deform"}, "'deform': expected no edges"),
        ({"label_source": "none", "labels": "labels"}, "'none': expected no label files, got 3"),
        (
            {"edges": "fewer", "labels": "labels"},
            r"case_1\.png: expected edges of the same name \(.*fewer.case_1\.\*\)",
        ),
        (
            {"edge_maps": "larger", "labels": "labels"},
            r"case_0\.png: expected shape \(12, 10\) as in .*, got \(14, 10\)",
        ),
        ({"edge_maps": "beyond"}, r"a\.nii\.gz: edge map: expected values from 0 to 1, got 0 to 255"),
        ({"edge_maps": "scans"}, r"case_0\.png: edge map: expected outlines of 0 and 1, .*got gray areas.*--edges"),
        ({"edge_maps": "ones"}, r"a\.png: edge map: expected values from 0 to 255 .*none above 1,.* by 255\."),
        ({"edge_maps": "eights"}, r"a\.png: edge map: expected values from 0 to 65535 .*none above 255,.* by 257\."),
        ({"edge_maps": "colors"}, r"a\.png: edge map: expected shape \(1, 12, 10\), got \(3, 12, 10\)"),
        ({"edge_maps": "volume"}, r"a\.nii\.gz: expected a 2D edge map for the model 'tiny-2d', got 3D"),
        ({"edges": "flat"}, r"a\.png: expected varying intensities, got the constant 7"),
        (
            {"conditions": "conditions.csv", "prompts": "pa", "edges": "scans"},
            "prompts, edges: expected none beside cond",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error_before_anything_is_written(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for name in ("fewer", "larger", "beyond", "ones", "eights", "colors", "volume", "flat", "prompts"):
        (tmp_path / name).mkdir()
    Image.open(folders_2d["edges"] / "case_0.png").save(tmp_path / "fewer" / "case_0.png")
    Image.fromarray(np.zeros((14, 10), dtype=np.uint8)).save(tmp_path / "larger" / "case_0.png")
    Image.fromarray(np.zeros((12, 10, 3), dtype=np.uint8)).save(tmp_path / "colors" / "a.png")
    Image.fromarray(np.full((12, 10), 7, dtype=np.uint8)).save(tmp_path / "flat" / "a.png")
    eights = np.zeros((12, 10, 1), dtype=np.uint8)
    eights[3] = 255
    Image.fromarray(eights[..., 0] // 255).save(tmp_path / "ones" / "a.png")
    Image.fromarray(eights[..., 0].astype(np.uint16)).save(tmp_path / "eights" / "a.png")
    nib.save(nib.Nifti1Image(eights, np.eye(4)), tmp_path / "beyond" / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), dtype=np.uint8), np.eye(4)), tmp_path / "volume" / "a.nii.gz")
    paths = {"labels", "edges", "edge_maps", "conditions"}
    given = {name: tmp_path / str(value) if name in paths else value for name, value in change.items()}
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model_all), **{"num_samples": 1, **FAST, **given})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["labels", "prompts", "edges", "edge_maps"])
def test_a_model_without_a_condition_says_what_it_listens_to(
    make_generator: Callable[..., Generator], folders_2d: dict[str, Path], tmp_path: Path, argument: str
) -> None:
    name = {"labels": "mask", "prompts": "text"}.get(argument, "edge")
    make_generator(2, conditions=("view",)).save_pretrained(tmp_path / "m")
    given = {argument: folders_2d.get(argument, "chest")}
    message = (
        f"{argument}: expected none, because the model 'tiny-2d' is steered by view; not by {name}.*--conditions view"
    )
    with pytest.raises(BadInputError, match=f"{message},{name}"):
        synthesize(tmp_path / "out", model=str(tmp_path / "m"), **given, **FAST)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["label,sex", "labels/case_0.png,F"], "expected columns among label, .*, age, code, spacing, got 'sex'"),
        (["text,prompt", "a,b"], "expected a column text or prompt, got both"),
        (["text"], "expected a header and at least one row, got no row"),
        (["label,text", "labels/case_0.png"], "line 2: expected 2 columns as in the header, got another number"),
        (["label", "labels/case_0.png", "labels/none.png"], r"line 3: .*none\.png: expected a file, got nothing there"),
        (["edge", "scans/none.png"], r"line 2: .*none\.png: expected a file, got nothing there"),
        (["edge,edge_map", "scans/case_0.png,maps/case_0.png"], "line 2: expected an edge or an edge_map, got both"),
        (["label,edge_map", "labels/case_0.png,larger.png"], r"line 2: .*larger\.png: expected shape \(12, 10\)"),
        (["edge_map", "maps/case_0.png;maps/case_1.png"], r"line 2: .*expected one edge map as .* got 2 file"),
        (["view", "lateral"], "attribute 'view': expected one of AP, PA"),
        (["text", '"unclosed'], "expected CSV in UTF-8, got an error"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_line(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path, rows: list[str], message: str
) -> None:
    Image.fromarray(np.zeros((14, 10), dtype=np.uint8)).save(tmp_path / "larger.png")
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model_all), conditions=table(tmp_path, *rows), **FAST)
    assert not (tmp_path / "out").exists()


def test_a_table_and_its_label_source(model_all: Path, folders_2d: dict[str, Path], tmp_path: Path) -> None:
    path = table(tmp_path, "label,edge,text", "labels/case_0.png,,pa", ",,ap")
    arguments = {"model": str(model_all), "conditions": path, **FAST}
    with pytest.raises(BadInputError, match="line 2: expected no label map with label_source 'generate'"):
        synthesize(tmp_path / "out", label_source="generate", **arguments)
    table(tmp_path, "label,edge,text", "labels/case_0.png,scans/case_0.png,pa")
    with pytest.raises(BadInputError, match="line 2: expected no edges beside a label map that is deformed"):
        synthesize(tmp_path / "out", label_source="deform", **arguments)
    table(tmp_path, "text,view", "pa,PA", "ap,")
    records = synthesize(tmp_path / "out", label_source="generate", **arguments)
    assert [record.label["source"] for record in records] == ["generate"] * 2
    with pytest.raises(BadInputError, match=r"absent\.csv: expected a CSV file of conditions, got none there"):
        synthesize(tmp_path / "b", model=str(model_all), conditions=tmp_path / "absent.csv", **FAST)


def test_what_is_bad_is_left_out_when_asked_and_no_path_is_told(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    def left_out(name: str, **arguments: object) -> tuple[list[SampleRecord], dict[str, str]]:
        records = synthesize(tmp_path / name, model=str(model_all), skip_bad=True, **arguments, **FAST)
        text = (tmp_path / name / "rejected.jsonl").read_text()
        assert str(tmp_path) not in text
        return records, {row["case"]: row["reason"] for row in map(json.loads, text.splitlines())}

    (folders_2d["edges"] / "case_1.png").write_bytes(b"no picture")
    (folders_2d["edges"] / "case_2.png").unlink()
    records, reasons = left_out("flags", labels=folders_2d["labels"], edges=folders_2d["edges"])
    assert [record.label["file"] for record in records] == ["case_0.png"]
    assert reasons.keys() == {"case_1", "case_2"}
    assert reasons["case_2"].startswith("case_2.png: expected edges of the same name (case_2.*)")
    path = table(tmp_path, "edge,text", "scans/case_1.png,", ",pa")
    records, reasons = left_out("table", conditions=path)
    assert [record.conditions for record in records] == [{"text": "pa"}]
    assert reasons.keys() == {"conditions.csv, line 2"}


def test_an_output_that_holds_any_input_is_refused(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path
) -> None:
    message = "expected {} outside of the output folder, got it inside"
    for name in ("edges", "edge_maps"):
        with pytest.raises(BadInputError, match=message.format(name)):
            synthesize(tmp_path, model=str(model_all), **{name: folders_2d[name]}, **FAST)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.txt").write_text("pa\n")
    with pytest.raises(BadInputError, match=message.format("prompts")):
        synthesize(tmp_path / "in", model=str(model_all), prompts=str(tmp_path / "in" / "p.txt"), **FAST)
    path = table(tmp_path, "edge", "scans/case_0.png")
    with pytest.raises(BadInputError, match=r"case_0\.png: expected conditions outside of the output folder"):
        synthesize(tmp_path / "scans", model=str(model_all), conditions=path, **FAST)


def test_a_replay_gives_the_same_scans_and_checks_every_file(
    model_all: Path, folders_2d: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["label,edge,edge_map,text,view", "labels/case_0.png,scans/case_0.png,,pa,PA", ",,maps/case_1.png,ap,"]
    path = table(tmp_path, *rows, ",,,no finding,AP", "labels/case_2.png,,,,", ",,,ap,PA")
    settings = {"guidance_scale": {"text": 3.0}, "guidance_interval": (0.0, 0.8), "guidance_rescale": 0.5, **FAST}
    synthesize(tmp_path / "a", model=str(model_all), conditions=path, **settings)
    manifest = tmp_path / "a" / "manifest.jsonl"
    again = {"model": str(model_all), "replay": manifest}
    with pytest.raises(BadInputError, match=r"the folder of its label maps \(labels/case_0\.png, \.\.\.\).*--labels"):
        synthesize(tmp_path / "b", **again, edges=tmp_path, edge_maps=tmp_path)
    with pytest.raises(BadInputError, match=r"the folder of its scans \(scans/case_0\.png.*--edges FOLDER"):
        synthesize(tmp_path / "b", **again, labels=tmp_path, edge_maps=tmp_path)
    with pytest.raises(BadInputError, match=r"the folder of its edge maps \(maps/case_1\.png.*--edge_maps FOLDER"):
        synthesize(tmp_path / "b", **again, labels=tmp_path, edges=tmp_path)
    # By their place below the table, or by their names alone.
    for folders in (dict.fromkeys(folders_2d, tmp_path), folders_2d):
        capsys.readouterr()
        synthesize(tmp_path / "b", overwrite=(tmp_path / "b").exists(), **again, **folders)
        assert "5 of 5 equal the replayed manifest voxel for voxel" in capsys.readouterr().out
    first, second = (read_manifest(tmp_path / name / "manifest.jsonl") for name in ("a", "b"))
    assert first == second
    assert all(np.array_equal(a, b) for a, b in zip(pictures(tmp_path / "a"), pictures(tmp_path / "b"), strict=True))
    Image.fromarray(np.zeros((12, 10), dtype=np.uint8)).save(folders_2d["edge_maps"] / "case_1.png")
    with pytest.raises(BadInputError, match=r"case_1\.png: expected the edge map that .* got another"):
        synthesize(tmp_path / "c", **again, **folders_2d)


def test_a_manifest_from_before_conditions_replays(
    make_generator: Callable[..., Generator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_generator(2).save_pretrained(tmp_path / "m")
    synthesize(tmp_path / "a", model=str(tmp_path / "m"), num_samples=2, **FAST)
    lines = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("conditions", "network_evaluations", "guidance_interval", "guidance_rescale"):
            del line[name]
        for member in line["batch"]:
            del member["conditions"]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_manifest(tmp_path / "old.jsonl")[0].network_evaluations is None
    synthesize(tmp_path / "b", model=str(tmp_path / "m"), replay=tmp_path / "old.jsonl")
    assert "2 of 2 equal the replayed manifest voxel for voxel" in capsys.readouterr().out
