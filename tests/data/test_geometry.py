"""Placement on the model grid, against nibabel, SciPy, NumPy and PyTorch."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to

from medgen.data.geometry import Placement, from_model, place, to_model, valid_mask
from medgen.types import Grid

ALL_CODES = [
    "".join(codes) for axes in itertools.permutations(("LR", "PA", "IS")) for codes in itertools.product(*axes)
]
ANISOTROPIC = (0.7, 1.3, 3.0)


def oblique_affine(codes: str = "RAS", spacing: tuple[float, ...] = ANISOTROPIC, degrees: float = 20.0) -> np.ndarray:
    """An affine whose axes point near `codes`, tilted about all three axes."""
    angles = np.deg2rad([degrees, -degrees / 2, degrees / 3])
    tilt = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        tilt = tilt @ turn
    axes = nib.orientations.inv_ornt_aff(axcodes2ornt(tuple(codes)), (1, 1, 1))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes.T.round() @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 12.25, 101.0)
    assert nib.aff2axcodes(affine) == tuple(codes)
    return affine


def world(shape: tuple[int, ...], affine: np.ndarray) -> torch.Tensor:
    """``(3, *shape)`` RAS mm of every voxel."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    spatial = len(shape)
    return torch.from_numpy(np.tensordot(affine[:3, :spatial], index, 1) + affine[:3, 3].reshape(3, *(1,) * spatial))


def placed(array: torch.Tensor, placement: Placement, mode: str = "linear") -> torch.Tensor:
    return to_model(array, placement, mode=mode, padding="constant", value=0)


