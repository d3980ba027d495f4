"""Plans: made from folders of every kind, written for people, read back exactly, and refused where they cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medgen import cli
from medgen.data.dataset import RGB, Dataset, read_dataset
from medgen.data.intensity import Normalization
from medgen.data.io import write_image
from medgen.networks import Autoencoder, Denoiser
from medgen.planning import (
    STAGES,
    Plan,
    TextPlan,
    check_plan,
    choose_conditions,
    fingerprint,
    make_plan,
    network_arguments,
    read_plan,
    rules,
    summarize_plan,
    write_plan,
)
from medgen.planning.machine import Machine
from medgen.types import BadInputError, Grid

CONFIGS = ("hippocampus_3d.yaml", "cardiac_2d.yaml", "nuclei_2d_rgb.yaml")


def _label(shape: tuple[int, ...]) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    return label


def _picture(folder: Path, case: str, array: np.ndarray, *, labelled: bool = True) -> None:
    """A PNG of ``array (H, W)`` or ``(H, W, 3)``, 8 or 16 bits, with a label."""
    for name in ("images", "labels")[: 1 + labelled]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    image = torch.from_numpy(array.astype(np.float32))
    image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
    grid = Grid(shape=array.shape[:2], affine=np.eye(4), known=False)
    write_image(folder / "images" / f"{case}.png", image, grid, dtype=str(array.dtype))
    if labelled:
        Image.fromarray(_label(array.shape[:2])).save(folder / "labels" / f"{case}.png")


def _volume(folder: Path, case: str, array: np.ndarray, affine: np.ndarray) -> None:
    for name, voxels in (("imagesTr", array), ("labelsTr", _label(array.shape))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, affine), folder / name / f"{case}.nii.gz")


def _declare(folder: Path, modality: str) -> Dataset:
    """An MSD ``dataset.json`` for the volumes in a folder."""
    names = sorted(path.name for path in (folder / "imagesTr").iterdir())
    training = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    content = {"modality": {"0": modality}, "labels": {"0": "background", "1": "organ"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(content))
    return read_dataset(folder)


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder, rng = tmp_path_factory.mktemp("gray"), np.random.default_rng(0)
    for index in range(6):
        _picture(folder, f"c{index}", rng.integers(0, 256, (60, 50)).astype(np.uint8), labelled=index > 0)
    return read_dataset(folder)


@pytest.fixture(scope="module")
def gray_plan(gray: Dataset) -> Plan:
    return make_plan(gray, device="cpu")


def test_gray_pictures_get_a_grid_that_divides_and_their_own_type(gray_plan: Plan) -> None:
    assert gray_plan.spatial_dims == 2
    assert gray_plan.size == (64, 64)  # 60 x 50, up to multiples of compression 4 times the 4 of three U-Net levels
    assert gray_plan.compression == 4
    assert (gray_plan.spacing, gray_plan.orientation) == (None, None)
    assert gray_plan.normalization == Normalization("percentile", 0.5, 99.5)
    assert gray_plan.image_dtype == "uint8"
    assert gray_plan.class_names == {0: "background", 1: "class_1"}
    assert gray_plan.label is not None


def test_few_scans_are_bent_in_many_versions_and_more_are_not(gray_plan: Plan, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        _picture(tmp_path, f"c{index}", rng.integers(0, 256, (60, 50)).astype(np.uint8))
    more = make_plan(read_dataset(tmp_path), device="cpu")
    for plan, elastic, variants in ((gray_plan, 0.09, 32), (more, 0.0, 8)):
        assert plan.label is not None
        assert (plan.denoiser.elastic, plan.denoiser.variants, plan.label.variants) == (elastic, variants, variants)
        assert plan.label.elastic == 0  # shapes of organs stay those of patients
        assert any("each is bent into 32 versions" in note for note in plan.fingerprint["notes"]) == (elastic > 0)


def test_scans_without_label_are_counted_and_said(gray_plan: Plan) -> None:
    assert gray_plan.fingerprint["cases"] == 6
    assert gray_plan.fingerprint["labelled_cases"] == 5
    assert "1 scan(s) have no label map and are not used for training" in gray_plan.fingerprint["notes"]


def test_a_folder_without_any_label_is_refused(tmp_path: Path) -> None:
    _picture(tmp_path, "a", np.arange(64, dtype=np.uint8).reshape(8, 8), labelled=False)
    with pytest.raises(BadInputError, match=r"expected scans with label maps, got 1 scan\(s\) without"):
        make_plan(read_dataset(tmp_path), device="cpu")


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_colors_share_one_window_and_gray_pictures_among_them_are_said(dtype: type, top: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        _picture(tmp_path, f"c{index}", rng.integers(0, top + 1, (60, 50, 3)).astype(dtype))
    _picture(tmp_path, "gray", rng.integers(0, top + 1, (60, 50)).astype(dtype))
    plan = make_plan(read_dataset(tmp_path), device="cpu")
    assert plan.channel_names == RGB
    assert plan.normalization == Normalization("window", 0, top, per_channel=False)
    assert plan.image_dtype == np.dtype(dtype).name
    assert any("1 gray and 3 RGB images" in note for note in plan.fingerprint["notes"])


@pytest.mark.parametrize(
    ("shape", "channels", "compression", "latent_channels", "lossless"),
    [
        ((48, 48, 32), 1, 2, 8, True),
        ((64, 64, 64), 4, 2, 16, False),
        ((96, 64, 64), 1, 4, 8, False),
        ((160, 160), 1, 4, 8, False),
        ((256, 256), 3, 4, 16, False),
    ],
)
def test_latents_hold_every_voxel_where_that_is_affordable_and_then_need_no_adversary(
    shape: tuple[int, ...],
    channels: int,
    compression: int,
    latent_channels: int,
    lossless: bool,
    gray: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = dataclasses.replace(
        fingerprint.fingerprint(gray, device="cpu"),
        spatial_dims=len(shape),
        sizes=(shape,) * 3,
        channel_names={index: f"c{index}" for index in range(channels)},
        machine=Machine("cpu", "cpu", 4, 1000.0, True),
    )
    seen = dataclasses.replace(seen, intensities=seen.intensities * channels, useful=500)
    monkeypatch.setattr(rules, "fingerprint", lambda dataset, needs_labels, device: seen)
    plan = make_plan(gray, hours=1000)
    assert plan.autoencoder is not None
    assert (plan.compression, plan.autoencoder.latent_channels) == (compression, latent_channels)
    assert plan.is_lossless == (latent_channels == channels * compression ** len(shape)) == lossless
    if lossless:
        assert plan.autoencoder.adversarial_weight == plan.autoencoder.feature_weight == 0
        assert 150 <= plan.autoencoder.steps <= 200
    else:
        assert min(plan.autoencoder.adversarial_weight, plan.autoencoder.feature_weight) > 0
        assert plan.autoencoder.steps > 200


def test_volumes_too_thin_for_the_discriminator_are_planned_without_it(
    gray: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fingerprint.fingerprint(gray, device="cpu")
    names = {index: f"c{index}" for index in range(4)}
    thin = dataclasses.replace(seen, spatial_dims=3, sizes=((48, 48, 6),) * 3, channel_names=names)
    thin = dataclasses.replace(thin, intensities=seen.intensities * 4)
    monkeypatch.setattr(rules, "fingerprint", lambda dataset, needs_labels, device: thin)
    plan = make_plan(gray, hours=1000)
    assert plan.autoencoder is not None
    assert plan.size[2] == 8
    assert not plan.is_lossless
    assert not plan.autoencoder.is_adversarial
    assert any("too thin for the discriminator" in note for note in plan.fingerprint["notes"])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """MR volumes of two spacings and five sizes, most of them stored in another order of axes."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for index in range(5):
        spacing = np.array([1, 1, 1.5]) if index < 3 else np.array([0.8, 0.8, 3])
        extent = np.array([24, 20, 24]) * (1, 1.5, 2, 1.25, 1.75)[index]
        shape = tuple(np.round(extent / spacing).astype(int))
        array, affine = rng.random(shape).astype(np.float32), np.diag([*spacing, 1])
        if index:
            array, affine = array.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]]
        _volume(folder, f"c{index}", array, affine)
    return _declare(folder, "MRI")


