"""Label maps drawn by how rare their sizes are, and scans led towards rare looks: weights, records and replays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.spatial import cKDTree

from medgen.generator import Generator
from medgen.provenance import SampleRecord, read_manifest
from medgen.synthesis import SourceFile, synthesize
from medgen.synthesis.rare import MOST, draw_by_weight, rare_weights
from medgen.types import BadInputError

FAST = {"num_inference_steps": 3, "precision": "fp32", "device": "cpu"}
SIZES = [(20, 12), (21, 13), (22, 12), (20, 14), (21, 11), (22, 15), (23, 13), (24, 14), (6, 50)]


def write_maps(folder: Path, sizes: list[tuple[int, int]]) -> list[SourceFile]:
    """Label maps in which class 1 and class 2 have these numbers of pixels."""
    folder.mkdir()
    for index, (head, tail) in enumerate(sizes):
        flat = np.zeros(120, dtype=np.uint8)
        flat[:head], flat[120 - tail :] = 1, 2
        Image.fromarray(flat.reshape(12, 10)).save(folder / f"case_{index:02}.png")
    return [SourceFile(path, "") for path in sorted(folder.iterdir())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_maps(tmp_path / "labels", SIZES)
    return tmp_path / "labels"


def counts(records: list[SampleRecord]) -> dict[str, int]:
    files = [record.label["file"] for record in records]
    return {name: files.count(name) for name in sorted(set(files))}


def test_weights_are_inverse_densities_of_sizes(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    found = rare_weights(write_maps(tmp_path / "labels", SIZES), make_generator(2))
    logs = np.log(SIZES)
    points = (logs - logs.mean(axis=0)) / logs.std(axis=0)
    distance = cKDTree(points).query(points, 6)[0][:, 5]
    np.testing.assert_allclose(found, np.minimum((distance / np.median(distance)) ** 2, MOST), rtol=1e-6)
    assert found[-1] == MOST


def test_a_class_that_few_maps_show_makes_them_rare(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    sizes = [*[(20 + index % 4, 10 + index % 3) for index in range(12)], (21, 0)]
    weights = rare_weights(write_maps(tmp_path / "labels", sizes), make_generator(2))
    assert weights.index(max(weights)) == 12


def test_draws_come_as_often_as_their_weights_ask() -> None:
    weights = [1.0, 0.5, 6.0, 2.5]
    drawn = draw_by_weight(weights, 400, seed=3)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 400, np.array(weights) / 10, atol=0.01)
    assert draw_by_weight(weights, 7, seed=3) == drawn[:7]
    assert len({tuple(draw_by_weight(weights, 12, seed=seed)) for seed in range(5)}) > 1


def test_rare_maps_are_drawn_more_often_and_it_is_said(
    model_all: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"model": str(model_all), "labels": folder, "label_sampling": "rare", "batch_size": 9, **FAST}
    records = synthesize(tmp_path / "a", **run, num_samples=9)
    rare = counts(records)
    assert rare["case_08.png"] == max(rare.values()) >= 3
    assert f"label maps: {len(rare)} of 9, those of rare sizes more often" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "a" / "synthesize.yaml").read_text())["label_sampling"] == "rare"
    with pytest.raises(BadInputError, match="label_sampling"):  # another run
        synthesize(tmp_path / "a", **{**run, "label_sampling": "in_turn"}, num_samples=9)
    again = synthesize(
        tmp_path / "b", model=str(model_all), labels=folder, replay=tmp_path / "a" / "manifest.jsonl", device="cpu"
    )
    assert [record.image_sha256 for record in again] == [record.image_sha256 for record in records]


def test_minority_guidance_is_recorded_counted_and_replayed(model_all: Path, folder: Path, tmp_path: Path) -> None:
    run = {"model": str(model_all), "labels": folder, "num_samples": 3, "guidance_scale": 1.5, **FAST}
    plain = synthesize(tmp_path / "plain", **run)
    led = synthesize(tmp_path / "led", **run, minority_scale=0.8, batch_size=3)
    alone = synthesize(tmp_path / "alone", **run, minority_scale=0.8, batch_size=1)
    assert [record.minority_scale for record in (plain[0], led[0])] == [0.0, 0.8]
    assert [record.network_evaluations for record in (plain[0], led[0])] == [2 * 3, 2 * 4]
    pictures = [
        np.stack([np.asarray(Image.open(path)).astype(float) for path in sorted((tmp_path / name).glob("imagesTr/*"))])
        for name in ("plain", "led", "alone")
    ]
    assert np.abs(pictures[1] - pictures[0]).mean() > 1
    np.testing.assert_allclose(pictures[1], pictures[2], atol=1)  # each from its own seed, whatever the batch
    again = synthesize(tmp_path / "again", model=str(model_all), labels=folder, replay=tmp_path / "led/manifest.jsonl")
    assert [record.image_sha256 for record in again] == [record.image_sha256 for record in led]
    assert len(alone) == 3


def test_a_record_from_before_is_read_as_without_it(model_all: Path, folder: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", model=str(model_all), labels=folder, num_samples=1, **FAST)
    line = json.loads((tmp_path / "a" / "manifest.jsonl").read_text())
    del line["minority_scale"]
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    assert read_manifest(tmp_path / "old.jsonl")[0].minority_scale == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, r"expected label maps to choose from, got label maps that are generated.*--labels FOLDER"),
        ({"labels": None, "label_source": "none"}, r"expected label maps to choose from, got .* that are absent"),
        ({"labels": None, "conditions": "table.csv"}, r"expected no conditions, whose rows name the label map"),
        ({"label_sampling": "often"}, r"label_sampling: expected 'in_turn' or 'rare', got 'often'"),
        ({"minority_scale": -1.0}, r"minority_scale: expected a finite number of 0 or more, got -1\.0"),
        ({"minority_scale": float("nan")}, r"minority_scale: expected a finite number of 0 or more, got nan"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    model_all: Path, folder: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    run = {"model": str(model_all), "labels": folder, "label_sampling": "rare", **FAST, **arguments}
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", **run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SIZES[:5], r"label_sampling 'rare': expected 6 or more label maps, .* got 5"),
        ([(20, 10)] * 9, r"label_sampling 'rare': expected label maps that differ in the sizes .* most of them alike"),
    ],
)
def test_maps_by_which_rare_ones_cannot_be_told_are_refused(
    make_generator: Callable[..., Generator], tmp_path: Path, sizes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        rare_weights(write_maps(tmp_path / "labels", sizes), make_generator(2))


def test_volumes_in_mm_count_where_all_maps_say_how_large_a_voxel_is(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    import nibabel as nib

    folder = tmp_path / "labels"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(8):
        array = np.zeros((8, 8, 8), dtype=np.uint8)
        array.flat[: 40 + int(torch.randint(20, (1,), generator=generator))] = 1
        array.flat[400 : 430 + index % 3] = 2
        edge = 1.5 if index == 7 else 1.0  # 3.4 times the volume, about as many voxels
        nib.save(nib.Nifti1Image(array, np.diag([edge, edge, edge, 1])), folder / f"case_{index}.nii.gz")
    weights = rare_weights([SourceFile(path, "") for path in sorted(folder.iterdir())], make_generator(3))
    assert weights.index(max(weights)) == 7