@pytest.mark.parametrize("target", ["RAS", "LPS", "PIR"])
def test_reorients_every_orientation_as_nibabel_does(target: str) -> None:
    data = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    for codes in ALL_CODES:
        image = nib.Nifti1Image(data.numpy(), oblique_affine(codes))
        moves = ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(target)))
        expected = nib.as_closest_canonical(image) if target == "RAS" else image.as_reoriented(moves)
        placement = place(Grid((5, 6, 7), image.affine), orientation=target)
        moved = placed(data, placement)
        np.testing.assert_array_equal(moved.numpy(), expected.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(placement.affine, expected.affine, atol=1e-9)
        assert nib.aff2axcodes(placement.affine) == tuple(target)
        assert torch.equal(from_model(moved, placement, mode="linear"), data)


def positions_in(affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """``(3, *shape)`` RAS mm to voxel indices of another grid."""
    inverse = torch.from_numpy(np.linalg.inv(affine))
    return torch.tensordot(inverse[:3, :3], points, 1) + inverse[:3, 3].view(3, *(1,) * (points.ndim - 1))


def deep_inside(position: torch.Tensor, shape: tuple[int, ...], margin: list[float]) -> torch.Tensor:
    """Where no kernel of half-width `margin` (voxels, per axis) reaches over the border."""
    size, reach = (torch.tensor(values).view(3, *(1,) * (position.ndim - 1)) for values in (shape, margin))
    return ((position >= reach) & (position <= size - 1 - reach)).all(0)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAI"])
@pytest.mark.parametrize("spacing", [(0.5, 0.9, 1.1), (0.7, 0.65, 2.9)])
def test_finer_grids_match_nibabel_resampling(codes: str, spacing: tuple[float, ...]) -> None:
    data = torch.randn(9, 8, 6, generator=torch.Generator().manual_seed(1))
    affine = oblique_affine(codes, spacing=(1.2, 1.2, 3.0))
    placement = place(Grid((9, 8, 6), affine), spacing=spacing, orientation="RAS")
    target = (placement.shape, placement.affine)
    linear = resample_from_to(nib.Nifti1Image(data.numpy(), affine), target, order=1, mode="nearest")
    np.testing.assert_allclose(placed(data, placement).numpy(), linear.get_fdata(), atol=1e-5)
    label = (data > 0).to(torch.int16)
    nearest = resample_from_to(nib.Nifti1Image(label.numpy(), affine), target, order=0, mode="nearest")
    position = positions_in(affine, world(placement.shape, placement.affine))
    untied = ((position % 1 - 0.5).abs() > 1e-6).all(0).numpy()
    assert untied.mean() > 0.7
    np.testing.assert_array_equal(
        placed(label, placement, "nearest").numpy()[untied], np.asarray(nearest.dataobj)[untied]
    )


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_coarser_grids_match_antialiased_interpolation_of_pytorch(factor: int) -> None:
    image = torch.randn(3, 24, 36, generator=torch.Generator().manual_seed(2))
    placement = place(Grid((24, 36), np.eye(4)), spacing=(factor, factor))
    expected = torch.nn.functional.interpolate(
        image[None], (24 // factor, 36 // factor), mode="bilinear", antialias=True, align_corners=False
    )[0]
    torch.testing.assert_close(placed(image, placement), expected, atol=1e-5, rtol=0)


def test_down_sampling_does_not_alias() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 8, 64).contiguous()
    coarse = placed(stripes, place(Grid((8, 64), np.eye(4)), spacing=(1, 2.5)))
    assert (coarse[..., 2:-2] - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAI", "SPL"])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (0.31, 2.2, 5.0)])
def test_a_field_of_world_coordinates_keeps_them_through_all_steps(
    codes: str, spacing: tuple[float, ...] | None
) -> None:
    affine = oblique_affine(codes)
    shape = (40, 33, 27)
    placement = place(Grid(shape, affine), spacing=spacing, orientation="RAS", divisor=16, min_size=64)
    field = world(shape, affine)
    moved = placed(field, placement)
    assert moved.shape[1:] == placement.shape
    # Inside, where no kernel is cut off by the border, linear interpolation keeps a linear field; the widened kernel
    # of a coarser grid, sampled at whole voxels, may be off by some hundredths of a voxel.
    tolerance = 1e-6 if spacing is None else 0.05 * max(*spacing, *ANISOTROPIC)
    points = world(placement.shape, placement.affine)
    reach = [
        max(1.0, new / old) for new, old in zip(canonical(placement.grid.spacing, codes), ANISOTROPIC, strict=True)
    ]
    inside = deep_inside(positions_in(affine, points), shape, reach)
    assert inside.sum() > 100
    torch.testing.assert_close(moved[:, inside], points[:, inside], atol=tolerance, rtol=0)
    # On the way back the kernel reaches over the padding, which `to_model` put outside of the field of view.
    back = from_model(points, placement, mode="linear")
    reach = [1 + 2 * max(1.0, new / old) for new, old in
             zip(canonical(placement.grid.spacing, codes), ANISOTROPIC, strict=True)]  # fmt: skip
    core = deep_inside(positions_in(affine, field), shape, reach)
    assert core.sum() > 100
    torch.testing.assert_close(back[:, core], field[:, core], atol=tolerance, rtol=0)


def canonical(values: tuple[float, ...], codes: str) -> list[float]:
    """Values along R/L, A/P, S/I, in the order of a file with these axis codes."""
    order = ["RL", "AP", "SI"]
    return [next(value for value, pair in zip(values, order, strict=True) if code in pair) for code in codes]


def test_the_center_of_the_field_of_view_stays_when_sizes_do_not_divide() -> None:
    affine = oblique_affine("LPI")
    placement = place(Grid((10, 11, 7), affine), spacing=(0.77, 2.9, 1.23), orientation="RAS")
    centres = [
        grid_affine @ [*((np.array(shape) - 1) / 2), 1]
        for grid_affine, shape in ((affine, (10, 11, 7)), (placement.affine, placement.resampled_shape))
    ]
    np.testing.assert_allclose(*centres, atol=1e-9)
    np.testing.assert_allclose(placement.grid.spacing, (0.77, 2.9, 1.23), atol=1e-9)


def test_labels_return_unchanged_from_a_finer_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(0, 5, (11, 9, 8), generator=generator, dtype=torch.int16)
    for spacing in [(0.5, 0.6, 1.0), (0.7, 1.3, 3.0), (0.21, 1.299, 2.2)]:
        placement = place(Grid((11, 9, 8), oblique_affine("RAS")), spacing=spacing, divisor=8)
        moved = placed(label, placement, "nearest")
        assert moved.dtype == torch.int16
        assert torch.equal(from_model(moved, placement, mode="nearest"), label)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.8, 1.7, 0.5)])