@pytest.fixture(scope="module")
def mixed_plan(mixed: Dataset) -> Plan:
    return make_plan(mixed, device="cpu")


def test_mixed_spacings_are_resampled_to_their_median_in_the_model_axis_order(mixed: Dataset, mixed_plan: Plan) -> None:
    plan = mixed_plan
    canonical = [nib.as_closest_canonical(nib.load(case.images[0])) for case in mixed.cases]
    spacing = np.median([image.header.get_zooms() for image in canonical], axis=0)
    extent = np.median([np.array(image.shape) * image.header.get_zooms() for image in canonical], axis=0)
    np.testing.assert_allclose(plan.spacing, spacing, rtol=1e-3)
    assert plan.size == tuple(math.ceil(round(n) / 8) * 8 for n in extent / spacing)
    assert plan.orientation == "RAS"
    assert plan.modality == "MR"
    assert any("resampled to the median" in note for note in plan.fingerprint["notes"])


def test_where_spacing_steers_scans_keep_theirs_and_no_note_says_otherwise(mixed: Dataset) -> None:
    plan = make_plan(mixed, conditions=["mask", "spacing"], device="cpu")
    shapes = [nib.as_closest_canonical(nib.load(case.images[0])).shape for case in mixed.cases]
    assert plan.spacing is None
    assert plan.size == tuple(math.ceil(n / 8) * 8 for n in np.median(shapes, axis=0))
    assert not any("resampled" in note or "factor" in note for note in plan.fingerprint["notes"])


