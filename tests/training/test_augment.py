"""Bent versions of a scan: as far as the plan says in mm, smooth, image and label alike, and the grain is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from medgen.planning import DenoiserPlan
from medgen.training.augment import augment
from medgen.training.cache import CachedScan, cache_variants
from medgen.training.tensors import save_tensors

BENT = DenoiserPlan(rotation=0.0, scaling=0.0, elastic=0.1)
SPACINGS = [(1.0, 1.0, 2.0), (0.5, 2.0)]


def ramp(axis: int, spacing: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """A scan of edges of different length whose intensity is the position along one axis, -1 to 1, cut in two."""
    shape = [round(length / edge) for length, edge in zip((36, 48, 64), spacing, strict=False)]
    line = torch.linspace(-1, 1, shape[axis])
    image = line.view([-1 if other == axis % len(shape) else 1 for other in range(len(shape))]).expand(shape)
    valid = torch.ones(shape, dtype=torch.bool)
    return {"image": image[None].clone(), "label": (image > 0).to(torch.uint8), "valid": valid}


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_points_move_by_the_share_of_a_quarter_of_the_scan(spacing: tuple[float, ...], axis: int) -> None:
    tensors = ramp(axis, spacing)
    shape = tensors["label"].shape
    inner = tuple(slice(n // 4, 3 * n // 4) for n in shape)
    moves = []
    for seed in range(150):
        moved = augment(tensors, BENT, seed, spacing)
        voxels = (moved["image"] - tensors["image"])[0][inner] * (shape[axis] - 1) / 2
        moves.append(voxels[tuple(slice(None, None, 6) for _ in shape)] * spacing[axis])
    # By hand: the control points of a cubic B-spline are scaled so that the field has this deviation.
    mean_edge = math.prod((36, 48, 64)[: len(shape)]) ** (1 / len(shape))
    assert float(torch.stack(moves).std()) == pytest.approx(0.1 * mean_edge / 4, rel=0.08)
    assert abs(float(torch.stack(moves).mean())) < 0.15


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_image_and_label_are_bent_alike_and_smoothly(spacing: tuple[float, ...], axis: int) -> None:
    tensors = ramp(axis, spacing)
    step = 2 / (tensors["label"].shape[axis] - 1)
    moved = [augment(tensors, BENT, seed, spacing) for seed in range(4)]
    for row in moved:
        agree = ((row["image"][0] > 0) == (row["label"] > 0)) | (row["image"][0].abs() < 0.51 * step)
        assert agree[row["valid"]].all()
        assert row["label"].any()
        rim = tensors["label"].shape[axis] // 6  # beyond it the scan is mirrored
        steps = row["image"][0].movedim(axis, 0)[rim:-rim].diff(dim=0)
        assert float(steps.min()) > 0  # nothing folds
    assert not torch.equal(moved[0]["image"], moved[1]["image"])
    assert torch.equal(augment(tensors, BENT, 1, spacing)["image"], moved[1]["image"])


@pytest.mark.parametrize(("width", "kept"), [(0.0, 0.75), (0.7, 0.9)])
def test_most_of_the_grain_of_a_bent_scan_is_kept(width: float, kept: float) -> None:
    noise = np.random.default_rng(0).standard_normal((40, 40, 40))
    grain = torch.from_numpy(ndimage.gaussian_filter(noise, width)).float()[None]
    grain = 0.2 * grain / grain.std()
    tensors = {"image": grain, "label": torch.zeros(40, 40, 40, dtype=torch.uint8), "valid": torch.ones(40, 40, 40) > 0}

    def fine(image: torch.Tensor) -> float:
        return float((image - torch.from_numpy(ndimage.gaussian_filter(image[0].numpy(), 1.0))).std())

    bent = augment(tensors, DenoiserPlan(elastic=0.09), 0, (1.0,) * 3)["image"]
    turned = augment(tensors, DenoiserPlan(), 0, (1.0,) * 3)["image"]
    assert fine(bent) > kept * fine(grain)
    assert fine(turned) < (kept - 0.1) * fine(grain)  # which is why those are told apart


@pytest.mark.parametrize("spacing", [(1.2, 1.25), (1.0, 1.0, 3.0)])
def test_lengths_that_rounding_puts_beyond_the_last_control_point(spacing: tuple[float, ...]) -> None:
    shape = (96, 4) if len(spacing) == 2 else (8, 8, 1)
    tensors = {"image": torch.zeros(1, *shape), "label": torch.ones(shape, dtype=torch.uint8)}
    moved = augment(tensors | {"valid": torch.ones(shape, dtype=torch.bool)}, BENT, 0, spacing)
    assert moved["label"].shape == shape


def test_bent_versions_count_as_acquired(tmp_path: Path) -> None:
    tensors = ramp(0, (2.0, 2.0))
    save_tensors(tensors, tmp_path / "scan.safetensors", {})
    scan = CachedScan("a", str(tmp_path / "scan.safetensors"), "", (24, 24), (2.0, 2.0), 1.0, 0.0, (0, 1), (1,))
    for elastic, flags in ((0.0, [False, True, True, True]), (0.09, [False] * 4)):
        given = {"size": (24, 24), "variants": 4, "seed": 0, "title": "test"}
        plan, folder = DenoiserPlan(elastic=elastic), tmp_path / str(elastic)
        rows = load_file(cache_variants([scan], lambda one: one["image"], plan, folder, **given)[0])
        assert rows["augmented"].tolist() == flags
        assert torch.equal(rows["x"][0].float(), tensors["image"].half().float())
        assert all(not torch.equal(rows["x"][0], other) for other in rows["x"][1:])
        assert math.isfinite(float(rows["x"].float().sum()))
