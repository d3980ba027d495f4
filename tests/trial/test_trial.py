"""The whole comparison on small folders: what is learned from, what is kept, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.cli import main
from medgen.provenance import SampleRecord, sha256_file
from medgen.segmentation import CLASSICAL, UNCHANGED, Recipe
from medgen.trial import run, utility
from medgen.trial.arms import plan_arms, train_arm
from medgen.trial.material import load_material, material_digest
from medgen.trial.task import Classification, Segmentation
from medgen.types import BadInputError

CPU = torch.device("cpu")


def _write(root: Path, name: str, seed: int, size: int = 32) -> None:
    """A disk on a textured ground, brighter in its core."""
    draw = np.random.default_rng(seed)
    grid = np.indices((size, size)) - draw.uniform(size * 0.4, size * 0.6, (2, 1, 1))
    distance = np.sqrt((grid**2).sum(axis=0))
    label = (distance < size / 4).astype(np.uint8) + (distance < size / 8)
    image = (60 + 60 * label + draw.normal(0, 10, label.shape)).clip(1, 255).astype(np.uint8)
    for folder, array in (("images", image), ("labels", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / folder / f"{name}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten real scans of five training and eight test patients, two scans each, and twelve synthetic ones."""
    root = tmp_path_factory.mktemp("utility")
    real, synthetic = root / "real", root / "synthetic"
    rows = ["id,image,label,patient,split"]
    for index in range(26):
        _write(real, f"scan_{index}", index)
        part = "train" if index < 10 else "val"
        rows.append(f"scan_{index},images/scan_{index}.png,labels/scan_{index}.png,p{index // 2},{part}")
    (real / "metadata.csv").write_text("\n".join(rows) + "\n")
    for index in range(12):
        _write(synthetic, f"made_{index}", 100 + index)
    (synthetic / "labels" / "made_11.png").write_bytes((real / "labels" / "scan_20.png").read_bytes())
    return real, synthetic