def test_floats_of_a_narrow_range_stay_floats(mixed_plan: Plan) -> None:
    assert mixed_plan.image_dtype == "float32"


@pytest.mark.parametrize("modality", ["CT", "image"])
def test_ct_numbers_get_a_window_in_hu(modality: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.choice([-1024, -700, -90, 40, 60, 420], (24, 24, 16)).astype(np.int16) for _ in range(3)]
    for index, array in enumerate(arrays):
        _volume(tmp_path, f"c{index}", array, np.eye(4))
    dataset = dataclasses.replace(_declare(tmp_path, modality), modality=None if modality == "image" else modality)
    plan = make_plan(dataset, device="cpu")
    assert plan.normalization.method == "window"
    assert plan.normalization.low == -1000  # air, and nothing below it
    assert np.percentile(arrays, 99.5) <= plan.normalization.high <= np.percentile(arrays, 99.5) + 50
    assert plan.image_dtype == "int16"
    assert any("look like CT" in note for note in plan.fingerprint["notes"]) == (modality == "image")


def test_pictures_that_are_mostly_empty_are_normalized_from_lowest_to_highest(tmp_path: Path) -> None:
    array = np.zeros((60, 50), dtype=np.uint8)
    array[0, :4] = 200
    for index in range(2):
        _picture(tmp_path, f"c{index}", array)
    plan = make_plan(read_dataset(tmp_path), device="cpu")
    assert plan.normalization == Normalization("percentile", 0, 100)


def test_scans_too_large_for_a_cpu_are_coarsened_then_cropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = np.broadcast_to(rng.integers(0, 200, (150, 1, 60)).astype(np.uint8), (150, 150, 60))
    for index in range(2):
        _volume(tmp_path / "volumes", f"c{index}", array, np.diag([0.7, 0.7, 3, 1]))
        _picture(tmp_path / "pictures", f"c{index}", np.tile(array[..., 0], (4, 3)))
    plan = make_plan(_declare(tmp_path / "volumes", "MRI"), device="cpu")
    assert plan.spacing is not None
    assert 0.7 < plan.spacing[0] == plan.spacing[1] < 1.4
    assert plan.spacing[2] == 3  # thick slices stay as they are
    assert all(n * length >= full for n, length, full in zip(plan.size, plan.spacing, (105, 105, 180), strict=True))
    flat = make_plan(read_dataset(tmp_path / "pictures"), device="cpu")
    assert flat.size == (256, 256)
    assert flat.denoiser.variants >= 4 * 600 * 450 / 256**2  # about four crops for every voxel
    assert "scans of 600 x 450 voxels are learned in crops, to train in reasonable time" in flat.fingerprint["notes"]


