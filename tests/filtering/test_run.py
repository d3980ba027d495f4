from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.cli import main
from medgen.data.dataset import load_case, read_dataset
from medgen.data.export import write_case, write_dataset_json
from medgen.filtering import filter_pairs, find_reference, run
from medgen.filtering.consistency import Segmenters
from medgen.provenance import SampleRecord, finalize_manifest, read_manifest, sha256_array, sha256_file
from medgen.segmentation import Pair
from medgen.types import BadInputError, Grid

CLASSES = {0: "background", 1: "shell", 2: "core"}


def scan(seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A bright core in a gray shell on a dark ground, uint8."""
    draw = np.random.default_rng(seed)
    rows, columns = np.indices((size, size))
    middle, edges = size / 2 + draw.uniform(-3, 3, 2), draw.uniform(7, 9, 2)
    distance = np.hypot((rows - middle[0]) / edges[0], (columns - middle[1]) / edges[1])
    label = np.where(distance < 0.55, 2, np.where(distance < 1, 1, 0)).astype(np.uint8)
    image = 60 + 50 * (label == 1) + 110 * (label == 2) + 8 * gaussian_filter(draw.standard_normal((size, size)), 0.7)
    return image.clip(0, 255).astype(np.uint8), label


def write_real(root: Path, seeds: Iterable[int], *, val: Iterable[int] = (), group: str = "p{}") -> Path:
    """A set with metadata.csv; its validation scans are given."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    (root / "classes.json").write_text('{"0": "background", "1": "shell", "2": "core"}')
    with open(root / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "label", "group", "split"])
        for seed in seeds:
            names = [f"{folder}/r{seed:03d}.png" for folder in ("images", "labels")]
            for name, array in zip(names, scan(seed), strict=True):
                Image.fromarray(array).save(root / name)
            patient = (f"v{seed}", "val") if seed in val else (group.format(seed), "train")
            table.writerow([f"r{seed:03d}", *names, *patient])
    return root


def write_made(
    root: Path, scans: dict[str, tuple[np.ndarray, np.ndarray]], sources: dict[str, dict] | None = None
) -> Path:
    """A set with a manifest, as ``medgen synthesize`` writes it; `sources` say which label files labels are from."""
    records = []
    for index, (case, (image, label)) in enumerate(scans.items()):
        for name in ("imagesTr", "labelsTr"):
            (root / name).mkdir(parents=True, exist_ok=True)
        grid = Grid(label.shape, np.eye(4), known=False)
        paths = write_case(
            root,
            case,
            torch.from_numpy(image)[None].float(),
            torch.from_numpy(label).short(),
            grid,
            image_dtype="uint8",
        )
        origin = {"source": "files", **sources[case]} if sources and case in sources else {"source": "generate"}
        records.append(
            SampleRecord(
                case=case,
                index=index,
                seed=index,
                model="tiny",
                model_hash="0" * 64,
                sampler="heun",
                sampler_spacing="default",
                num_inference_steps=2,
                guidance_scale=1.0,
                temperature=1.0,
                precision="fp32",
                max_memory_gb=None,
                label=origin,
                batch=[],
                shape=list(label.shape),
                spacing=[1.0, 1.0],
                model_shape=list(label.shape),
                image_sha256=sha256_array(image),
                label_sha256=sha256_array(label),
                files={path.relative_to(root).as_posix(): sha256_file(path) for path in paths.files},
                runtime={"device": "cpu", "threads": 1},
            )
        )
    finalize_manifest(root / "manifest.jsonl", records)
    write_dataset_json(
        root, class_names=CLASSES, channel_names={0: "MR"}, num_training=len(records), ending=".png", name="made"
    )
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real(tmp_path_factory.mktemp("filtering") / "real", range(28), val=range(24, 28))


STEPS = 100


