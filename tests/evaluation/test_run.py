import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.data.case import Case
from medgen.data.dataset import load_case, read_dataset, split_cases
from medgen.data.export import write_case, write_dataset_json
from medgen.evaluation import evaluate, run, scans
from medgen.planning import DenoiserPlan, Plan
from medgen.training import train
from medgen.types import BadInputError, Grid

QUICK = {"image_size": 32, "num_pairs": 4, "slices_per_plane": 2, "device": "cpu"}


def _scan(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball on a textured ground, and its label."""
    draw = np.random.default_rng(seed)
    center = np.array(shape) / 2 + draw.uniform(-2, 2, len(shape))
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), center, strict=True)))
    label = (distance < min(shape) / 4).astype(np.int16)
    image = 60 + 80 * label + 25 * gaussian_filter(draw.standard_normal(shape), 0.8)
    return image.clip(0, 255).astype(np.float32), label


def _folder(
    root: Path, seeds: range, shape: tuple[int, ...], *, blur: float = 0, scale: float = 1, same_label: bool = False
) -> Path:
    """A synthetic set as ``medgen synthesize`` writes it."""
    grid = Grid(shape, np.eye(4), known=len(shape) == 3)
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    kind, ending = ("float32", ".nii.gz") if len(shape) == 3 else ("uint8", ".png")
    for seed in seeds:
        image, label = _scan(seed, shape)
        image = gaussian_filter(image, blur) * scale
        label = _scan(0, shape)[1] if same_label and seed % 2 else label
        scan = torch.from_numpy(image)[None]
        write_case(root, f"case_{seed:03d}", scan, torch.from_numpy(label), grid, image_dtype=kind)
    write_dataset_json(
        root, class_names={0: "background", 1: "ball"}, channel_names={0: "MR"}, num_training=len(seeds), ending=ending
    )
    return root


def _real(
    root: Path, seeds: range, shape: tuple[int, ...], *, split: bool = True, groups: dict[int, str] | None = None
) -> Path:
    """A real set with metadata.csv; every third scan is for validation."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    ending = ".nii.gz" if len(shape) == 3 else ".png"
    with open(root / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "label", "group", "split"])
        for seed in seeds:
            image, label = _scan(seed, shape)
            names = [f"{folder}/r{seed:03d}{ending}" for folder in ("images", "labels")]
            for name, array in zip(names, (image, label), strict=True):
                if ending == ".png":
                    Image.fromarray(array.astype(np.uint8)).save(root / name)
                else:
                    nib.save(nib.Nifti1Image(array, np.eye(4)), root / name)
            group = (groups or {}).get(seed, f"p{seed}")
            table.writerow([f"r{seed:03d}", *names, group, ("val" if seed % 3 == 0 else "train") if split else ""])
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _real(tmp_path_factory.mktemp("real") / "set", range(12), (32, 32))


@pytest.fixture(scope="module")
def real_volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _real(tmp_path_factory.mktemp("volumes") / "set", range(9), (24, 28, 26))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("synthetic") / "set", range(100, 106), (32, 32), same_label=True)


