from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric
from PIL import Image
from scipy import ndimage
from scipy.interpolate import BSpline

from medgen.conditions.deformation import (
    Deformation,
    _class_distances,
    _warp,
    deform_label,
    displacement,
    jacobian,
)
from medgen.types import BadInputError

DATA = Path(os.environ.get("MEDGEN_DATA", Path(__file__).parents[3] / "shared" / "data"))


def _heart(size: int = 64) -> torch.Tensor:
    """Disk in a ring, with a crescent beside it: three classes that touch each other."""
    y, x = np.mgrid[:size, :size]
    radius = np.hypot(y - 0.5 * size, x - 0.55 * size)
    label = np.where(np.hypot(y - 0.5 * size, x - 0.38 * size) < 0.2 * size, 1, 0)
    label[radius < 0.2 * size] = 2
    label[radius < 0.13 * size] = 3
    return torch.from_numpy(label.astype(np.int16))


def _ellipsoid(shape: tuple[int, ...] = (28, 34, 24)) -> torch.Tensor:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    inside = (grid**2 * np.asarray([3.0, 2.5, 4.0])[:, None, None, None]).sum(0) < 1
    return torch.from_numpy((inside * (1 + (grid[1] > 0))).astype(np.int16))


def _record(label: torch.Tensor, **changes: object) -> Deformation:
    dims = label.ndim
    record: dict = {
        "shape": tuple(label.shape),
        "spacing": (1.0,) * dims,
        "center": tuple((n - 1) / 2 for n in label.shape),
        "rotation": (0.0,) * (1 if dims == 2 else 3),
        "scaling": (1.0,) * dims,
        "translation": (0.0,) * dims,
        "elastic": 0.0,
        "control_spacing": 8.0,
        "elastic_seed": 3,
    }
    return Deformation(**(record | changes))


def warp(label: torch.Tensor, record: Deformation) -> torch.Tensor:
    """Deform as recorded; nothing is drawn."""
    return torch.from_numpy(_warp(*_class_distances(label.numpy().astype(np.int32), record.spacing), record)).to(
        label.dtype
    )


def _components(array: np.ndarray, value: int) -> tuple[int, int]:
    inside = np.pad(array == value, 1)
    return ndimage.label(inside, np.ones((3,) * array.ndim))[1], ndimage.label(~inside)[1]


def test_quarter_turns_about_each_axis_equal_numpy() -> None:
    flat = torch.randint(0, 4, (15, 15), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    turned = warp(flat, _record(flat, rotation=(90.0,)))
    np.testing.assert_array_equal(turned, np.rot90(flat, 1, (0, 1)))
    cube = torch.randint(0, 4, (11, 11, 11), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    for axis, plane in enumerate([(1, 2), (2, 0), (0, 1)]):
        rotation = tuple(90.0 if index == axis else 0.0 for index in range(3))
        np.testing.assert_array_equal(
            warp(cube, _record(cube, rotation=rotation)), np.rot90(cube, 1, plane), err_msg=str(axis)
        )


def test_a_shift_is_in_mm_along_array_axes() -> None:
    label = _ellipsoid()
    moved = warp(label, _record(label, spacing=(1.0, 0.5, 3.0), translation=(-2.0, 1.5, 3.0)))
    np.testing.assert_array_equal(moved, np.roll(label, (-2, 3, 1), (0, 1, 2)))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.2, 2.0)])
def test_the_affine_part_agrees_with_scipy(spacing: tuple[float, ...]) -> None:
    label = _ellipsoid()
    steps, scaling = np.asarray(spacing), np.asarray([1.15, 0.9, 1.1])
    center = (np.asarray(label.shape) - 1) / 2 * steps
    record = _record(
        label, spacing=spacing, center=tuple(center), rotation=(8.0, -12.0, 20.0), scaling=tuple(scaling),
        translation=(1.0, -2.0, 0.5),
    )  # fmt: skip
    turn = np.eye(3)
    for plane, degrees in zip([(1, 2), (2, 0), (0, 1)], record.rotation, strict=True):
        single = np.eye(3)
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        single[np.ix_(plane, plane)] = [[c, -s], [s, c]]
        turn = single @ turn
    pull = np.linalg.inv(turn @ np.diag(scaling))
    matrix = np.diag(1 / steps) @ pull @ np.diag(steps)
    offset = (center - pull @ (center + np.asarray(record.translation))) / steps
    expected = ndimage.affine_transform(label.numpy(), matrix, offset, order=0)
    result = warp(label, record)
    dice = DiceMetric(include_background=False, num_classes=3)(
        result[None, None], torch.from_numpy(expected)[None, None]
    )
    assert float(dice.min()) > 0.95


