"""What training reads: scans on the model's grid, their versions, and that nothing stale is ever served."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import RandAffine
from safetensors.torch import load_file

from medgen.data.dataset import read_dataset
from medgen.planning import AutoencoderPlan, DenoiserPlan, LabelPlan, Plan
from medgen.training.augment import augment
from medgen.training.cache import CachedScan, cache_scans, cache_variants, read_scan
from medgen.training.denoiser import draw_variant
from medgen.training.describe import typical_intensity
from medgen.types import BadInputError


def volumes(folder: Path, spacings: list[tuple[float, ...]]) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index, spacing in enumerate(spacings):
        label = np.zeros((12, 12, 12), np.uint8)
        label[3:8, 3:8, 3:8] = 1
        for name, array in (("images", rng.normal(100, 10, label.shape).astype(np.float32)), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1])), folder / name / f"case_{index}.nii.gz")
    return folder


def plan_for(spacing: tuple[float, ...] | None) -> Plan:
    return Plan(
        name="tiny",
        spatial_dims=3,
        channel_names={0: "MR"},
        class_names={0: "background", 1: "cube"},
        size=(16, 16, 16),
        spacing=spacing,
        autoencoder=AutoencoderPlan(patch_size=(16, 16, 16)),
    )


def cache(data: Path, folder: Path, plan: Plan, *, skip_bad: bool = False) -> list[CachedScan]:
    dataset = read_dataset(data)
    return cache_scans(dataset, dataset.cases, plan, folder, divisor=plan.divisor, skip_bad=skip_bad, title="test")


def spread(ball: torch.Tensor, spacing: tuple[float, ...]) -> torch.Tensor:
    """Standard deviations in mm along the principal axes of a label, largest first."""
    points = ball.nonzero().double() * torch.tensor(spacing, dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.cov(points.T)).flip(0).sqrt()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 4.0), (3.0, 0.75, 0.75), (0.5, 2.0)])
def test_a_ball_stays_a_ball_in_mm_when_its_scan_is_turned(spacing):
    shape = [round(64 / edge) for edge in spacing]
    axes = torch.meshgrid(
        *[(torch.arange(n) - (n - 1) / 2) * e for n, e in zip(shape, spacing, strict=True)], indexing="ij"
    )
    label = (sum(axis.square() for axis in axes) < 20**2).to(torch.uint8)
    tensors = {"image": label[None].float(), "label": label, "valid": torch.ones(shape, dtype=torch.bool)}
    plan = DenoiserPlan(rotation=40, scaling=0.0)
    for seed in range(4):
        moved = augment(tensors, plan, seed, spacing)["label"]
        before, after = spread(label, spacing), spread(moved, spacing)
        torch.testing.assert_close(after, before, rtol=0.04, atol=0)
        assert int(moved.sum()) == pytest.approx(int(label.sum()), rel=0.04)


def test_augmenting_cubic_voxels_gives_the_very_voxels_of_monai():
    image = torch.randn(2, 12, 14, 10, generator=torch.Generator().manual_seed(0))
    tensors = {"image": image, "label": torch.zeros(12, 14, 10), "valid": torch.ones(12, 14, 10, dtype=torch.bool)}
    angle = 8 * torch.pi / 180
    oracle = RandAffine(prob=1.0, rotate_range=[(-angle, angle)] * 3, scale_range=[(-0.08, 0.08)] * 3)
    oracle.set_random_state(5)
    expected = torch.as_tensor(oracle(image, mode="bilinear", padding_mode="reflection"))
    assert torch.equal(augment(tensors, DenoiserPlan(), 5, (2.5, 2.5, 2.5))["image"], expected)


def test_the_cache_knows_the_spacing_of_the_grid_it_holds(tmp_path):
    data = volumes(tmp_path / "data", [(1.0, 1.0, 1.5)])
    assert cache(data, tmp_path / "own", plan_for(None))[0].spacing == pytest.approx((1.0, 1.0, 1.5))
    assert cache(data, tmp_path / "given", plan_for((1.0, 1.0, 1.0)))[0].spacing == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_changed_file_is_read_again(name, tmp_path):
    data = volumes(tmp_path / "data", [(1, 1, 1)] * 2)
    before = cache(data, tmp_path / "run", plan_for(None))
    path = data / name / "case_1.nii.gz"
    array = np.asarray(nib.load(path).dataobj).copy()
    array[5, 5, 5] = 0
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    after = cache(data, tmp_path / "run", plan_for(None))
    assert after[0] == before[0]
    assert after[1].source != before[1].source
    key = name.removesuffix("s")
    changed = read_scan(after[1])[key] != read_scan(before[1])[key]
    assert changed.any()


def test_scans_far_from_the_spacing_of_the_plan_are_refused_or_skipped(tmp_path):
    data = volumes(tmp_path / "data", [(1, 1, 2), (1, 1, 1), (0.5, 1, 1), (1, 1, 2.1)])
    plan = plan_for((1.0, 1.0, 1.0))
    with pytest.raises(
        BadInputError, match=r"case_3\.nii\.gz: expected voxels within a factor 2 of the plan's 1 x 1 x 1"
    ):
        cache(data, tmp_path / "run", plan)
    kept = cache(data, tmp_path / "run", plan, skip_bad=True)
    assert [scan.case for scan in kept] == ["case_0", "case_1", "case_2"]
    assert len(cache(data, tmp_path / "run", plan_for(None))) == 4


def test_a_large_scan_is_learned_in_crops_all_over_it_half_of_them_as_acquired(tmp_path):
    scan = cache(volumes(tmp_path / "data", [(1, 1, 1)]), tmp_path / "run", plan_for(None))[0]
    whole = read_scan(scan)
    arguments = {"variants": 12, "seed": 0, "title": "test"}
    encode = lambda tensors: tensors["image"]  # noqa: E731
    path = cache_variants([scan], encode, DenoiserPlan(), tmp_path / "crops", size=(8, 8, 8), **arguments)[0]
    rows = load_file(path)
    assert rows["augmented"].tolist() == [False] * 6 + [True] * 6
    places = set()
    for x in rows["x"][:6].float():
        windows = whole["image"].half().float().unfold(1, 8, 1).unfold(2, 8, 1).unfold(3, 8, 1)[0]
        found = (windows == x[0]).flatten(3).all(-1).nonzero()
        assert len(found) == 1  # a crop of the scan itself
        places.add(tuple(found[0].tolist()))
    assert len(places) == 6
    small = cache_variants([scan], encode, DenoiserPlan(), tmp_path / "whole", size=(16, 16, 16), **arguments)[0]
    assert load_file(small)["augmented"].tolist() == [False] + [True] * 11
    one = cache_variants(
        [scan], encode, DenoiserPlan(), tmp_path / "val", size=(8, 8, 8), **arguments | {"variants": 1}
    )
    torch.testing.assert_close(load_file(one[0])["x"][0].float(), whole["image"][:, 4:12, 4:12, 4:12])


@pytest.mark.parametrize(("acquired", "augmented"), [(1, 0), (1, 3), (4, 4)])
def test_half_of_the_draws_are_as_acquired_and_every_version_is_drawn(acquired, augmented):
    flags = torch.arange(acquired + augmented) >= acquired
    draws = torch.tensor([draw_variant(flags, seed) for seed in range(2000)])
    assert set(draws.tolist()) == set(range(acquired + augmented))
    if augmented:
        assert float((draws < acquired).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_the_typical_intensity_spans_the_median_ends_and_not_the_median_factors():
    ends = [(0.0, 100.0), (1000.0, 1010.0), (10.0, 400.0)]
    scans = []
    for low, high in ends:
        scale = 2 / (high - low)
        scans.append(CachedScan("c", "p", "s", (1,), (1.0,), (scale,), (-1 - low * scale,), (0, 1), 1))
    typical = typical_intensity(scans)
    restored = typical.inverse(torch.tensor([[-1.0, 1.0]]))
    torch.testing.assert_close(restored, torch.tensor([[10.0, 400.0]]))


def test_sizes_are_padded_to_what_compression_and_label_stride_both_divide():
    plan = dataclasses.replace(plan_for(None), size=(24, 24, 24), label_stride=3)
    assert plan.divisor == 4
    assert dataclasses.replace(plan, label=LabelPlan()).divisor == 12