def test_a_gpu_gets_wider_networks_and_little_memory_narrow_ones_and_a_small_batch(
    gray: Dataset, gray_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for memory in (80.0, 0.02):
        machine = Machine("cuda", "a GPU", 8, memory, True)
        monkeypatch.setattr(fingerprint, "read_machine", lambda device, machine=machine: machine)
        plans.append(make_plan(gray).denoiser)
    wide, tiny = plans
    assert wide.channels > gray_plan.denoiser.channels
    assert wide.channels > tiny.channels
    assert (wide.batch_size, wide.gradient_checkpointing) == (8, False)
    assert (tiny.batch_size, tiny.gradient_checkpointing) == (1, True)


def test_the_batch_is_shared_by_all_processes(gray: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    plan = make_plan(gray, device="cpu")
    assert all(getattr(plan, stage).batch_size % 3 == 0 for stage in STAGES)


def test_a_plan_read_back_is_the_same_plan_for_python_and_for_the_command_line(
    gray_plan: Plan, mixed_plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    awkward = dataclasses.replace(
        mixed_plan, name="yes: 1e-4 # no", class_names={0: "no", 1: "1.5"}, label=None, autoencoder=None
    )
    for plan in (gray_plan, awkward):
        write_plan(plan, path)
        assert read_plan(path) == plan
        for option in ("--config", "--plan"):
            assert cli.parse("train", [option, str(path), "--data", "D", "--output", "O"])["plan"] == plan
        assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_every_section_of_the_file_says_what_it_does(gray_plan: Plan, tmp_path: Path) -> None:
    write_plan(gray_plan, tmp_path / "plan.yaml")
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    for section in ("normalization", "autoencoder", "denoiser", "label", "fingerprint"):
        assert lines[lines.index(f"  {section}:") - 1].startswith("  # ")
    assert any(line.startswith("    learning_rate: ") and "# Peak rate of AdamW" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_an_edit_changes_what_it_says_and_nothing_else(gray_plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(gray_plan, path)
    text = path.read_text()
    path.write_text(text.replace("kl_weight: 0.0001", "kl_weight: 2e-5"))
    assert gray_plan.autoencoder is not None
    expected = dataclasses.replace(gray_plan.autoencoder, kl_weight=2e-5)
    assert read_plan(path) == dataclasses.replace(gray_plan, autoencoder=expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sise": [8, 8]}, "unknown key 'sise'. Did you mean 'size'?"),
        ({"denoiser": {"batchsize": 2}}, "unknown key 'denoiser.batchsize'. Did you mean 'batch_size'?"),
        ({"denoiser": {"objective": {"zzz": 2}}}, "unknown key 'denoiser.objective.zzz'. Known here: prediction,"),
        ({"denoiser": {"steps": "many"}}, "plan.denoiser.steps: expected a whole number, got many. Correct it."),
        ({"precision": "fp8"}, "plan.precision: expected one of ['auto', 'fp32', 'bf16'], got fp8."),
        ({"autoencoder": {"patch_size": [32, "x"]}}, "plan.autoencoder.patch_size: expected a whole number, got x."),
        ({"spatial_dims": 4}, "spatial_dims: expected 2 or 3, got 4."),
        ({"size": [64, 55]}, "size: expected multiples of 4 (the compression of the autoencoder), got [64, 55]. "),
        ({"label_stride": 24}, "size: expected multiples of 24 (label_stride), got [64, 64]. Set it to [72, 72]."),
        ({"size": [64, 64, 8]}, "size: expected 2 positive numbers of voxels"),
        ({"spacing": [1, 0]}, "spacing: expected 2 positive lengths in mm"),
        ({"class_names": {1: "a"}}, "class_names: expected 0 (the background)"),
        ({"autoencoder": {"patch_size": [128, 8]}}, "autoencoder.patch_size: expected at most size [64, 64]"),
        ({"autoencoder": {"patch_size": [32, 31]}}, "autoencoder.patch_size: expected multiples of 4"),
        (
            {"autoencoder": {"patch_size": [32, 12], "feature_weight": 0.1}},
            "autoencoder.patch_size: expected at least 16 voxels per axis, which the discriminator needs, got [32, 12",
        ),
        ({"denoiser": {"temperature": 0.0}}, "denoiser.temperature: expected a finite number above 0, got 0"),
        ({"denoiser": {"guidance_scale": -1.0}}, "denoiser.guidance_scale: expected a finite number of 0 or more"),
        ({"denoiser": {"attention_levels": [True]}}, "denoiser.attention_levels: expected one value for each of the 3"),
        ({"denoiser": {"elastic": 0.3}}, "denoiser.elastic: expected 0 to 0.15, got 0.3. Take 0.09, or 0 for none."),
        ({"denoiser": {"steps": 0}}, "denoiser.steps: expected 1 or more, got 0."),
        ({"normalization": {"low": 3, "high": 1}}, "normalization: expected low < high"),
        ({"validate_every": 0}, "validate_every: expected 1 or more, got 0. Raise it."),
        ({"checkpoint_every": -1}, "checkpoint_every: expected 1 or more, got -1. Raise it."),
        ({"label_stride": 0}, "label_stride: expected 1 or more, got 0. Raise it."),
        ({"autoencoder": {"channels": []}}, "autoencoder.channels: expected a number of 1 or more for each level, got"),
        ({"label": {"channels": [16, 0, 16]}}, "label.channels: expected a number of 1 or more for each level, got"),
        ({"autoencoder": {"latent_channels": 0}}, "autoencoder.latent_channels: expected 1 or more, got 0."),
        ({"autoencoder": {"discriminator_channels": 0}}, "autoencoder.discriminator_channels: expected 1 or more"),
        ({"denoiser": {"num_head_channels": 0}}, "denoiser.num_head_channels: expected 1 or more, got 0."),
        ({"denoiser": {"mask_channels": 0}}, "denoiser.mask_channels: expected 1 or more, got 0."),
        ({"orientation": "XYZ"}, "orientation: expected one letter each of L or R, P or A, and I or S, such as RAS,"),
        ({"orientation": "RLS"}, "got 'RLS'. Correct it, or set it to null."),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_file_and_key(
    change: dict[str, object], complaint: str, gray_plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(gray_plan, path)
    content = yaml.safe_load(path.read_text())
    for key, value in change.items():
        if isinstance(value, dict) and key != "class_names":
            for inner, item in value.items():
                old = content["plan"][key].get(inner)
                content["plan"][key][inner] = {**old, **item} if isinstance(old, dict) else item
        else:
            content["plan"][key] = value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInputError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("plan: [", "expected a YAML file"), ("name: x", "expected the key `plan`"), ("", "expected the key `plan`")],
)
def test_a_file_that_is_no_plan_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=f"{path.name}: {complaint}"):
        read_plan(path)
    with pytest.raises(BadInputError, match=r"absent\.yaml: expected a YAML file with a training plan"):
        read_plan(tmp_path / "absent.yaml")


def test_a_plan_for_other_data_is_refused(gray: Dataset, gray_plan: Plan, mixed: Dataset) -> None:
    check_plan(gray_plan, gray)
    with pytest.raises(BadInputError, match=r"expected 2D scans as in the plan, got 3D ones"):
        check_plan(gray_plan, mixed)
    with pytest.raises(BadInputError, match=r"expected 3 channel\(s\) \(R, G, B\) as in the plan, got 1 \(image\)"):
        check_plan(dataclasses.replace(gray_plan, channel_names=dict(RGB)), gray)
    more = dataclasses.replace(gray, class_names={**gray.class_names, 2: "tumor"})
    with pytest.raises(BadInputError, match=r"got \{2: 'tumor'\} too. Add them to class_names"):
        check_plan(gray_plan, more)


def test_names_that_differ_between_plan_and_data_are_refused_and_missing_ones_are_not(
    mixed: Dataset, mixed_plan: Plan
) -> None:
    with pytest.raises(
        BadInputError, match=r"expected class 1 to be 'liver' as in the plan, got 'organ'\. Correct class_"
    ):
        check_plan(dataclasses.replace(mixed_plan, class_names={0: "background", 1: "liver"}), mixed)
    with pytest.raises(BadInputError, match=r"expected 1 channel\(s\) \(CT\) as in the plan, got 1 \(MRI\)"):
        check_plan(dataclasses.replace(mixed_plan, channel_names={0: "CT"}), mixed)
    check_plan(dataclasses.replace(mixed_plan, class_names={0: "Background", 1: "ORGAN"}), mixed)
    unnamed = dataclasses.replace(mixed, class_names={0: "background", 1: "class_1"}, channel_names={0: "image"})
    check_plan(dataclasses.replace(mixed_plan, channel_names={0: "T1"}), unnamed)


def test_swapped_channels_are_refused(mixed: Dataset, mixed_plan: Plan) -> None:
    two = dataclasses.replace(mixed, channel_names={0: "T1", 1: "FLAIR"})
    with pytest.raises(
        BadInputError, match=r"expected 2 channel\(s\) \(FLAIR, T1\) as in the plan, got 2 \(T1, FLAIR\)"
    ):
        check_plan(dataclasses.replace(mixed_plan, channel_names={0: "FLAIR", 1: "T1"}), two)


def test_the_time_that_a_lossless_autoencoder_leaves_goes_to_the_denoiser(
    gray: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares of the stages are 15, 70 and 15 percent of the time; a Haar transform needs next to nothing of its."""
    seen = dataclasses.replace(fingerprint.fingerprint(gray, device="cpu"), useful=10**6)
    seen = dataclasses.replace(seen, spatial_dims=3, sizes=((48, 48, 32),) * 3)  # compressed by 2, into 8 latents
    seen = dataclasses.replace(seen, machine=Machine("cpu", "cpu", 2, 16.0, True))  # slower ones get the least steps
    monkeypatch.setattr(rules, "fingerprint", lambda dataset, needs_labels, device: seen)
    plan = make_plan(gray, hours=1.5)
    assert plan.is_lossless
    total = 3600 * 1.5 * seen.machine.operations_per_second
    spent = {stage: getattr(plan, stage).steps * rules.step_operations(plan, stage) / total for stage in STAGES}
    assert plan.denoiser.steps < 60_000
    assert spent["autoencoder"] + spent["denoiser"] == pytest.approx(0.85, abs=0.03)  # steps are rounded


def test_a_plan_made_for_a_folder_trains_at_the_rates_of_the_shipped_ones(gray_plan: Plan, repository: Path) -> None:
    for name in CONFIGS:
        shipped = read_plan(repository / "configs" / name)
        for stage in ("denoiser", "label"):
            for key in ("learning_rate", "ema_decay"):
                assert getattr(getattr(gray_plan, stage), key) == getattr(getattr(shipped, stage), key)


def test_coarsening_stops_where_the_finest_scan_would_no_longer_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 200, (160, 160, 60)).astype(np.uint8)
    for index, edge in enumerate((0.5, 0.7, 0.7, 1.5)):
        _volume(tmp_path, f"c{index}", array, np.diag([edge, edge, 3, 1]))
    plan = make_plan(_declare(tmp_path, "MRI"), device="cpu")
    assert plan.spacing is not None
    assert 0.9 < plan.spacing[0] <= 1.0  # twice 0.5, while the median is 0.7
    assert not any("training stops at these scans" in note for note in plan.fingerprint["notes"])
    _volume(tmp_path, "c4", array[:, :, :20], np.diag([0.7, 0.7, 9, 1]))
    plan = make_plan(_declare(tmp_path, "MRI"), device="cpu")
    assert any("training stops at these scans" in note for note in plan.fingerprint["notes"])


def test_networks_that_cannot_be_built_are_refused_before_training(gray: Dataset, gray_plan: Plan) -> None:
    odd = dataclasses.replace(gray_plan.denoiser, channels=(31, 62, 93))
    with pytest.raises(BadInputError, match=r"denoiser: expected a network that can be built, got: "):
        check_plan(dataclasses.replace(gray_plan, denoiser=odd), gray)


def test_the_summary_counts_the_parameters_of_the_real_networks(gray: Dataset, gray_plan: Plan) -> None:
    text = summarize_plan(gray_plan, gray, device="cpu")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    for stage in STAGES:
        network = Autoencoder if stage == "autoencoder" else Denoiser
        count = sum(p.numel() for p in network(**network_arguments(gray_plan, stage)).parameters())
        assert float(rows[stage][1]) == pytest.approx(count / 1e6, abs=0.005)
    assert "4 scans for training, 1 for validation, 1 left out" in text
    assert "just timed on this machine" in text


@pytest.mark.parametrize(
    ("columns", "template", "told"),
    [
        ([{"caption": "c"}], None, "column caption"),
        ([{"text": "t", "caption": "c"}], None, "column text"),
        ([{"text": "", "caption": "c"}, {"text": "t"}], None, "column text of 2 scans, column caption of 2 scans)"),
        ([{"view": "PA"}], "{view} view", "template '{view} view'"),
        ([{}], None, "no scan has one"),
    ],
)
def test_the_summary_says_where_texts_come_from(
    gray: Dataset, gray_plan: Plan, columns: list[dict[str, str]], template: str | None, told: str
) -> None:
    case = next(case for case in gray.cases if case.label is not None)
    cases = [
        dataclasses.replace(case, case=f"{n}", text=meta.get("text") or meta.get("caption"), meta=meta)
        for n, meta in enumerate(2 * columns)
    ]
    conditions = dataclasses.replace(gray_plan.denoiser.conditions, text=TextPlan(template=template))
    plan = dataclasses.replace(gray_plan, denoiser=dataclasses.replace(gray_plan.denoiser, conditions=conditions))
    text = summarize_plan(plan, dataclasses.replace(gray, cases=cases), device="cpu")
    assert f"steered by mask, text ({told}" in text


def test_texts_are_asked_for_by_the_names_of_their_columns(gray: Dataset) -> None:
    with pytest.raises(BadInputError, match="expected a column text, caption or report in the metadata for the cond"):
        choose_conditions(gray, ["text"])


def test_the_summary_of_training_on_a_base_claims_no_cost_that_it_cannot_know(gray: Dataset, gray_plan: Plan) -> None:
    text = summarize_plan(dataclasses.replace(gray_plan, label=None, control="mask"), gray, device="cpu")
    assert f"{gray_plan.denoiser.steps} steps of {gray_plan.denoiser.batch_size} samples; what a step takes" in text
    assert "GB  " not in text and " min" not in text


def test_a_longer_time_gives_no_shorter_training(gray: Dataset, gray_plan: Plan) -> None:
    longer = make_plan(gray, device="cpu", hours=15)
    assert longer.denoiser.channels >= gray_plan.denoiser.channels
    assert longer.denoiser.steps * sum(longer.denoiser.channels) >= gray_plan.denoiser.steps * sum(
        gray_plan.denoiser.channels
    )


def test_axis_codes_may_be_written_small(gray_plan: Plan) -> None:
    assert dataclasses.replace(gray_plan, orientation="lps").orientation == "LPS"


def test_scans_that_the_folder_holds_out_do_not_shape_the_plan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        high, shape = (256, (60, 50)) if index < 4 else (60000, (90, 95))
        kind = np.uint8 if index < 4 else np.uint16
        _picture(tmp_path, f"c{index}", rng.integers(0, high, shape).astype(kind))
    (tmp_path / "train.txt").write_text("c0\nc1\nc2\nc3\n")
    (tmp_path / "val.txt").write_text("c4\nc5\n")
    plan = make_plan(read_dataset(tmp_path), device="cpu")
    assert plan.size == (64, 64)
    assert plan.image_dtype == "uint8"
    assert plan.fingerprint["size"]["largest"] == [60, 50]
    assert (plan.fingerprint["cases"], plan.fingerprint["labelled_cases"]) == (6, 6)
    dataset = read_dataset(tmp_path)
    dataset.cases = [case for case in dataset.cases if case.split == "val"]
    with pytest.raises(
        BadInputError, match=r"expected scans for training, got 2 that the folder's split all holds out"
    ):
        make_plan(dataset, device="cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_a_whole_command(name: str, repository: Path) -> None:
    arguments = cli.parse("train", ["--config", str(repository / "configs" / name)])
    assert {"data", "output", "plan"} <= set(arguments)
    assert read_plan(repository / "configs" / name) == arguments["plan"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_fits_its_real_data(name: str, repository: Path, real_data: Path) -> None:
    arguments = cli.parse("train", ["--config", str(repository / "configs" / name)])
    check_plan(arguments["plan"], read_dataset(real_data / arguments["data"].name))


def test_the_hippocampus_plan_follows_from_the_real_volumes(real_data: Path) -> None:
    plan = make_plan(read_dataset(real_data / "hippocampus3d"), device="cpu")
    assert plan.size == (40, 56, 40)  # 31-43 x 40-59 x 24-47 voxels
    assert plan.spacing == (1, 1, 1)
    assert plan.normalization == Normalization("percentile", 0.5, 99.5)
    assert plan.image_dtype == "int16"
    assert plan.fingerprint["labelled_cases"] == 221