def test_surfaces_are_closer_to_the_true_shape_than_by_nearest_neighbor() -> None:
    y, x = np.mgrid[:81, :81] - 40.0
    angle = np.deg2rad(17)
    truth = [
        ((np.cos(a) * y + np.sin(a) * x) / 30) ** 2 + ((np.cos(a) * x - np.sin(a) * y) / 9) ** 2 < 1 for a in (0, angle)
    ]
    c, s = np.cos(angle), np.sin(angle)
    center = np.asarray([40.0, 40.0])
    back = np.asarray([[c, s], [-s, c]])
    nearest = ndimage.affine_transform(truth[0].astype(np.uint8), back, center - back @ center, order=0)
    source = torch.from_numpy(truth[0].astype(np.int16))
    smooth = warp(source, _record(source, rotation=(17.0,))).numpy()
    wrong_smooth, wrong_nearest = (int((result != truth[1]).sum()) for result in (smooth, nearest))
    assert wrong_nearest < 150, "the oracle itself turns the other way"
    assert wrong_smooth < wrong_nearest


def test_no_background_opens_where_three_classes_meet() -> None:
    y, x = np.mgrid[:60, :60] - 29.5
    label = torch.from_numpy(np.where(np.hypot(y, x) < 25, 1 + (np.arctan2(y, x) + np.pi) // (2 * np.pi / 3 + 1e-9), 0))
    label = label.to(torch.int16)
    for step in range(64):
        shift = (step // 8 / 8, step % 8 / 8)
        moved = warp(label, _record(label, rotation=(float(step),), translation=shift)).numpy()
        assert (moved[np.hypot(y, x) < 22] > 0).all()


@pytest.mark.parametrize("shape", [(40, 33), (20, 26, 17)])
def test_the_elastic_part_equals_scipys_cubic_b_spline(shape: tuple[int, ...]) -> None:
    label = torch.ones(shape, dtype=torch.int16)
    record = _record(label, elastic=2.0, control_spacing=7.0)
    counts = [int((n - 1) // 7) + 4 for n in shape]
    noise = torch.randn(*counts, len(shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    field = noise * 2.0 / (151 / 315) ** (len(shape) / 2)
    points = [np.arange(n) * 1.0 for n in shape]
    for axis, axis_points in enumerate(points):
        knots = (np.arange(counts[axis] + 4) - 3) * 7.0
        field = np.moveaxis(BSpline(knots, field, 3, axis=axis)(axis_points), axis, axis)
    np.testing.assert_allclose(displacement(record, points), field, atol=1e-12)


def test_the_field_has_the_recorded_standard_deviation() -> None:
    label = torch.ones(64, 64, dtype=torch.int16)
    points = [np.arange(64.0)] * 2
    fields = [displacement(_record(label, elastic=2.0, elastic_seed=seed), points) for seed in range(60)]
    assert np.std(fields) == pytest.approx(2.0, rel=0.03)


def test_the_jacobian_equals_finite_differences_and_predicts_the_volume() -> None:
    label = _ellipsoid((44, 48, 40))
    record = _record(
        label, rotation=(5.0, -8.0, 3.0), scaling=(1.1, 0.95, 1.2), elastic=0.8, control_spacing=12.0, elastic_seed=8
    )
    axes = [np.arange(n) * 1.0 for n in label.shape]
    matrices = jacobian(record, axes)
    affine_only = jacobian(_record(label, rotation=record.rotation, scaling=record.scaling), axes)
    step = 1e-4
    for along in range(3):
        moved = [[axis + sign * step if index == along else axis for index, axis in enumerate(axes)] for sign in (0, 1)]
        slope = (displacement(record, moved[1]) - displacement(record, moved[0])) / step
        inner = tuple(slice(None, -1) for _ in range(3))
        np.testing.assert_allclose(
            (matrices - affine_only)[inner][..., along], slope[inner], atol=1e-3, err_msg=f"axis {along}"
        )
    deformed = warp(label, record)
    # Source volume is the integral of the determinant over the deformed organ.
    source_volume = np.linalg.det(matrices)[deformed.numpy() > 0].sum()
    assert source_volume == pytest.approx(int((label > 0).sum()), rel=0.02)


@pytest.mark.parametrize("label", [_heart(), _ellipsoid()], ids=["2D", "3D"])
def test_one_seed_gives_one_map_which_its_record_describes(label: torch.Tensor) -> None:
    spacing = (1.0,) * label.ndim
    first, record = deform_label(label, generator=torch.Generator().manual_seed(5), spacing=spacing)
    second, again = deform_label(label, generator=torch.Generator().manual_seed(5), spacing=spacing)
    other, _ = deform_label(label, generator=torch.Generator().manual_seed(6), spacing=spacing)
    assert torch.equal(first, second)
    assert record == again
    assert not torch.equal(first, other)
    assert first.dtype == label.dtype
    assert torch.equal(warp(label, record), first)


def test_draws_stay_in_their_ranges_and_fill_them() -> None:
    label, generator = _heart(), torch.Generator().manual_seed(0)
    records = [
        deform_label(
            label, generator=generator, spacing=(1.0, 1.0), rotation=20, scaling=0.25, translation=3, elastic=0
        )[1]
        for _ in range(40)
    ]
    for values, limit in [
        (np.asarray([record.rotation for record in records]), 20),
        (np.log([record.scaling for record in records]), np.log(1.25)),
        (np.asarray([record.translation for record in records]), 3),
    ]:
        assert 0.8 * limit < np.abs(values).max() <= limit
        assert values.min() < -0.5 * limit < 0.5 * limit < values.max()


def test_a_structure_that_the_border_cuts_goes_on_beyond_it() -> None:
    label = torch.zeros(40, 40, dtype=torch.int16)
    label[:12, 10:30] = 1
    moved = warp(label, _record(label, translation=(6.0, 0.0)))
    expected = torch.zeros_like(label)
    expected[:18, 10:30] = 1
    assert torch.equal(moved, expected)
    deformed, _ = deform_label(label, generator=torch.Generator().manual_seed(0), spacing=(1.0, 1.0))
    assert not deformed[-1].any() and not deformed[:, 0].any() and not deformed[:, -1].any()


def test_every_accepted_map_keeps_classes_components_holes_and_borders() -> None:
    label = _heart(48)
    label[3:6, 3:6] = 1
    label[24, 12] = 0
    for seed in range(15):
        deformed, _ = deform_label(
            label, generator=torch.Generator().manual_seed(seed), spacing=(1.0, 1.0), elastic=3.0, translation=4.0
        )
        array = deformed.numpy()
        assert not (array[0].any() or array[-1].any() or array[:, 0].any() or array[:, -1].any())
        for value in (1, 2, 3):
            assert _components(array, value) == _components(label.numpy(), value)


def _refusals() -> list[tuple[torch.Tensor, dict, str]]:
    tight = torch.zeros(24, 24, dtype=torch.int16)
    tight[1:-1, 1:-1] = 1
    specks = torch.zeros(48, 48, dtype=torch.int16)
    specks[4:44:3, 4:44:3] = 1
    return [
        (tight, {"scaling": 0.0, "rotation": 45.0}, "class 1 cut by the field of view"),
        (specks, {}, r"got none in 50 draws \(.*class 1 split or merged"),
        (_heart(), {"elastic": 30.0, "control_spacing": 8.0}, r"50x folded or implausibly stretched\)"),
        (
            _heart(),
            {"elastic": 0.0, "rotation": 0.0, "scaling": 0.0, "translation": 1e-6},
            "50x too weak to move a voxel",
        ),
    ]


@pytest.mark.parametrize(("label", "options", "message"), _refusals())
def test_an_impossible_request_says_why_and_what_to_do(label: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        deform_label(label, generator=torch.Generator().manual_seed(0), spacing=(1.0, 1.0), **options)
    assert "Lower the strengths" in str(caught.value)


def test_crowds_may_merge_where_the_user_allows_it() -> None:
    label = _refusals()[1][0]
    deformed, _ = deform_label(
        label, generator=torch.Generator().manual_seed(0), spacing=(1.0, 1.0), keep_components=False
    )
    assert deformed.any() and not torch.equal(deformed, label)


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (torch.zeros(8, 8, dtype=torch.int16), {}, "expected at least one foreground voxel"),
        (torch.ones(8, 8), {}, "expected integer class indices, got torch.float32"),
        (torch.ones(1, 1, 8, 8, dtype=torch.int16), {}, r"expected \(H, W\) or \(H, W, D\)"),
        (-torch.ones(8, 8, dtype=torch.int16), {}, "with values from -1"),
        (_heart(), {"spacing": (1.0,)}, "spacing: expected 2 positive lengths"),
        (_heart(), {"spacing": (1.0, 0.0)}, "spacing: expected 2 positive lengths"),
        (_heart(), {"rotation": -1.0}, "rotation: expected a finite strength"),
        (_heart(), {"elastic": float("nan")}, "elastic: expected a finite strength"),
        (_heart(), {"control_spacing": 0.0}, "control_spacing: expected a positive length"),
        (_heart(), {"max_attempts": 0}, "max_attempts: expected at least 1"),
        (_heart(), {"rotation": 0, "scaling": 0, "translation": 0, "elastic": 0}, "expected a strength above 0"),
    ],
)
def test_bad_arguments_are_named(label: torch.Tensor, options: dict, message: str) -> None:
    arguments = {"spacing": (1.0,) * min(label.ndim, 3)} | options
    with pytest.raises(BadInputError, match=message):
        deform_label(label, generator=torch.Generator(), **arguments)


@pytest.mark.parametrize(("name", "suffix", "step"), [("hippocampus3d", "nii.gz", 30), ("cardiac_acdc", "png", 60)])
def test_real_label_maps_deform_plausibly(name: str, suffix: str, step: int) -> None:
    paths = sorted((DATA / name / "labels").glob(f"*.{suffix}"))[::step]
    if not paths:
        pytest.skip(f"real data set {name} is not in {DATA}; set MEDGEN_DATA to the folder that holds it")
    ratios = []
    for seed, path in enumerate(paths):
        array = np.asarray(nibabel.load(path).dataobj if suffix == "nii.gz" else Image.open(path)).astype(np.int16)
        deformed, _ = deform_label(
            torch.from_numpy(array), generator=torch.Generator().manual_seed(seed), spacing=(1.0,) * array.ndim
        )
        for value in np.unique(array)[1:]:
            assert _components(deformed.numpy(), value) == _components(array, value), path.name
            ratios.append(int((deformed == value).sum()) / int((array == value).sum()))
    assert 0.8 < np.median(ratios) < 1.25
    assert min(ratios) > 0.4 and max(ratios) < 2.5


def test_beyond_the_border_a_map_is_mirrored_and_not_drawn_out_into_bars() -> None:
    y, x = np.mgrid[:48, :48]
    label = torch.from_numpy((np.hypot(y - 3, x - 24) < 9).astype(np.int16))  # a cell that the first row cuts
    moved = warp(label, _record(label, translation=(12.0, 0.0)))
    assert torch.equal(moved[12:24], label[:12])
    assert torch.equal(moved[:12], moved[13:25].flip(0))
    whole = warp(label, _record(label, translation=(-40.0, 0.0)))  # past the last row, which cuts nothing
    assert not whole.any()
