from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data.dataset import read_dataset
from medgen.filtering import filter_pairs
from medgen.filtering.consistency import Segmenters
from medgen.filtering.reference import training_cases
from medgen.generator import Generator
from medgen.provenance import read_manifest, sha256_file
from medgen.segmentation import Pair
from medgen.synthesis import gated, synthesize
from medgen.trial import utility
from medgen.types import BadInputError

QUICK = {"num_inference_steps": 2, "device": "cpu", "precision": "fp32"}
SHAPE = (24, 20)


def _label(side: int) -> np.ndarray:
    """A box, the right half of it of another class."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3 : 3 + side, 3 : 3 + side] = 1
    label[3 : 3 + side, 3 + side // 2 : 3 + side] = 2
    return label


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def model(make_generator: Callable[..., Generator], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "tiny-2d"
    make_generator(2, shapes=(SHAPE,), size=(24, 24)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates of size and geometry, fitted on boxes of 7 to 10 pixels."""
    root = tmp_path_factory.mktemp("reference")
    for index in range(24):
        image = np.random.default_rng(index).integers(0, 255, SHAPE).astype(np.uint8)
        _save(root / "real" / "images" / f"r{index:02d}.png", image)
        _save(root / "real" / "labels" / f"r{index:02d}.png", _label(7 + index % 4))
    (root / "real" / "classes.json").write_text('{"0": "background", "1": "head", "2": "tail"}')
    (root / "copy").mkdir()
    for name in ("images", "labels", "classes.json"):
        (root / "copy" / name).symlink_to(root / "real" / name)
    filter_pairs(root / "copy", root / "real", root / "out", gates=["size", "geometry"])
    return root / "out_gates"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes of which every other one is too large or too small."""
    folder = tmp_path_factory.mktemp("labels") / "labels"
    for index, side in enumerate((8, 16, 9, 2, 8, 16)):
        _save(folder / f"box_{index}.png", _label(side))
    return folder


def _voxels(folder: Path) -> dict[str, tuple[str, str]]:
    return {r.case: (r.image_sha256, str(r.label_sha256)) for r in read_manifest(folder / "manifest.jsonl")}


@pytest.fixture(scope="module")
def accepted(model: Path, gates: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("accepted") / "out"
    records = synthesize(output, model=str(model), labels=labels, filter=gates, num_samples=6, **QUICK)
    assert len(records) == 6
    return output


def test_as_many_are_accepted_as_were_asked_for(accepted: Path) -> None:
    kept, thrown = (read_manifest(folder / "manifest.jsonl") for folder in (accepted, accepted / "rejected"))
    assert [record.index for record in kept] == [0, 2, 4, 6, 8, 10]
    assert [record.index for record in thrown] == [1, 3, 5, 7, 9]
    assert all(not record.gates["reasons"] for record in kept) and all(record.gates["reasons"] for record in thrown)
    for folder, records in ((accepted, kept), (accepted / "rejected", thrown)):
        dataset = read_dataset(folder)
        assert dataset.synthetic and len(dataset.cases) == len(records)
        files = {
            path.relative_to(folder).as_posix()
            for part in ("imagesTr", "labelsTr")
            for path in (folder / part).iterdir()
        }
        assert files == {name for record in records for name in record.files}
        assert all(sha256_file(folder / name) == sha for record in records for name, sha in record.files.items())
    report = json.loads((accepted / "gates.json").read_text())
    assert report["pairs"] == 11 and report["accepted"] == 6
    assert (accepted / "gates.png").is_file()


def test_a_sample_is_the_one_that_an_unfiltered_run_makes(
    accepted: Path, model: Path, labels: Path, tmp_path: Path
) -> None:
    synthesize(tmp_path / "all", model=str(model), labels=labels, num_samples=4, **QUICK)
    plain, made = _voxels(tmp_path / "all"), {**_voxels(accepted), **_voxels(accepted / "rejected")}
    assert all(made[case] == voxels for case, voxels in plain.items())


def test_two_processes_accept_the_same_samples(
    accepted: Path, model: Path, gates: Path, labels: Path, tmp_path: Path
) -> None:
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    options = {"output": tmp_path / "two", "model": model, "labels": labels, "filter": gates, "num_samples": 6, **QUICK}
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "-m", "medgen", "synthesize", *given]
    # The number of threads decides the rounding; the launcher would choose one of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert _voxels(tmp_path / "two") == _voxels(accepted)
    assert _voxels(tmp_path / "two" / "rejected") == _voxels(accepted / "rejected")


def test_an_interrupted_run_ends_with_the_same_samples(
    accepted: Path, model: Path, gates: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    settle = gated._settle

    def interrupt(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        settle(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gated, "_settle", interrupt)
        synthesize(tmp_path / "out", model=str(model), labels=labels, filter=gates, num_samples=6, **QUICK)
    assert (tmp_path / "out" / "manifest.jsonl").exists()
    synthesize(tmp_path / "out", model=str(model), labels=labels, filter=gates, num_samples=6, **QUICK)
    assert _voxels(tmp_path / "out") == _voxels(accepted)
    assert _voxels(tmp_path / "out" / "rejected") == _voxels(accepted / "rejected")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "imagesTr").iterdir()}
    synthesize(tmp_path / "out", model=str(model), labels=labels, filter=gates, num_samples=6, **QUICK)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "imagesTr").iterdir()}


def test_a_run_without_hope_stops_and_says_why(
    make_generator: Callable[..., Generator], gates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_generator(2, shapes=((12, 10),), size=(24, 24)).save_pretrained(tmp_path / "small")
    with pytest.raises(
        BadInputError,
        match=r"expected 2 accepted scans, got 0 of 20 drawn .*Failed: extent:rows 100%, extent:columns 100%",
    ):
        synthesize(tmp_path / "out", model=str(tmp_path / "small"), filter=gates, num_samples=2, **QUICK)
    assert "accepted 0 of 20 pairs" in capsys.readouterr().out
    assert len(read_dataset(tmp_path / "out" / "rejected").cases) == 20
    assert not list((tmp_path / "out" / "imagesTr").iterdir())


def test_hope_is_given_up_where_clopper_and_pearson_give_it_up() -> None:
    """No success in 59 draws is the classic bound of 5 % with 95 % confidence: 0.95 ** 59 < 0.05 < 0.95 ** 58."""
    assert gated._is_hopeless(0, 59) and not gated._is_hopeless(0, 58)
    assert not gated._is_hopeless(3, 60) and not gated._is_hopeless(0, 5)


def test_what_cannot_be_filtered_is_refused(
    make_generator: Callable[..., Generator], model: Path, gates: Path, tmp_path: Path
) -> None:
    def refuse(message: str, **more: object) -> None:
        values = {"model": str(model), "filter": gates, "num_samples": 2, **QUICK, **more}
        with pytest.raises(BadInputError, match=message):
            synthesize(tmp_path / "out", **values)
        assert not (tmp_path / "out").exists()

    refuse(r"num_samples: expected the number of scans to accept beside filter, got None", num_samples=None)
    refuse(r"expected scans with label maps, which the gates judge", label_source="none")
    make_generator(2, channels=3).save_pretrained(tmp_path / "colors")
    refuse(r"model tiny-2d: expected 1 channel\(s\) as in the reference .*got 3", model=str(tmp_path / "colors"))
    make_generator(3).save_pretrained(tmp_path / "volumes")
    refuse(r"model tiny-3d: expected 2D scans as in the reference .*got 3D", model=str(tmp_path / "volumes"))
    refuse(r"expected a folder of scans, got nothing there", filter=tmp_path / "absent")
    few = tmp_path / "few"
    for index in range(5):
        _save(few / "images" / f"r{index}.png", np.random.default_rng(index).integers(0, 255, SHAPE).astype(np.uint8))
        _save(few / "labels" / f"r{index}.png", _label(7 + index))
    (few / "classes.json").write_text('{"0": "background", "1": "head", "2": "tail"}')
    refuse(r"of at least 19 patients.*Such options are given to medgen filter", filter=few)


def test_gates_that_have_seen_the_test_scans_are_refused_by_a_comparison(
    model: Path, gates: Path, tmp_path: Path
) -> None:
    real = tmp_path / "real"
    shutil.copytree(gates.with_name("real"), real)
    for side in (8, 9):
        _save(tmp_path / "labels" / f"box_{side}.png", np.roll(_label(side), 1, axis=0))
    options = {"labels": tmp_path / "labels", "filter": tmp_path / "own_gates", "num_samples": 6, **QUICK}
    filter_pairs(gates.with_name("copy"), real, tmp_path / "own", gates=["size", "geometry"])
    synthesize(tmp_path / "made", model=str(model), **options)
    trial = {"synthetic": tmp_path / "made", "num_cases": (), "num_seeds": 2, "steps": 2, "device": "cpu"}
    for seed in (0, 5):  # all commands hold out the same scans
        assert utility(real, tmp_path / f"out_{seed}", seed=seed, **trial)["synthetic_scans"] == 6
    learned = training_cases(read_dataset(real))[0]
    (real / "val.txt").write_text("".join(f"{case.case}\n" for case in learned[:4]))
    with pytest.raises(BadInputError, match=r"fitted on 4 of these 4, such as r.*Name the test scans in val.txt"):
        utility(real, tmp_path / "out", **trial)


@pytest.fixture(scope="module")
def listening(make_generator: Callable[..., Generator], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as untrained as the others, whose scans show their label maps: it hears them louder."""
    generator = make_generator(2, shapes=(SHAPE,), size=(24, 24), name="listening")
    for weight in generator.denoiser.mask_embedding.parameters():
        weight.data *= 10
    folder = tmp_path_factory.mktemp("listening") / "model"
    generator.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(listening: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label maps, a scan of the model over each, and all gates, for which the even scans are patients."""
    root = tmp_path_factory.mktemp("learned")
    draw = np.random.default_rng(0)
    for index in range(42):
        label = np.zeros(SHAPE, dtype=np.uint8)
        height, width = draw.integers(8, 13), draw.integers(7, 11)
        top, left = draw.integers(1, 23 - height), draw.integers(1, 19 - width)
        label[top : top + height, left : left + width] = 1
        label[top : top + height, left + width // 2 : left + width] = 2
        _save(root / "labels" / f"box_{index:02d}.png", label)
    records = synthesize(root / "all", model=str(listening), labels=root / "labels", num_samples=42, **QUICK)
    for name in ("images", "labels"):
        (root / "real" / name).mkdir(parents=True)
    for record in records[::2]:
        name = f"box_{record.index:02d}.png"
        shutil.copy(root / "all" / "imagesTr" / f"{record.case}_0000.png", root / "real" / "images" / name)
        shutil.copy(root / "labels" / name, root / "real" / "labels" / name)
    (root / "real" / "classes.json").write_text('{"0": "background", "1": "head", "2": "tail"}')
    (root / "real" / "val.txt").write_text("box_40\n")
    filter_pairs(root / "all", root / "real", root / "out", steps=100, device="cpu")
    return root


def _reasons(folder: Path) -> dict[int, list[str]]:
    """Of each scan, accepted or not, by its place in the plan."""
    lists = [part / "manifest.jsonl" for part in (folder, folder / "rejected")]
    records = [record for path in lists for record in (read_manifest(path) if path.is_file() else [])]
    return {record.index: record.gates["reasons"] for record in sorted(records, key=lambda record: record.index)}


def test_all_gates_judge_what_is_drawn_and_copies_of_training_scans_are_thrown_out(
    listening: Path, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model draws its training scans again, voxel for voxel, and others in between."""
    asked = []
    agreement = Segmenters.agreement

    def watch(self: Segmenters, pair: Pair, patient: str | None = None) -> torch.Tensor:
        counts = agreement(self, pair, patient)
        asked.append((patient, len(counts)))
        return counts

    monkeypatch.setattr(Segmenters, "agreement", watch)
    gates, output = learned / "out_gates", tmp_path / "out"
    synthesize(output, model=str(listening), labels=learned / "labels", filter=gates, num_samples=6, **QUICK)
    reasons, judged = _reasons(output), _reasons(learned / "out")
    assert [index for index in reasons if not reasons[index]] == [index for index in judged if not judged[index]][:6]
    assert reasons == {index: judged[index] for index in range(len(reasons))}
    assert all(("copy" in found) == (index % 2 == 0) for index, found in reasons.items())
    for record in read_manifest(output / "manifest.jsonl"):
        assert record.gates["scores"].keys() >= {"consistency:head", "consistency:all classes", "outlier", "copy"}
    # A scan over the label map of a patient is shown to the one segmenter that has not seen it.
    drawn = {(f"case box_{index:02d}", 1) for index in reasons if index % 2 == 0} | {(None, 3)}
    assert drawn <= set(asked) <= drawn | {(f"case box_{index:02d}", 1) for index in range(0, 40, 2)}


def test_scans_that_do_not_show_their_labels_are_thrown_out(listening: Path, learned: Path, tmp_path: Path) -> None:
    """At a guidance scale of 0 the model does not hear of the label maps: boxes lie where it paints them by chance."""
    options = {"labels": learned / "labels", "filter": learned / "out_gates", "num_samples": 6, **QUICK}
    synthesize(tmp_path / "out", model=str(listening), guidance_scale=0.0, seed=1, **options)
    failed = [found for found in _reasons(tmp_path / "out").values() if found]
    assert failed and all("consistency:all classes" in found for found in failed)
    assert {code.partition(":")[0] for found in failed for code in found} <= {"consistency", "unseen_class"}