def test_writes_a_report_with_everything_needed_to_repeat_it(real: Path, synthetic: Path, tmp_path: Path) -> None:
    report = evaluate(real, synthetic, tmp_path / "report", **QUICK)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "cache",
        "index.html",
        "report.json",
        "report.tex",
    ]
    score = report["scores"]["frechet"]
    assert (report["real"]["train"], report["real"]["val"], report["synthetic"]["scans"]) == (8, 4, 6)
    assert (score["n_real"], score["n_synthetic"], score["d"]) == (4, 6, 1280)
    assert score["floor"] > 0
    assert score["floor_n"] == [4, 6]
    assert report["frd"]["frd-robust"]["columns"] + len(report["frd"]["frd-robust"]["dropped_columns"]) == 693
    assert report["frd"]["frd-robust"]["floor"]["value"] >= 0
    assert report["synthetic"]["marked_synthetic"] is True
    assert any("less than d = 1280" in warning for warning in score["warnings"])
    said = [*report["warnings"], *(warning for score in report["scores"].values() for warning in score["warnings"])]
    assert len([warning for warning in said if "Only 4 scans a side" in warning]) == 1
    assert any("need more than 5 scans a side, got 4" in warning for warning in report["warnings"])
    assert report["extractor"]["weights_sha256"].startswith("57934424")
    assert report["extractor"]["preprocessing"]["image_size"] == 32
    assert {"medgen", "torch", "numpy"} & set(report["runtime"]["versions"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image") >= 2 + len(report["memorization"]["pairs"])


def test_the_same_seed_gives_the_same_report_and_a_finished_report_is_kept(
    real: Path, synthetic: Path, tmp_path: Path
) -> None:
    first = evaluate(real, synthetic, tmp_path / "a", seed=3, **QUICK)
    with pytest.raises(BadInputError, match=r"pass --overwrite"):
        evaluate(real, synthetic, tmp_path / "a", seed=3, **QUICK)
    second = evaluate(real, synthetic, tmp_path / "a", seed=3, overwrite=True, **QUICK)  # out of the cache
    third = evaluate(real, synthetic, tmp_path / "b", seed=3, workers=1, **QUICK)
    for other in (second, third):
        assert {**other, "seconds": 0} == {**first, "seconds": 0}


def test_a_killed_run_goes_on_with_what_it_had_measured(
    real: Path, synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(real, synthetic, tmp_path / "whole", **QUICK)
    looked = []
    first_look = scans._first_look

    def stop_later(case: Case, *arguments: object) -> object:
        looked.append(case.case)
        if len(looked) == 8:
            raise KeyboardInterrupt
        return first_look(case, *arguments)

    monkeypatch.setattr(scans, "_first_look", stop_later)
    with pytest.raises(KeyboardInterrupt):
        evaluate(real, synthetic, tmp_path / "cut", workers=1, **QUICK)
    done = set(looked[:7])
    looked.extend([""] * 8)  # past the interruption
    resumed = evaluate(real, synthetic, tmp_path / "cut", workers=1, **QUICK)
    assert done.isdisjoint(looked[16:])
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}


def test_another_file_or_setting_is_not_taken_from_the_cache(real: Path, synthetic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(synthetic, folder)
    shared = {**QUICK, "cache": tmp_path / "cache"}
    first = evaluate(real, folder, tmp_path / "a", **shared)
    Image.fromarray(np.flipud(np.asarray(Image.open(folder / "imagesTr" / "case_101_0000.png")))).save(
        folder / "imagesTr" / "case_101_0000.png"
    )
    second = evaluate(real, folder, tmp_path / "b", **shared)
    third = evaluate(real, folder, tmp_path / "c", **{**shared, "image_size": 48})
    values = [report["scores"]["frechet"]["value"] for report in (first, second, third)]
    assert len(set(values)) == 3
    assert not (tmp_path / "a" / "cache").exists()


def test_planted_copies_are_found_and_named(real: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", range(100, 130), (32, 32))
    larger = _real(tmp_path / "real", range(40), (32, 32))
    for row, name in enumerate(("r001", "r005")):  # training scans, mirrored and brighter
        pixels = np.asarray(Image.open(larger / "images" / f"{name}.png")).astype(float)
        Image.fromarray((np.fliplr(pixels) * 0.8 + 20).astype(np.uint8)).save(
            folder / "imagesTr" / f"case_{110 + row}_0000.png"
        )
    shutil.copy(larger / "images" / "r003.png", folder / "imagesTr" / "case_112_0000.png")  # a held-out scan
    section = evaluate(larger, folder, tmp_path / "report", **QUICK)["memorization"]
    assert {"case_110", "case_111"} <= set(section["cases"])
    assert section["copies"] <= 3  # balls on noise are much alike
    assert "case_112" not in section["cases"]
    assert section["searched"] == 26
    apart = section["held_out"]
    assert (apart["searched"], apart["copies"]) == (14, len(apart["pairs"]))
    assert apart["expected_false_alarms"] == pytest.approx(0.005 * 30 * 14 / 26)
    assert {key: apart["pairs"][0][key] for key in ("synthetic", "real")} == {"synthetic": "case_112", "real": "r003"}
    assert apart["copies"] <= 2
    assert {(pair["synthetic"], pair["real"]) for pair in section["pairs"][:2]} == {
        ("case_110", "r001"),
        ("case_111", "r005"),
    }
    assert "mirrored left-right" in section["pairs"][0]["pose"]


def test_radiomic_features_of_the_label_alone(real: Path, synthetic: Path, tmp_path: Path) -> None:
    options = {**QUICK, "protocols": ["frd-v1", "frd-robust"], "region": "label"}
    report = evaluate(real, synthetic, tmp_path / "report", **options)
    assert list(report["frd"]) == ["frd-v1", "frd-robust"]
    assert report["frd"]["frd-v1"]["region"] == "labelled region"
    assert report["frd"]["frd-v1"]["n_real"] == report["frd"]["frd-v1"]["n_synthetic"] == 4
    with pytest.raises(BadInputError, match="protocols: expected some of frd-v0, frd-v1, frd-robust, got 'v2'"):
        evaluate(real, synthetic, tmp_path / "other", **{**options, "protocols": ["v2"]})


def test_scans_of_one_label_map_are_paired_with_each_other(real: Path, synthetic: Path, tmp_path: Path) -> None:
    similarity = evaluate(real, synthetic, tmp_path, **QUICK)["ms_ssim"]
    # Seeds 101, 103 and 105 share a label: three pairs.
    assert similarity["synthetic_one_label"]["labels"] == 1
    assert similarity["synthetic_one_label"]["pairs"] == 3
    assert similarity["scales"] == 2
    assert similarity["synthetic"]["minus_real"] == pytest.approx(
        similarity["synthetic"]["mean"] - similarity["real"]["mean"]
    )


def test_copies_of_one_scan_show_as_no_diversity(real: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", range(100, 103), (32, 32))
    for path in (folder / "imagesTr").iterdir():
        path.write_bytes((folder / "imagesTr" / "case_100_0000.png").read_bytes())
    similarity = evaluate(real, folder, tmp_path / "report", **QUICK)["ms_ssim"]
    assert similarity["synthetic"]["mean"] == pytest.approx(1, abs=1e-5)
    assert similarity["real"]["mean"] < 0.9


def test_volumes_of_another_unit_and_orientation_score_the_same(real_volumes: Path, tmp_path: Path) -> None:
    plain = _folder(tmp_path / "plain", range(100, 104), (24, 28, 26))
    other = _folder(tmp_path / "other", range(100, 104), (24, 28, 26), scale=1000)
    for path in sorted(other.glob("*/*.nii.gz")):
        image = nib.load(path)
        turned = image.as_reoriented(nib.orientations.axcodes2ornt(("L", "S", "P")))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)
    first, second = (
        evaluate(real_volumes, folder, tmp_path / f"report_{folder.name}", **QUICK) for folder in (plain, other)
    )
    assert first["extractor"]["views"] == ["sagittal", "coronal", "axial"]
    expected = first["scores"]["frechet"]["value"]
    assert second["scores"]["frechet"]["value"] == pytest.approx(expected, rel=1e-4)
    assert second["frd"]["frd-robust"]["value"] == pytest.approx(first["frd"]["frd-robust"]["value"], abs=1e-3)
    assert second["ms_ssim"]["synthetic"]["mean"] == pytest.approx(first["ms_ssim"]["synthetic"]["mean"], rel=1e-4)


def test_without_a_split_floors_come_from_halves_and_the_report_warns(synthetic: Path, tmp_path: Path) -> None:
    groups = {seed: f"p{seed % 8}" for seed in range(16)}
    folder = _real(tmp_path / "real", range(16), (32, 32), split=False, groups=groups)
    report = evaluate(folder, synthetic, tmp_path / "report", **QUICK)
    assert report["real"]["split"].startswith("no validation split")
    assert (report["real"]["train"], report["real"]["val"]) == (16, 16)
    assert report["real"]["patients"] == 8
    assert report["scores"]["frechet"]["floor_kind"].startswith("random halves")
    assert any("has learned from all of its scans" in warning for warning in report["warnings"])


def test_without_a_split_the_scans_that_training_holds_out_are_the_validation_set(
    synthetic: Path, tmp_path: Path
) -> None:
    folder = _real(tmp_path / "real", range(140), (32, 32), split=False)
    table = folder / "metadata.csv"
    rows = table.read_text().splitlines()
    # The last six have no label: training does not use them, and splits the others.
    rows[-6:] = [row.replace(f"labels/r{index}.png", "") for index, row in enumerate(rows[-6:], start=134)]
    table.write_text("\n".join(rows) + "\n")
    plan = Plan(
        name="tiny",
        spatial_dims=2,
        channel_names={0: "MR"},
        class_names={0: "background", 1: "class_1"},
        size=(32, 32),
        image_dtype="uint8",
        autoencoder=None,
        denoiser=DenoiserPlan(
            channels=(8, 8), attention_levels=(False, False), num_head_channels=8, mask_channels=4, variants=1
        ),
    )
    run = train(folder, tmp_path / "run", plan=plan, max_steps=1, seed=5, device="cpu")
    held_out = set(json.loads((run / "run.json").read_text())["data"]["validation scan"])
    report = evaluate(folder, synthetic, tmp_path / "report", seed=3, **QUICK)  # whatever the seed
    assert set(report["embedding"]["cases"]["real val"]) == held_out
    assert len(held_out) == report["real"]["val"] == 21
    assert report["real"]["train"] == 134 - 21
    assert report["real"]["split"] == "val as medgen train holds it out"
    assert not any("no validation split" in warning for warning in report["warnings"])


def test_refuses_sets_of_different_dimension(real: Path, real_volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"expected 2D scans as in .*, got 3D"):
        evaluate(real, real_volumes, tmp_path / "report", **QUICK)
    assert not (tmp_path / "report").exists()


def test_refuses_sets_of_different_channels(real: Path, tmp_path: Path) -> None:
    color = _real(tmp_path / "color", range(4), (32, 32))
    for path in (color / "images").iterdir():
        Image.merge("RGB", [Image.open(path)] * 2 + [Image.new("L", (32, 32), 9)]).save(path)
    with pytest.raises(BadInputError, match=r"expected 1 channel\(s\) as in .*, got 3"):
        evaluate(real, color, tmp_path / "report", **QUICK)


def test_a_constant_scan_is_refused_by_name_or_skipped_and_listed(real: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", range(100, 104), (32, 32))
    Image.new("L", (32, 32), 7).save(folder / "imagesTr" / "case_101_0000.png")
    speck = Image.new("L", (32, 32), 7)
    speck.putpixel((5, 5), 200)  # passes as a scan, but both percentiles are 7
    speck.save(folder / "imagesTr" / "case_102_0000.png")
    with pytest.raises(BadInputError, match=r"case_101.*Or leave out all .* --skip_bad"):
        evaluate(real, folder, tmp_path / "report", **QUICK)
    report = evaluate(real, folder, tmp_path / "report", skip_bad=True, **QUICK)
    assert report["synthetic"]["scans"] == 2
    assert [(item["set"], item["case"]) for item in report["rejected"]] == [
        ("synthetic", "case_101"),
        ("synthetic", "case_102"),
    ]
    assert "constant" in report["rejected"][0]["reason"]
    assert "expected varying intensities between percentiles" in report["rejected"][1]["reason"]
    assert str(tmp_path) not in (tmp_path / "report" / "report.json").read_text()
    assert report["synthetic"]["folder"] == "set"


def test_a_run_that_measured_nothing_leaves_no_folder_and_no_other_one_goes(
    real: Path, synthetic: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(real, folder)
    for path in (folder / "images").iterdir():
        Image.new("L", (32, 32), 7).save(path)
    with pytest.raises(BadInputError, match="constant"):
        evaluate(folder, synthetic, tmp_path / "new" / "report", **QUICK)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInputError, match="constant"):
        evaluate(folder, synthetic, tmp_path / "mine", **QUICK)
    assert (tmp_path / "mine").is_dir()


def test_classes_of_both_sets_are_compared_under_one_name(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    legends = []
    sheet = run.contact_sheet

    def noted(*arguments: Any, class_names: dict[int, str], **options: Any) -> Path:
        legends.append(class_names)
        return sheet(*arguments, class_names=class_names, **options)

    monkeypatch.setattr(run, "contact_sheet", noted)
    folder = _folder(tmp_path / "set", range(100, 106), (32, 32))
    two = tmp_path / "two"
    shutil.copytree(real, two)
    for path in (two / "labels").iterdir():
        label = np.asarray(Image.open(path)).copy()
        label[:3] = 2
        Image.fromarray(label).save(path)
    cache = tmp_path / "cache"
    first = evaluate(two, folder, tmp_path / "report", cache=cache, **QUICK)
    assert legends == [{0: "background", 1: "ball", 2: "class_2"}, {0: "background", 1: "ball"}]
    assert any(warning.startswith("No synthetic label map shows class_2") for warning in first["warnings"])
    assert f"before you publish: the page shows real scans, and {cache} holds small pictures" in capsys.readouterr().out
    again = evaluate(two, folder, tmp_path / "again", cache=cache, **QUICK)
    assert again["warnings"] == first["warnings"]  # also out of the cache


def test_refuses_a_single_scan_unknown_extractors_and_a_file_as_output(
    real: Path, synthetic: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="at least 2 usable synthetic scans, got 1"):
        evaluate(real, _folder(tmp_path / "one", range(100, 101), (32, 32)), tmp_path / "report", **QUICK)
    with pytest.raises(BadInputError, match="inception: expected a local weight file, got none"):
        evaluate(real, synthetic, tmp_path / "report", extractor="inception")
    with pytest.raises(BadInputError, match=r"feature: expected one of .*, got 'resnet'"):
        evaluate(real, synthetic, tmp_path / "report", extractor="resnet")
    with pytest.raises(BadInputError, match="num_pairs: expected at least 1, got 0"):
        evaluate(real, synthetic, tmp_path / "report", num_pairs=0)
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="got a file"):
        evaluate(real, synthetic, tmp_path / "file")


def test_an_output_that_cannot_be_made_or_would_be_lost_is_refused_before_any_scan_is_read(
    real: Path, synthetic: Path, tmp_path: Path
) -> None:
    broken = _folder(tmp_path / "set", range(100, 104), (32, 32))
    Image.new("L", (32, 32), 7).save(broken / "imagesTr" / "case_100_0000.png")  # would be the complaint if read
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match=r"file/x: expected a folder that can be made, got: Not a directory"):
        evaluate(real, broken, tmp_path / "file" / "x", **QUICK)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.tex").write_text("my own")
    with pytest.raises(BadInputError, match=r"got one with report\.tex\..*--overwrite"):
        evaluate(real, synthetic, tmp_path / "mine", **QUICK)
    assert (tmp_path / "mine" / "report.tex").read_text() == "my own"


def test_real_scans_lie_at_the_floor_and_blurred_ones_above_it(real_data: Path, tmp_path: Path) -> None:
    dataset = read_dataset(real_data / "cardiac_acdc")
    train, val = split_cases(dataset)
    real = tmp_path / "real"
    (real / "images").mkdir(parents=True)
    chosen = train[: 16 * 12 : 16] + val[::8]
    for case in chosen:
        (real / "images" / case.images[0].name).write_bytes(case.images[0].read_bytes())
    for name, cases in (("train.txt", train), ("val.txt", val)):
        (real / name).write_text("".join(f"{case.case}\n" for case in cases if case in chosen))
    ratios = []
    for blur in (0.0, 2.0):
        folder = tmp_path / f"blur_{blur}"
        (folder / "images").mkdir(parents=True)
        for case in train[8 : 16 * 12 : 16]:
            image = load_case(case, dataset).image
            pixels = gaussian_filter(image[0].numpy(), blur).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / case.images[0].name)
        report = evaluate(real, folder, tmp_path / f"report_{blur}", image_size=128, num_pairs=1)
        score, radiomic = report["scores"]["frechet"], report["frd"]["frd-robust"]
        ratios.append((score["value_at_floor_n"] / score["floor"], radiomic["value"], radiomic["p_value"]))
    assert ratios[0][0] < 1.3
    assert ratios[1][0] > ratios[0][0] + 0.15
    assert ratios[1][1] > ratios[0][1] + 1
    assert ratios[1][2] < 0.05