def test_the_same_scan_stored_mirrored_gives_the_same_model_input(mode: str, spacing: tuple[float, ...]) -> None:
    data = torch.randint(0, 99, (12, 16, 10), generator=torch.Generator().manual_seed(4)).float()
    straight = place(Grid((12, 16, 10), np.diag([1.0, 1, 1, 1])), spacing=spacing, divisor=4)
    mirrored = place(Grid((12, 16, 10), np.array([[-1.0, 0, 0, 11], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
                     spacing=spacing, divisor=4)  # fmt: skip
    np.testing.assert_allclose(straight.affine, mirrored.affine, atol=1e-9)
    torch.testing.assert_close(placed(data, straight, mode), placed(data.flip(0), mirrored, mode), atol=1e-4, rtol=0)


def test_a_symmetric_label_stays_symmetric_on_a_coarser_grid() -> None:
    half = torch.randint(0, 5, (3, 8), generator=torch.Generator().manual_seed(5), dtype=torch.int16)
    label = torch.cat([half, half.flip(1)], dim=1)
    for spacing in (2.0, 4.0, 8.0):  # every new center lies half-way between two voxels
        moved = placed(label, place(Grid((3, 16), np.eye(4)), spacing=(1, spacing)), "nearest")
        assert torch.equal(moved, moved.flip(1))


def test_padding_repeats_reflections_as_numpy_does() -> None:
    data = torch.arange(3 * 1 * 5).reshape(3, 1, 5).float()
    placement = place(Grid((3, 1, 5), np.eye(4)), min_size=(16, 4, 9), divisor=4)
    assert placement.shape == (16, 4, 12)
    expected = np.pad(data.numpy(), placement.padding, mode="reflect")
    moved = to_model(data, placement, mode="linear", padding="reflect")
    np.testing.assert_array_equal(moved.numpy(), expected)
    assert torch.equal(from_model(moved, placement, mode="linear"), data)
    constant = to_model(data, placement, mode="linear", padding="constant", value=-7)
    np.testing.assert_array_equal(constant.numpy(), np.pad(data.numpy(), placement.padding, constant_values=-7))


def test_valid_mask_is_where_constant_padding_is_not() -> None:
    placement = place(Grid((5, 6, 7), oblique_affine("PIR")), spacing=(1, 1, 1), divisor=8, min_size=16)
    ones = placed(torch.ones(5, 6, 7), placement)
    torch.testing.assert_close(valid_mask(placement).float(), ones)
    assert valid_mask(placement).shape == placement.shape


def test_nothing_is_cropped_and_sizes_divide() -> None:
    for size in (1, 15, 16, 17, 40):
        placement = place(Grid((size, size), np.eye(4)), min_size=16, divisor=8)
        assert all(n >= max(16, size) and n % 8 == 0 and n < max(16, size) + 8 for n in placement.shape)
        assert all(abs(before - after) <= 1 for before, after in placement.padding)


def test_a_scan_without_stated_geometry_is_only_padded() -> None:
    grid = Grid((5, 6, 7), oblique_affine("LPI"), known=False)
    placement = place(grid, spacing=(2, 2, 2), orientation="RAS", divisor=8)
    assert placement.orientation is None and placement.spacing is None
    assert placement.resampled_shape == (5, 6, 7)
    assert place(Grid((5, 6), np.eye(4), known=False), spacing=(2, 2)).shape == (5, 6)


def test_a_2d_scan_keeps_its_axes_and_is_resampled() -> None:
    affine = np.array([[0, -0.5, 0, 3], [-2.0, 0, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]])
    placement = place(Grid((20, 31), affine), spacing=(1, 1), orientation="RAS", divisor=8)
    assert placement.orientation is None and placement.resampled_shape == (40, 16)
    field = world((20, 31), affine)
    moved = placed(field, placement)
    inner = (slice(None), slice(4, 36), slice(4, 12))
    torch.testing.assert_close(moved[inner], world(placement.shape, placement.affine)[inner], atol=1e-9, rtol=0)


def test_rounding_noise_in_a_header_does_not_resample() -> None:
    placement = place(Grid((8, 8, 8), np.diag([1.0001, 0.99995, 2, 1])), spacing=(1, 1, 2))
    data = torch.randn(8, 8, 8)
    assert placement.spacing is None
    assert torch.equal(placed(data, placement), data)


def test_accepts_leading_axes_numpy_integers_and_half_precision() -> None:
    placement = place(Grid((4, 5, 6), oblique_affine("SAL")), spacing=(1, 1, 1))
    batch = np.random.default_rng(0).integers(0, 1000, (2, 3, 4, 5, 6)).astype(np.int32)
    moved = placed(torch.from_numpy(batch).half(), placement)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, to_model(batch, placement, mode="linear", padding="constant"))
    torch.testing.assert_close(moved[1, 2], to_model(batch[1, 2], placement, mode="linear", padding="constant"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orientation": "RAX"}, "orientation: expected one of each of L/R, P/A and I/S.*got 'RAX'"),
        ({"orientation": "RLS"}, "orientation: expected"),
        ({"spacing": (1, 1)}, "spacing: expected 3 positive lengths in mm"),
        ({"spacing": (1, 0, 1)}, "spacing: expected 3 positive lengths in mm"),
        ({"min_size": (8, 8)}, "min_size: expected 3 values"),
        ({"divisor": 0}, "divisor: expected an integer of at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(Grid((4, 4, 4), np.eye(4)), **arguments)


def test_arrays_and_options_that_do_not_fit_are_refused() -> None:
    placement = place(Grid((4, 4, 4), np.eye(4)), divisor=8)
    with pytest.raises(ValueError, match=r"expected the last axes to be \(4, 4, 4\), got shape \(4, 4, 5\)"):
        placed(torch.zeros(4, 4, 5), placement)
    with pytest.raises(ValueError, match=r"expected the last axes to be \(8, 8, 8\)"):
        from_model(torch.zeros(4, 4, 4), placement, mode="linear")
    with pytest.raises(ValueError, match="mode: expected 'linear' or 'nearest', got 'cubic'"):
        placed(torch.zeros(4, 4, 4), placement, "cubic")
    with pytest.raises(ValueError, match="padding: expected 'reflect' or 'constant', got 'wrap'"):
        to_model(torch.zeros(4, 4, 4), placement, mode="linear", padding="wrap")


def test_a_real_scan_survives_another_storage_order_and_the_way_back(real_data: Path) -> None:
    files = sorted((real_data / "hippocampus3d" / "images").glob("*.nii.gz"))[:3]
    if not files:
        pytest.skip(f"no hippocampus3d in {real_data}")
    for file in files:
        straight = nib.load(file)
        moves = ornt_transform(axcodes2ornt(("R", "A", "S")), axcodes2ornt(("P", "I", "L")))
        turned = straight.as_reoriented(moves)
        assert nib.aff2axcodes(turned.affine) == ("P", "I", "L")
        inputs = []
        for image in (straight, turned):
            data = torch.from_numpy(image.get_fdata(dtype=np.float32).copy())
            plain = place(Grid(image.shape, image.affine), divisor=8)
            back = from_model(to_model(data, plain, mode="linear", padding="reflect"), plain, mode="linear")
            assert torch.equal(back, data)
            placement = place(Grid(image.shape, image.affine), spacing=(0.8, 1.5, 1.0), divisor=8)
            inputs.append((to_model(data, placement, mode="linear", padding="reflect"), placement.affine))
        np.testing.assert_allclose(inputs[0][1], inputs[1][1], atol=1e-5)
        torch.testing.assert_close(inputs[0][0], inputs[1][0], rtol=1e-4, atol=1e-2)