def test_a_comparison_from_the_command_line_and_again(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synthetic = folders
    output = tmp_path / "utility"
    command = ["utility", "--real", str(real), "--synthetic", str(synthetic), "--output", str(output)]
    command += ["--num_cases", "2", "--num_seeds", "2", "--steps", "2", "--device", "cpu"]
    assert main(command) == 0
    result = json.loads((output / "utility.json").read_text())
    names = ["real", "classical", "duplicates", "synthetic_0.25", "synthetic_1", "pretrained", "synthetic_only"]
    assert list(result["arms"]) == names
    assert [arm["scans"] for arm in result["arms"].values()] == [10, 10, 20, 12, 20, 21, 11]
    assert (result["train_patients"], result["test_patients"], result["test_scans"]) == (5, 8, 16)
    tried = [arm for name, arm in result["arms"].items() if name not in ("real", "classical", "duplicates")]
    for than in ("minus_baseline", "minus_duplicates"):
        ps = sorted((arm[than]["p"], arm[than]["p_adjusted"]) for arm in tried)
        assert ps[0][1] == pytest.approx(min(1, 4 * ps[0][0]))  # the smallest of four (Holm 1979)
    assert result["curve"][0]["patients"] == 2
    assert result["curve"][0]["scans"] == 4
    assert any("1 synthetic scans have the label map of a test scan" in note for note in result["notes"])
    assert any("Not tried: 3 synthetic scans for each of the 10 real ones" in note for note in result["notes"])
    told = capsys.readouterr().out
    assert result["verdict"] in told
    assert result["verdict"] in (output / "utility.md").read_text()
    with Image.open(output / "curve.png") as picture:
        assert picture.width > 500
    assert len(list((output / "runs").iterdir())) == 2 * (len(names) + 1)

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    # A stop loses only the training that ran.
    next((output / "runs").glob("pretrained_*_1_*")).unlink()
    before = (output / "utility.json").read_text()
    (output / "utility.json").unlink()
    trained = []
    monkeypatch.setattr(run, "train_arm", lambda arm, *a, **k: trained.append(arm.name) or train_arm(arm, *a, **k))
    assert main(command) == 0
    assert trained == ["pretrained"]
    again = json.loads((output / "utility.json").read_text())
    assert again["arms"] == json.loads(before)["arms"]
    monkeypatch.setattr(run, "train_arm", not_again)
    assert main(command) == 0
    assert main([*command[:-4], "--steps", "3", "--device", "cpu"]) == 2
    assert "expected a folder without the results of other data or settings" in capsys.readouterr().err


def test_each_arm_learns_from_what_it_says(folders: tuple[Path, Path]) -> None:
    material = load_material(folders[0], folders[1], None, 0, CPU)
    learned: list[tuple[list[int], int, bool]] = []
    recipe = Recipe(9, 2, augmentation=CLASSICAL[2])

    class Watched(Segmentation):
        def learn(self, pairs, recipe, seed, name, start):
            learned.append(([id(pair) for pair in pairs], recipe.steps, recipe.augmentation.rotation > 0))
            return start

    task = Watched(("a", "b"), (32, 32), CPU)
    real, made = ({id(pair) for pair in part} for part in (material.train, material.synthetic))
    found = {}
    for arm in plan_arms([0.5, 1.0]):
        learned.clear()
        train_arm(arm, task, material.train, material.synthetic, recipe, 0)
        found[arm.name] = [
            (len(set(ids) & real), len(set(ids) & made), len(ids), steps, augmented)
            for ids, steps, augmented in learned
        ]
    assert found == {
        "real": [(10, 0, 10, 9, False)],
        "classical": [(10, 0, 10, 9, True)],
        "duplicates": [(10, 0, 20, 9, True)],
        "synthetic_0.5": [(10, 5, 15, 9, True)],
        "synthetic_1": [(10, 10, 20, 9, True)],
        "pretrained": [(0, 11, 11, 4, True), (10, 0, 10, 5, True)],
        "synthetic_only": [(0, 11, 11, 9, True)],
    }


def test_of_a_part_of_the_scans_each_seed_copies_others(folders: tuple[Path, Path]) -> None:
    material = load_material(folders[0], folders[1], None, 0, CPU)
    copied: list[list[int]] = []

    class Watched(Segmentation):
        def learn(self, pairs, recipe, seed, name, start):
            copied.append([id(pair) for pair in pairs[10:]])
            return start

    (arm,) = (arm for arm in plan_arms([0.3, 1.4]) if arm.copies)
    for seed in (0, 1, 0):
        train_arm(arm, Watched(("a", "b"), (32, 32), CPU), material.train, [], Recipe(9, 2), seed)
    every = [id(pair) for pair in material.train]
    assert [len(ids) for ids in copied] == [14, 14, 14]
    assert all(ids[:10] == every for ids in copied)
    assert copied[0] == copied[2]
    assert set(copied[0][10:]) != set(copied[1][10:])
    assert all(len(set(ids[10:])) == 4 for ids in copied)


def test_test_scans_that_are_training_scans_are_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    real = tmp_path / "real"
    shutil.copytree(folders[0], real)
    for train, test in ((3, 13), (3, 20)):  # with label maps of their own
        shutil.copy(real / "images" / f"scan_{train}.png", real / "images" / f"scan_{test}.png")
    material = load_material(real, None, None, 0, CPU)
    assert len(material.test) == len(material.test_groups) == 14
    assert material.test_groups == [f"p{index // 2}" for index in range(10, 26) if index not in (13, 20)]
    assert material.notes == ["2 test scans are training scans, voxel for voxel; nothing tested on them."]
    for test in range(10, 26):
        shutil.copy(real / "images" / "scan_0.png", real / "images" / f"scan_{test}.png")
    with pytest.raises(BadInputError, match=r"at least 3 test scans .*, got 0 beside 16 that are training scans too"):
        load_material(real, None, None, 0, CPU)


def test_synthetic_scans_made_from_test_scans_are_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    synthetic = tmp_path / "edited"
    shutil.copytree(folders[1], synthetic)
    source = folders[0] / "images" / "scan_12.png"
    record = {item.name: None for item in dataclasses.fields(SampleRecord)} | {
        "case": "made_3",
        "gates": {},
        "conditions": {"source": {"files": [{"file": "x.png", "sha256": sha256_file(source)}], "strength": 0.5}},
    }
    (synthetic / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    material = load_material(folders[0], synthetic, None, 0, CPU)
    assert len(material.synthetic) == 10
    assert any("1 synthetic scans were made from a test scan" in note for note in material.notes)
    # Deformed from the label map of a test scan: no voxel of it need be equal.
    record |= {"label": {"source": "deform", "sha256": sha256_file(folders[0] / "labels" / "scan_22.png")}}
    record |= {"conditions": {}}
    (synthetic / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    assert len(load_material(folders[0], synthetic, None, 0, CPU).synthetic) == 10


def test_a_damaged_report_of_the_gates_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    synthetic = tmp_path / "judged"
    shutil.copytree(folders[1], synthetic)
    for text in ("{", "[]", '{"fitted": 3}', "{}", '{"fitted": {}}'):
        (synthetic / "gates.json").write_text(text)
        with pytest.raises(BadInputError, match=r"gates.json: expected the report that medgen filter"):
            load_material(folders[0], synthetic, None, 0, CPU)
    (synthetic / "gates.json").unlink()
    assert len(load_material(folders[0], synthetic, None, 0, CPU).synthetic) == 11  # no gates judged
    record = {item.name: None for item in dataclasses.fields(SampleRecord)} | {"case": "made_3", "conditions": {}}
    (synthetic / "manifest.jsonl").write_text(json.dumps(record | {"gates": {"reasons": [], "scores": {}}}) + "\n")
    with pytest.raises(BadInputError, match=r"gates.json: expected the report of the gates .* got no such file"):
        load_material(folders[0], synthetic, None, 0, CPU)


def test_a_patient_in_training_and_test_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    real = tmp_path / "real"
    shutil.copytree(folders[0], real)
    rows = (real / "metadata.csv").read_text()
    (real / "metadata.csv").write_text(rows.replace("scan_21.png,p10,val", "scan_21.png,p0,val"))
    with (
        pytest.warns(UserWarning, match="in both parts"),
        pytest.raises(BadInputError, match="expected no patient in both training and test, got 1, such as p0"),
    ):
        load_material(real, None, None, 0, CPU)


def test_scores_are_kept_by_the_order_of_their_scans(folders: tuple[Path, Path]) -> None:
    material = load_material(folders[0], None, None, 0, CPU)
    assert material_digest(material.test) == material_digest(list(material.test))
    assert material_digest(material.test) != material_digest(list(reversed(material.test)))


def test_ten_steps_can_be_trained(folders: tuple[Path, Path]) -> None:
    material = load_material(folders[0], None, None, 0, CPU)
    arm = plan_arms([])[0]
    assert train_arm(arm, material.task, material.train, [], Recipe(10, 2), 0) is not None


def test_without_synthetic_scans_it_measures_the_room(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = utility(folders[0], tmp_path / "room", num_cases=(2, 3), num_seeds=2, steps=2, device="cpu")
    assert list(result["arms"]) == ["real", "classical"]
    assert [point["patients"] for point in result["curve"]] == [2, 3]
    assert result["verdict"].startswith("Without synthetic scans: Dice 0.")


def test_patients_of_the_curve_are_nested(folders: tuple[Path, Path]) -> None:
    material = load_material(folders[0], None, None, 0, CPU)
    few, more = ({id(pair) for pair in material.subset(count, 7)} for count in (2, 4))
    assert len(few) == 4
    assert few < more
    assert few != {id(pair) for pair in material.subset(2, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [3.0]}, r"ratios: expected above 0 and at most 1\.10.*got 3"),
        ({"ratios": [0.0]}, "ratios: expected above 0"),
        ({"num_seeds": 1}, "num_seeds: expected at least 2, got 1"),
        ({"steps": 1}, "steps: expected at least 2, got 1"),
        ({"num_cases": (0,)}, "num_cases: expected at least 1, got 0"),
        ({"synthetic": None, "ratios": [1.0]}, "expected none without synthetic scans"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, change: dict, message: str
) -> None:
    arguments = {"real": folders[0], "synthetic": folders[1], "output": tmp_path / "out", "device": "cpu", **change}
    with pytest.raises(BadInputError, match=message):
        utility(**arguments)
    assert not (tmp_path / "out" / "utility.json").exists()


def test_sets_that_do_not_fit_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for index in range(4):
        _write(tmp_path / "other", f"x_{index}", index)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "other" / "images" / f"x_{index}.png")
    with pytest.raises(BadInputError, match=r"expected channels 1 as in .*, got 3"):
        load_material(folders[0], tmp_path / "other", None, 0, CPU)
    real, made = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders)
    (real / "classes.json").write_text('{"background": 0, "shell": 1, "core": 2}')
    assert len(load_material(real, made, None, 0, CPU).synthetic) == 11  # numbers alone name nothing
    (made / "classes.json").write_text('{"background": 0, "core": 1, "shell": 2}')
    with pytest.raises(BadInputError, match=r"expected the classes of .* \(1 shell, 2 core\), got 1 core, 2 shell"):
        load_material(real, made, None, 0, CPU)
    (made / "classes.json").write_text('{"background": 0, "Shell": 1, "core": 2}')
    record = {item.name: None for item in dataclasses.fields(SampleRecord)} | {"case": "made_3", "conditions": {}}
    (made / "manifest.jsonl").write_text(json.dumps(record | {"gates": {"reasons": ["copy"]}}) + "\n")
    with pytest.raises(BadInputError, match=r"the gates accepted, got made_3, which they rejected \(copy\)"):
        load_material(real, made, None, 0, CPU)
    (made / "manifest.jsonl").write_text(json.dumps(record | {"gates": {"reasons": []}}) + "\n")
    (made / "gates.json").write_text('{"fitted": {"reference_cases": [], "reference_labels": []}}')
    assert len(load_material(real, made, None, 0, CPU).synthetic) == 11
    for index in range(2):
        _write(tmp_path / "few", f"x_{index}", 200 + index)
    with pytest.raises(BadInputError, match="expected at least 3 synthetic scans to learn from, got 2"):
        load_material(folders[0], tmp_path / "few", None, 0, CPU)


def test_a_classifier_learns_what_a_column_says(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = (folders[0] / "metadata.csv").read_text().splitlines()
    real = tmp_path / "real"
    shutil.copytree(folders[0], real)
    bright = [index % 4 == 0 for index in range(26)]
    table = [f"{row},{'bright' if lit else 'dark'}" for row, lit in zip(rows[1:], bright, strict=True)]
    (real / "metadata.csv").write_text("\n".join([f"{rows[0]},look", *table]) + "\n")
    for index, lit in enumerate(bright):
        if lit:  # inverted, since intensities are taken by the percentiles of the scan
            file = real / "images" / f"scan_{index}.png"
            Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    material = load_material(real, None, "look", 0, CPU)
    assert isinstance(material.task, Classification)
    assert material.task.classes == ("bright", "dark")
    network = material.task.learn(material.train, Recipe(60, 8, augmentation=UNCHANGED), 0, "real", None)
    scores = material.task.score(network, material.test)
    assert scores.nanmean(dim=0).tolist() == [1.0, 1.0]
    assert (~scores.isnan()).sum(dim=0).tolist() == [4, 12]
    result = utility(real, tmp_path / "out", target="look", num_cases=(), num_seeds=2, steps=2, device="cpu")
    assert result["metric"] == "balanced accuracy"
    made = shutil.copytree(folders[1], tmp_path / "made")
    rows_of_made = [f"made_{index},images/made_{index}.png,{'dark' if index < 11 else ''}" for index in range(12)]
    (made / "metadata.csv").write_text("\n".join(["id,image,look", *rows_of_made]) + "\n")
    options = {"synthetic": made, "target": "look", "num_cases": (), "num_seeds": 2, "steps": 40, "device": "cpu"}
    result = utility(real, tmp_path / "with", ratios=[1.0], **options)
    assert result["arms"]["synthetic_only"]["by_class"] == [0.0, 1.0]  # it has learned of dark ones alone
    assert result["arms"]["synthetic_1"]["by_class"] == [1.0, 1.0]
    assert result["arms"]["synthetic_only"]["scans"] == 11
    assert any("1 synthetic scans have no 'look'" in note for note in result["notes"])
    with pytest.raises(BadInputError, match=r"have no 'look'\)\. Say the 'look' of .*--attributes .*leave --target"):
        load_material(real, folders[1], "look", 0, CPU)
    with pytest.raises(BadInputError, match="expected at least 3 training scans with 'sex', got 0"):
        load_material(real, None, "sex", 0, CPU)
    odd = "\n".join([f"{rows[0]},look", *table]).replace("scan_20.png,p10,val,bright", "scan_20.png,p10,val,pale")
    (real / "metadata.csv").write_text(odd + "\n")
    with pytest.raises(BadInputError, match=r"case scan_20: expected 'look' to be one of bright, dark .*, got 'pale'"):
        load_material(real, None, "look", 0, CPU)