def _spoiled(seed: int, fault: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = scan(seed)
    if fault == "missing":
        label = np.where(label == 2, 1, label).astype(np.uint8)
    elif fault == "faint":
        image = np.where(label == 2, image.astype(int) - 60, image).clip(0, 255).astype(np.uint8)
    elif fault == "shifted":
        label = np.roll(label, 7, axis=1)
    elif fault == "inverted":
        image = 255 - image
    elif fault == "large":
        image, label = np.pad(image, 8, mode="edge"), np.pad(label, 8)
    elif fault == "copied":
        image, label = scan(3)
        image, label = image[:, ::-1].copy(), label[:, ::-1].copy()
    return image, label


FAULTS = {
    "missing": "missing_class:core",
    "faint": "intensity_contrast:core",
    "shifted": "consistency:all classes",
    "inverted": "intensity_level:core",
    "large": "extent:rows",
    "copied": "copy",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scans = {f"good_{seed}": scan(seed) for seed in range(100, 108)}
    scans |= {fault: _spoiled(200, fault) for fault in FAULTS}
    return write_made(tmp_path_factory.mktemp("made") / "made", scans)


@pytest.fixture(scope="module")
def filtered(real: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("filtered") / "accepted"
    words = ["--input", made, "--reference", real, "--output", output, "--steps", STEPS]
    assert main(["filter", *map(str, words)]) == 0
    return output


def _reasons(folder: Path) -> dict[str, list[str]]:
    return {
        record.case: record.gates["reasons"]
        for part in (folder, folder / "rejected")
        for record in read_manifest(part / "manifest.jsonl")
    }


def test_faults_are_rejected_for_their_reason_and_good_pairs_accepted(filtered: Path) -> None:
    reasons = _reasons(filtered)
    for fault, reason in FAULTS.items():
        assert reason in reasons[fault], (fault, reasons[fault])
    assert sum(not reasons[f"good_{seed}"] for seed in range(100, 108)) >= 6
    assert {record.case for record in read_manifest(filtered / "manifest.jsonl")}.isdisjoint(FAULTS)


def test_both_folders_are_data_sets_with_the_files_of_the_input(filtered: Path, made: Path) -> None:
    for folder in (filtered, filtered / "rejected"):
        dataset = read_dataset(folder)
        assert dataset.synthetic and dataset.class_names == {0: "background", 1: "shell", 2: "core"}
        records = read_manifest(folder / "manifest.jsonl")
        assert [case.case for case in dataset.cases] == sorted(record.case for record in records)
        for record in records:
            for name, digest in record.files.items():
                assert sha256_file(folder / name) == digest == sha256_file(made / name)
            assert set(record.gates["scores"]) >= {"outlier", "copy", "volume:shell", "consistency:all classes"}
        load_case(dataset.cases[0], dataset)
    with Image.open(next((filtered / "imagesTr").iterdir())) as picture:
        assert "synthetic" in picture.text["Description"]


def test_the_report_counts_what_is_in_the_folders(filtered: Path) -> None:
    report = json.loads((filtered / "gates.json").read_text())
    reasons = _reasons(filtered)
    assert report["pairs"] == len(reasons) == 14
    assert report["accepted"] == sum(not found for found in reasons.values())
    assert report["reasons"]["copy"] == sum("copy" in found for found in reasons.values())
    fitted = report["fitted"]
    assert fitted["reference_scans"] == 24 and fitted["real_rejected_held_out"] <= 0.05
    assert fitted["tests"]["consistency:core"]["high"] is None and 0 < fitted["tests"]["consistency:core"]["low"] < 1
    with Image.open(filtered / "gates.png") as picture:
        assert picture.width == 1500


def test_the_same_command_judges_nothing_again(
    filtered: Path, real: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (filtered / "imagesTr").iterdir()}
    victim = next(iter(before))
    victim.unlink()
    report = filter_pairs(made, real, filtered, steps=STEPS)
    assert "13 of 14 pairs are judged already" in capsys.readouterr().out
    assert report["pairs"] == 14 and victim.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != victim)


def test_fitted_gates_give_the_same_verdicts_without_the_real_scans(filtered: Path, made: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(filtered.with_name("accepted_gates"), gates)
    filter_pairs(made, gates, tmp_path / "again")
    assert _reasons(tmp_path / "again") == _reasons(filtered)
    (gates / "segmenter_1.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"expected the whole of fitted gates"):
        filter_pairs(made, gates, tmp_path / "third")


def test_gates_stay_out_of_the_folder_that_is_shared(filtered: Path) -> None:
    assert not [path for path in filtered.rglob("*") if path.suffix == ".safetensors"]
    assert (filtered.with_name("accepted_gates") / "reference.safetensors").is_file()


def test_a_class_that_the_source_label_shows_is_missed(real: Path, filtered: Path, tmp_path: Path) -> None:
    """Cores are not in every reference label here; the manifest says that this one was asked for."""
    gates = tmp_path / "gates"
    shutil.copytree(filtered.with_name("accepted_gates"), gates)
    facts = json.loads((gates / "reference.json").read_text())
    facts["scans"][0]["classes"] = ["shell"]
    (gates / "reference.json").write_text(json.dumps(facts))
    digest = sha256_file(real / "labels" / "r025.png")  # of a validation scan: what was asked for is no fit
    sources = {
        "older": {"sha256": digest},
        "foreign": {"sha256": "0" * 64, "classes": [1, 2]},
        "shell": {"sha256": digest, "classes": [1]},
    }
    spoiled = _spoiled(201, "missing")
    made = write_made(tmp_path / "made", dict.fromkeys([*sources, "untold"], spoiled), sources)
    filter_pairs(made, gates, tmp_path / "out", gates=["geometry"])
    expected = {"older": ["missing_class:core"], "foreign": ["missing_class:core"], "shell": [], "untold": []}
    assert _reasons(tmp_path / "out") == expected


def test_over_a_reference_label_only_the_segmenter_judges_that_has_not_seen_it(
    real: Path, filtered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {name: {"sha256": sha256_file(real / "labels" / f"{name}.png")} for name in ("r004", "r025")}
    made = write_made(tmp_path / "made", {name: scan(int(name[1:])) for name in (*sources, "r300")}, sources)
    asked = []
    agreement = Segmenters.agreement

    def watch(self: Segmenters, pair: Pair, patient: str | None = None) -> torch.Tensor:
        counts = agreement(self, pair, patient)
        asked.append((patient, len(counts)))
        return counts

    monkeypatch.setattr(Segmenters, "agreement", watch)
    filter_pairs(made, filtered.with_name("accepted_gates"), tmp_path / "out")
    assert sorted(asked, key=str) == [("p4", 1), (None, 3), (None, 3)]  # r025 is of the validation split


def test_another_label_of_the_folder_makes_another_reference(real: Path, tmp_path: Path) -> None:
    copy = tmp_path / "real"
    shutil.copytree(real, copy)
    digests = [find_reference(copy, tmp_path / "out").digest]
    Image.fromarray(scan(99)[1]).save(copy / "labels" / "r025.png")
    assert find_reference(copy, tmp_path / "out").digest not in digests


def test_fitted_gates_that_do_not_say_with_what_are_refused(filtered: Path, made: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(filtered.with_name("accepted_gates"), gates)
    for content in (None, "{", '{"gates": ["size"]}'):
        (gates / "options.json").unlink(missing_ok=True)
        if content:
            (gates / "options.json").write_text(content)
        with pytest.raises(BadInputError, match=r"options\.json: expected the gates and the share .* Give both"):
            filter_pairs(made, gates, tmp_path / "out", gates=["geometry"])
    filter_pairs(made, gates, tmp_path / "out", gates=["geometry"], real_rejected=0.1)
    facts = json.loads((gates / "reference.json").read_text())
    (gates / "reference.json").write_text(json.dumps({key: facts[key] for key in facts if key != "digest"}))
    with pytest.raises(BadInputError, match=r"reference\.json: expected the facts of fitted gates, got .*'digest'"):
        filter_pairs(made, gates, tmp_path / "again")


def test_gates_measured_without_segmenters_cannot_judge_consistency(real: Path, made: Path, tmp_path: Path) -> None:
    filter_pairs(made, real, tmp_path / "out", gates=["size", "geometry"])
    with pytest.raises(BadInputError, match=r"expected a reference with segmenters for the gate consistency"):
        filter_pairs(made, tmp_path / "out_gates", tmp_path / "again", gates=["consistency"])
    shutil.rmtree(tmp_path / "out_gates")
    (tmp_path / "out_gates").mkdir()
    (tmp_path / "out_gates" / "notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadInputError, match=r"expected an empty folder for the gates.*--overwrite to replace them\.$"):
        filter_pairs(made, real, tmp_path / "out", gates=["size", "geometry"])
    shutil.rmtree(tmp_path / "out_gates")
    filter_pairs(made, real, tmp_path / "out", gates=["size", "geometry"])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadInputError, match=r"--overwrite to replace them; to use them, give --reference .*_gates"):
        filter_pairs(made, real, tmp_path / "out", gates=["size", "geometry"], seed=1)


def test_copies_are_not_searched_among_scans_that_are_copies(made: Path, tmp_path: Path) -> None:
    twins = write_real(tmp_path / "twins", range(21), val=[20])
    for seed in range(0, 20, 2):
        image = np.asarray(Image.open(twins / "images" / f"r{seed:03d}.png")).astype(int)
        image[0, 0] += 1
        Image.fromarray(image.astype(np.uint8)).save(twins / "images" / f"r{seed + 1:03d}.png")
    message = r"got some so alike that only copies of a correlation above (0\.99|1\.00).*`patient`"
    with pytest.raises(BadInputError, match=message):
        filter_pairs(made, twins, tmp_path / "out", gates=["size", "copy"])
    assert filter_pairs(made, twins, tmp_path / "other", gates=["size"])["pairs"] == 14


def test_five_patients_are_enough_for_a_larger_share(made: Path, tmp_path: Path) -> None:
    few = write_real(tmp_path / "few", range(6), val=[5])
    with pytest.raises(BadInputError, match=r"of at least 19 patients.*--real_rejected 0\.167"):
        filter_pairs(made, few, tmp_path / "out", gates=["size"])
    report = filter_pairs(made, few, tmp_path / "out", gates=["size"], real_rejected=0.167)
    assert report["fitted"]["reference_patients"] == 5


def test_a_folder_of_which_nothing_was_accepted_says_so(
    filtered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write_made(tmp_path / "odd", {"large": _spoiled(301, "large")})
    gates = filtered.with_name("accepted_gates")
    assert filter_pairs(odd, gates, tmp_path / "out", gates=["geometry"])["accepted"] == 0
    assert "Few are accepted: look at gates.png and rejected; train the model longer" in capsys.readouterr().out
    with pytest.raises(BadInputError, match=r"got none\. The gates accepted no pair: gates\.json and gates\.png"):
        read_dataset(tmp_path / "out")


def test_any_labelled_folder_is_filtered(real: Path, filtered: Path, tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / "plain" / name).mkdir(parents=True)
    for case, (image, label) in {"fine": scan(300), "odd": _spoiled(301, "large")}.items():
        Image.fromarray(image).save(tmp_path / "plain" / "images" / f"{case}.png")
        Image.fromarray(label).save(tmp_path / "plain" / "labels" / f"{case}.png")
    Image.new("L", (32, 32), 7).save(tmp_path / "plain" / "images" / "constant.png")
    Image.fromarray(scan(1)[1]).save(tmp_path / "plain" / "labels" / "constant.png")
    report = filter_pairs(
        tmp_path / "plain", filtered.with_name("accepted_gates"), tmp_path / "out", gates=["geometry"]
    )
    assert report["accepted"] == 1 and not read_dataset(tmp_path / "out").synthetic
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected" / "scores.jsonl").read_text().splitlines()]
    reasons = {line["case"]: line["gates"]["reasons"] for line in lines}
    assert reasons["odd"] == ["extent:rows", "extent:columns"]
    assert reasons["constant"] == ["unreadable"]
    told = next(line["gates"]["message"] for line in lines if line["case"] == "constant")
    assert told.startswith("images/constant.png: expected an image with contrast")


def test_arguments_and_sets_that_cannot_be_used_are_refused(real: Path, made: Path, tmp_path: Path) -> None:
    def refuse(message: str, input: Path = made, reference: Path = real, **more: object) -> None:
        with pytest.raises(BadInputError, match=message):
            filter_pairs(input, reference, tmp_path / "out", **more)
        assert not (tmp_path / "out" / "run.json").exists()

    refuse(r"gates: expected some of consistency, .*got sharpness", gates=["sharpness"])
    refuse(r"steps: expected at least 1, got 0", steps=0)
    refuse(r"at least 19 patients.*got 6", reference=write_real(tmp_path / "few", range(7), val=[6]))
    refuse(
        r"at least 24 patients.*got 1\b",
        reference=write_real(tmp_path / "one", range(25), val=[24], group="p"),
        real_rejected=0.04,
    )
    bare = write_real(tmp_path / "bare", range(21), val=[20])
    text = (bare / "metadata.csv").read_text().replace(",labels/", ",").replace(".png,p", ".png,p")
    rows = [line.split(",") for line in text.splitlines()]
    (bare / "metadata.csv").write_text("\n".join(",".join([*row[:2], *row[3:]]) for row in rows) + "\n")
    refuse(r"expected labelled scans as a reference, got 20 training scans without", reference=bare)
    other = write_real(tmp_path / "other", range(20))
    (other / "classes.json").write_text('{"0": "background", "1": "core", "2": "shell"}')
    refuse(r"expected the classes of the reference .*\(1 core, 2 shell\), got 1 shell, 2 core", reference=other)
    with pytest.raises(BadInputError, match=r"expected an output folder apart from the input"):
        filter_pairs(made, real, made / "out")


def test_damage_is_refused(real: Path, made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    record = read_manifest(broken / "manifest.jsonl")[0]
    name = next(iter(record.files))
    (broken / name).write_bytes((made / "imagesTr" / "shifted_0000.png").read_bytes())
    with pytest.raises(
        BadInputError, match=r"expected the file that manifest\.jsonl lists, got one with other content"
    ):
        filter_pairs(broken, real, tmp_path / "out")
    (broken / name).unlink()
    with pytest.raises(BadInputError, match=r"expected a file, got none|expected channel 0"):
        filter_pairs(broken, real, tmp_path / "out")
    shutil.copy(made / name, broken / name)
    (broken / "manifest.jsonl").write_text('{"case": 1}\n')
    with pytest.raises(BadInputError, match=r"line 1: expected a sample record"):
        filter_pairs(broken, real, tmp_path / "out")
    lines = (made / "manifest.jsonl").read_text().splitlines(keepends=True)
    (broken / "manifest.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(BadInputError, match=r"expected a record of every case, got none of good_100 \(1 in all\)"):
        filter_pairs(broken, real, tmp_path / "out")


def test_another_runs_folder_is_kept_without_overwrite(filtered: Path, made: Path, tmp_path: Path) -> None:
    gates = filtered.with_name("accepted_gates")
    filter_pairs(made, gates, tmp_path / "out", gates=["geometry"])
    with pytest.raises(BadInputError, match=r"got another run \(gates: \['geometry'\] there"):
        filter_pairs(made, gates, tmp_path / "out", gates=["size"])
    assert (tmp_path / "out" / "rejected").is_dir()
    filter_pairs(made, gates, tmp_path / "out", gates=["size"], overwrite=True)
    assert "size" in json.loads((tmp_path / "out" / "gates.json").read_text())["fitted"]["gates"]


def test_a_class_in_too_few_scans_is_refused_before_anything_is_trained(tmp_path: Path, made: Path) -> None:
    rare = write_real(tmp_path / "rare", range(21), val=[20])
    for seed in range(4, 20):
        label = scan(seed)[1]
        Image.fromarray(np.where(label == 2, 1, label).astype(np.uint8)).save(rare / "labels" / f"r{seed:03d}.png")
    with pytest.raises(BadInputError, match=r"expected class core in at least 4 scans beside those .* got it in 3"):
        filter_pairs(made, rare, tmp_path / "out")
    assert not list((tmp_path / "out_gates").glob("segmenter_*"))


def test_interrupted_training_goes_on_with_the_missing_fold(
    filtered: Path, real: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(filtered.with_name("accepted_gates"), tmp_path / "out_gates")
    first = (tmp_path / "out_gates" / "segmenter_0.safetensors").stat().st_mtime_ns
    (tmp_path / "out_gates" / "segmenter_2.safetensors").write_bytes(b"torn")
    (tmp_path / "out_gates" / "reference.json").unlink()
    monkeypatch.setattr(run, "judge_cases", _stop)
    with pytest.raises(KeyboardInterrupt):
        filter_pairs(made, real, tmp_path / "out", steps=STEPS)
    assert not list((tmp_path / "out").iterdir())  # nothing is judged yet, and another run may have it
    again = tmp_path / "out_gates"
    assert (again / "segmenter_0.safetensors").stat().st_mtime_ns == first
    whole = filtered.with_name("accepted_gates") / "segmenter_2.safetensors"
    assert sha256_file(again / "segmenter_2.safetensors") == sha256_file(whole)


def _stop(*arguments: object) -> None:
    raise KeyboardInterrupt
