from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image

from medgen.cli import main
from medgen.data.io import read_label
from medgen.generator import Generator
from medgen.test_time.run import RECORDS, predict
from medgen.types import BadInputError

SHAPE = (12, 10, 14)
QUICK = {"num_views": 2, "device": "cpu", "precision": "fp32"}
UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2], "norm": "instance"}


class Bright(torch.nn.Module):
    """Class 1 above 0.4, class 2 above 0.7, whatever the dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 40 * torch.cat([0.2 - x, 0.35 - (x - 0.55).abs() - 0.15, x - 0.7], dim=1)


def volume(seed: int) -> np.ndarray:
    axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    noise = np.random.default_rng(seed).normal(0, 10, SHAPE)
    return (100 + 900 * np.exp(-2 * ((axes - 0.1 * seed) ** 2).sum(0)) + noise).astype(np.int16)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])  # stored LPS
    for seed in range(2):
        nib.save(nib.Nifti1Image(volume(seed), affine), folder / f"case_{seed}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def model(make_generator: Callable[..., Generator], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-3d"
    make_generator(3).save_pretrained(folder)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "seg.ts"
    torch.jit.script(Bright()).save(str(path))
    return path


def _wrong(found: Path, wanted: np.ndarray) -> float:
    label, _ = read_label(found)
    return float((label.numpy() != wanted).mean())


def _expected(seed: int) -> np.ndarray:
    values = volume(seed).astype(float)
    low, high = np.percentile(values, [0.5, 99.5])
    unit = torch.from_numpy(np.clip((values - low) / (high - low), 0, 1)).float()
    return Bright()(unit[None, None])[0].argmax(0).numpy()


def test_the_command_writes_labels_uncertainty_lines_and_pictures(
    model: Path, script: Path, scans: Path, tmp_path: Path
) -> None:
    output = tmp_path / "predictions"
    command = f"predict --model {model} --segmenter {script} --input {scans} --output {output} --intensities unit"
    quick = " --num_views 2 --device cpu --precision fp32 --strength 0.05 --geometric [0,1,2]"
    assert main((command + quick).split()) == 0
    lines = [json.loads(line) for line in (output / RECORDS).read_text().splitlines()]
    assert [line["case"] for line in lines] == ["case_0", "case_1"]
    for seed, line in enumerate(lines):
        assert set(line["files"]) == {
            f"labels/case_{seed}.nii.gz",
            *(f"uncertainty/case_{seed}_{kind}.nii.gz" for kind in ("entropy", "mutual_information")),
        }
        for name in line["files"]:
            written, source = nib.load(output / name), nib.load(scans / f"case_{seed}.nii.gz")
            np.testing.assert_allclose(written.affine, source.affine)
            assert written.shape == SHAPE
        assert _wrong(output / f"labels/case_{seed}.nii.gz", _expected(seed)) < 0.1
        label = nib.load(output / f"labels/case_{seed}.nii.gz").get_fdata()
        assert line["volumes"] == pytest.approx([1.5 * (label == k).sum() for k in (1, 2)]) and line["unit"] == "mm3"
        assert line["evaluations"] == 15 and line["segmentations"] == 10 and not line["fallback"]
    assert Image.open(output / "predictions.png").size[0] > 300
    # The same command finds it done; another setting is refused, or replaces it.
    before = (output / RECORDS).read_bytes()
    assert main((command + quick).split()) == 0 and (output / RECORDS).read_bytes() == before
    assert main([*(command + quick).split(), "--seed", "1"]) == 2
    assert main([*(command + quick).split(), "--seed", "1", "--overwrite"]) == 0
    assert len((output / RECORDS).read_text().splitlines()) == 2


@pytest.mark.parametrize(("said", "axes"), [("true", 3), ("True", 3), ("false", 0), ("[0]", 1), ("0,2", 2)])
def test_mirror_axes_as_the_help_says_them(
    said: str, axes: int, model: Path, script: Path, scans: Path, tmp_path: Path
) -> None:
    (scans / "case_1.nii.gz").unlink()
    command = f"predict --model {model} --segmenter {script} --input {scans} --output {tmp_path / 'out'}"
    assert main(f"{command} --intensities unit --num_views 1 --device cpu --geometric {said}".split()) == 0
    line = json.loads((tmp_path / "out" / RECORDS).read_text())
    assert line["segmentations"] == 2**axes + 1


def test_the_last_words_say_what_was_not_as_asked_for(
    model: Path, script: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(str(model), script, scans, tmp_path / "all", intensities="unit", **QUICK)
    assert capsys.readouterr().out.strip() == f"2 predictions in {tmp_path / 'all'}"
    predict(str(model), script, scans, tmp_path / "few", intensities="unit", max_evaluations=1, **QUICK)
    assert "2 of them by geometric views alone: 1 evaluations allow no view" in capsys.readouterr().out


def test_a_run_without_any_prediction_does_not_stand_in_the_way(model: Path, scans: Path, tmp_path: Path) -> None:
    path, odd = tmp_path / "unet.ts", nib.Nifti1Image(volume(0)[:11], np.eye(4))
    nib.save(odd, scans / "a_odd.nii.gz")
    torch.jit.script(UNet(3, 1, 3, (4, 8), (2,))).save(str(path))
    with pytest.raises(BadInputError, match=r"keeps the grid, or an inferer.* --patch_size"):
        predict(str(model), path, scans, tmp_path / "out", **QUICK)
    found = predict(str(model), path, scans, tmp_path / "out", patch_size=[8, 8, 8], **QUICK)
    assert len(found) == 3
    with pytest.raises(BadInputError, match="predictions of another model, segmenter or settings"):
        predict(str(model), path, scans, tmp_path / "out", patch_size=[8, 8, 8], seed=1, **QUICK)


@pytest.mark.parametrize(("dims", "channels"), [(2, 1), (3, 2)])
def test_segmenters_of_another_dimension_or_channel_count_are_refused(
    dims: int, channels: int, model: Path, scans: Path, tmp_path: Path
) -> None:
    path = tmp_path / "unet.ts"
    torch.jit.script(UNet(dims, channels, 3, (4, 8), (2,))).save(str(path))
    with pytest.raises(BadInputError, match=r"takes inputs of shape \(1, 1, 12, 10, 14\).*channels and dimensions"):
        predict(str(model), path, scans, tmp_path / "out", **QUICK)


def test_an_interrupted_run_goes_on(model: Path, script: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions"
    whole = predict(str(model), script, scans, output, intensities="unit", **QUICK)
    text = (output / RECORDS).read_text().splitlines()
    (output / RECORDS).write_text(text[0] + "\n" + text[1][:20])
    again = predict(str(model), script, scans, output, intensities="unit", **QUICK)
    stored = [json.loads(line) for line in (output / RECORDS).read_text().splitlines()]
    assert stored == again and len(stored) == 2
    plain = [{key: value for key, value in line.items() if key != "seconds"} for line in again]
    assert plain == [{key: value for key, value in line.items() if key != "seconds"} for line in whole]


def test_volumes_are_turned_for_the_segmenter_and_back(model: Path, scans: Path, tmp_path: Path) -> None:
    """A segmenter that calls the right side class 1, in RAS order: in a file stored LPS that is the low end."""

    class RightSide(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1, 1).expand_as(x)
            return 50 * torch.cat([-side, side], dim=1)

    path = tmp_path / "side.ts"
    torch.jit.script(RightSide()).save(str(path))
    predict(str(model), path, scans, tmp_path / "ras", orientation="RAS", geometric=False, **QUICK)
    predict(str(model), path, scans, tmp_path / "file", geometric=False, **QUICK)
    turned, stored = (nib.load(tmp_path / name / "labels/case_0.nii.gz").get_fdata() for name in ("ras", "file"))
    assert turned[:5].all() and not turned[-5:].any()
    assert not stored[:5].any() and stored[-5:].all()


def test_exported_programs_and_windows(model: Path, script: Path, scans: Path, tmp_path: Path) -> None:
    exported = tmp_path / "seg.pt2"
    torch.export.save(torch.export.export(Bright(), (torch.rand(1, 1, *SHAPE),)), exported)
    options = {"intensities": "unit", "geometric": False, **QUICK}
    predict(str(model), exported, scans, tmp_path / "exported", **options)
    predict(str(model), script, scans, tmp_path / "script", **options)
    predict(str(model), script, scans, tmp_path / "windows", patch_size=[8, 8, 8], **options)
    first, second, third = (
        nib.load(tmp_path / name / "labels/case_0.nii.gz").get_fdata() for name in ("exported", "script", "windows")
    )
    np.testing.assert_array_equal(first, second)
    assert (first != third).mean() < 0.01
    patches = tmp_path / "patches.pt2"
    torch.export.save(torch.export.export(Bright(), (torch.rand(1, 1, 8, 8, 8),)), patches)
    predict(str(model), patches, scans, tmp_path / "patches", patch_size=[8, 8, 8], **options)
    np.testing.assert_array_equal(nib.load(tmp_path / "patches/labels/case_0.nii.gz").get_fdata(), third)


def test_monai_bundles_do_their_own_preprocessing(model: Path, scans: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "models").mkdir()
    torch.manual_seed(0)
    network = UNet(**UNET)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    keys = {"keys": "image"}
    steps = [
        {"_target_": "LoadImaged", **keys},
        {"_target_": "EnsureChannelFirstd", **keys},
        {"_target_": "Orientationd", **keys, "axcodes": "RAS"},
        {"_target_": "Spacingd", **keys, "pixdim": [1.0, 1.0, 1.0]},
        {"_target_": "NormalizeIntensityd", **keys},
    ]
    config = {
        "network_def": {"_target_": "UNet", **UNET},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16]},
        "preprocessing": {"_target_": "Compose", "transforms": steps},
    }
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    lines = predict(str(model), bundle, scans, tmp_path / "out", **QUICK)
    assert len(lines) == 2
    written = nib.load(tmp_path / "out" / "labels" / "case_0.nii.gz")
    assert written.shape == SHAPE
    np.testing.assert_allclose(written.affine, np.diag([-1.0, -1.0, 1.5, 1.0]))
    with pytest.raises(BadInputError, match="expected none for a MONAI bundle"):
        predict(str(model), bundle, scans, tmp_path / "no", intensities="unit", **QUICK)
    config["preprocessing"]["transforms"][-1] = {"_target_": "ScaleIntensityd", **keys}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="predictions of another model, segmenter or settings"):
        predict(str(model), bundle, scans, tmp_path / "out", **QUICK)
    config["postprocessing"] = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="whose postprocessing is a sigmoid"):
        predict(str(model), bundle, scans, tmp_path / "out", **QUICK)
    del config["postprocessing"]
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(BadInputError, match="got neither"):
        predict(str(model), bundle, scans, tmp_path / "no", **QUICK)
    (bundle / "configs" / "inference.json").unlink()
    with pytest.raises(BadInputError, match="expected a MONAI bundle"):
        predict(str(model), bundle, scans, tmp_path / "no", **QUICK)


def test_pictures_get_pictures(make_generator: Callable[..., Generator], script: Path, tmp_path: Path) -> None:
    make_generator(2).save_pretrained(tmp_path / "flat")
    (tmp_path / "scans").mkdir()
    array = (volume(0)[:, :, 7] / 4).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "scans" / "a.png")
    lines = predict(str(tmp_path / "flat"), script, tmp_path / "scans", tmp_path / "out", intensities="unit", **QUICK)
    assert lines[0]["unit"] == "voxels" and Image.open(tmp_path / "out" / "labels" / "a.png").size == array.shape[::-1]


def test_what_is_no_segmenter_is_refused(model: Path, scans: Path, tmp_path: Path) -> None:
    weights, text = tmp_path / "weights.pt", tmp_path / "seg.onnx"
    torch.save(Bright().state_dict(), weights)
    text.write_text("")
    for path, words in (
        (weights, "Weights alone cannot be run"),
        (text, "expected .ts, .pt or .pt2, got .onnx"),
        (tmp_path / "none.ts", "got nothing there"),
    ):
        with pytest.raises(BadInputError, match=words):
            predict(str(model), path, scans, tmp_path / "out", **QUICK)
    script = tmp_path / "seg.ts"
    torch.jit.script(Bright()).save(str(script))
    for options, words in (
        ({"mask": "attention"}, "wants a text for each scan"),
        ({"method": "null_text"}, "wants a text for each scan"),
        ({"scaled_window": (0.0, 1.0)}, "scaled_window: expected none"),
    ):
        with pytest.raises(BadInputError, match=words):
            predict(str(model), script, scans, tmp_path / "out", **QUICK, **options)
    assert not (tmp_path / "out").exists()
