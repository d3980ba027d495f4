from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import norm
from skimage.feature import canny as skimage_canny
from skimage.filters import sobel as skimage_sobel

from medgen.conditions.edge import (
    EdgeMethod,
    EdgeSettings,
    boundary_f_score,
    check_edges,
    check_outlines,
    edge_channels,
    extract_edges,
    from_whole_numbers,
)
from medgen.types import BadInputError

METHODS = get_args(EdgeMethod)


def _texture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Smooth blobs with sharp outlines and some noise."""
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.standard_normal(shape), 5)
    return np.asarray(np.sign(smooth) + 0.05 * random.standard_normal(shape) + smooth / smooth.std())


def _ball(size: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """A ball with a soft surface off the grid's center, and every voxel's distance from its center."""
    center = np.array([size / 2 - 0.3, size / 2 + 0.2, size / 2])
    distance = np.linalg.norm(np.stack(np.indices((size,) * 3), -1) - center, axis=-1)
    return 1 / (1 + np.exp((distance - radius) / 0.5)), distance


def _edges(image: np.ndarray, **settings: object) -> np.ndarray:
    return extract_edges(torch.from_numpy(np.ascontiguousarray(image))[None], EdgeSettings(**settings))[0].numpy()  # type: ignore[arg-type]


def test_canny_agrees_with_scikit_image_within_one_pixel() -> None:
    image = _texture((160, 140))
    image = (image - image.min()) / np.ptp(image)
    smooth = ndimage.gaussian_filter(image, 1.5, mode="nearest")
    gradient = np.hypot(*(ndimage.sobel(smooth, axis=axis, mode="nearest") for axis in (0, 1)))
    ordered = np.sort(gradient, axis=None)
    below = np.cumsum(ordered) / ordered.sum()
    low, high = ordered[np.searchsorted(below, [0.3, 0.7])]
    expected = skimage_canny(image, 1.5, low, high, mode="nearest")
    found = _edges(image, smoothing=1.5, low=0.3, high=0.7) == 1
    inner = np.zeros_like(found)
    inner[3:-3, 3:-3] = True  # The other one leaves out the border.
    # A plane has an edge on about every fifth pixel here, so that chance agreement is far below.
    assert 0.05 < expected[inner].mean() < 0.2
    assert (ndimage.distance_transform_edt(~expected)[found & inner] <= 1).mean() > 0.99
    assert (ndimage.distance_transform_edt(~found)[expected & inner] <= 1).mean() > 0.99


def test_canny_of_a_ball_is_its_closed_surface_one_voxel_thick() -> None:
    image, distance = _ball(48, 15.7)
    found = _edges(image, smoothing=1.0) == 1
    offset = distance[found] - 15.7
    assert np.abs(offset).max() < 0.75
    assert abs(offset.mean()) < 0.1
    # One voxel per unit of area, where a shell two voxels thick has two.
    assert 0.9 < found.sum() / (4 * np.pi * 15.7**2) < 1.2
    regions, count = ndimage.label(~found)
    assert count == 2
    assert regions[24, 24, 24] != regions[0, 0, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_along_any_axis_is_a_plane_where_it_is(method: EdgeMethod, axis: int) -> None:
    image = np.zeros((18, 18, 18))
    np.moveaxis(image, axis, 0)[9:] = 1
    profile = np.moveaxis(_edges(image, method=method), axis, 0)
    assert (profile == profile[:, :1, :1]).all()
    line = profile[:, 0, 0]
    if method == "canny":
        assert np.flatnonzero(line).tolist() == [9]
    else:
        assert line[8] == pytest.approx(1) and line[9] == pytest.approx(1)
        assert (np.flatnonzero(line).tolist() == [8, 9]) == (method == "laplacian")
        assert line[:5].max() == 0 and line[13:].max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_permuted_axes_permute_the_edges(method: EdgeMethod) -> None:
    image = _texture((22, 25, 19), seed=3)
    found = _edges(image, method=method)
    assert found.max() == 1
    for order in itertools.permutations(range(3)):
        np.testing.assert_allclose(_edges(image.transpose(order), method=method), found.transpose(order), atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 50), (22, 25, 19)])
@pytest.mark.parametrize("method", METHODS)
def test_an_affine_change_of_intensity_changes_nothing(method: EdgeMethod, shape: tuple[int, ...]) -> None:
    image = _texture(shape)
    found = _edges(image, method=method)
    for scale, shift in ((1e-7, 0.0), (0.01, 0.5), (1000.0, -1024.0), (-3.0, 7.0)):
        np.testing.assert_allclose(_edges(image * scale + shift, method=method), found, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_without_contrast_has_no_edges(method: EdgeMethod) -> None:
    random = torch.Generator().manual_seed(0)
    for value in (0.0, 0.3, -1000.0):
        image = torch.full((2, 12, 13, 14), value) * (1 + 1e-7 * torch.rand(12, 13, 14, generator=random))
        found = extract_edges(image, EdgeSettings(method=method))
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.zeros(1, 12, 13, 14))
    assert torch.equal(
        extract_edges(torch.rand(1, 8, 8), EdgeSettings(), valid=torch.zeros(8, 8)), torch.zeros(1, 8, 8)
    )


@pytest.mark.parametrize("shape", [(40, 34), (20, 17, 22)])
@pytest.mark.parametrize("method", METHODS)
def test_padding_outside_the_field_of_view_leaves_the_edges_of_the_crop(
    method: EdgeMethod, shape: tuple[int, ...]
) -> None:
    image = _texture(shape) + 5
    for outside in (-3.0, np.nan):
        padded = torch.from_numpy(np.pad(image, 6, constant_values=outside))[None]
        valid = torch.from_numpy(np.pad(np.ones(shape, dtype=bool), 6))
        found = extract_edges(padded, EdgeSettings(method=method), valid=valid)
        np.testing.assert_allclose(found[0][valid].reshape(shape), _edges(image, method=method), atol=1e-4)
        assert (found[0][~valid] == 0).all()


def test_the_border_of_a_round_field_of_view_is_no_edge() -> None:
    distance = np.hypot(*(np.indices((64, 64)) - 31.5))
    valid = distance < 28
    image = np.where(valid, 1.0 + (distance < 12), 0.0)
    found = extract_edges(torch.from_numpy(image)[None], EdgeSettings(), valid=torch.from_numpy(valid))[0].numpy() > 0
    assert np.abs(distance[found] - 12).max() < 1.5
    assert np.abs(distance[_edges(image) > 0] - 28).min() < 1


@pytest.mark.parametrize("method", METHODS)
def test_each_channel_gives_its_edges(method: EdgeMethod) -> None:
    image = torch.zeros(2, 40, 40)
    image[0, :, 20:], image[1, 20:] = 1, -1
    found = extract_edges(image, EdgeSettings(method=method))[0]
    # A Canny edge lies on the brighter side of the step, which is the upper one of the second channel.
    assert (found[:16, 20] > 0.99).all() and (found[24:, 20] > 0.99).all()
    assert (found[19, :16] > 0.99).all() and (found[19, 24:] > 0.99).all()
    assert found[:14, :14].max() == 0


@pytest.mark.parametrize("method", ["canny", "laplacian"])
def test_a_ramp_has_no_outline(method: EdgeMethod) -> None:
    row, column = np.indices((60, 60))
    found = _edges(0.013 * row + 0.007 * column, method=method)
    assert found[12:-12, 12:-12].max() == 0


def test_a_weak_edge_stays_only_where_a_strong_one_continues_it() -> None:
    image = np.zeros((80, 60))
    image[:30, 30:] = np.linspace(6.0, 1.0, 30)[:, None]
    image[30:60, 30:] = 1.0
    image[70:, 10:20] = 1.0
    found = _edges(image, smoothing=1.0, low=0.05, high=0.7)
    assert (found[40:50, 30] == 1).all()
    assert found[66:, :25].max() == 0
    assert _edges(image, smoothing=1.0, low=0.05, high=0.2)[66:, :25].max() == 1


@pytest.mark.parametrize("shape", [(70, 60), (24, 22, 26)])
def test_sobel_is_the_gradient_of_scikit_image_between_two_shares_of_all_gradient(shape: tuple[int, ...]) -> None:
    image = _texture(shape)
    smooth = ndimage.gaussian_filter(np.pad(image, 9, mode="edge"), 1.2)
    expected = skimage_sobel(smooth)[(slice(9, -9),) * image.ndim]
    found = _edges(image, method="sobel", smoothing=1.2, low=0.1, high=0.8, scales=1)
    assert expected[found == 0].sum() / expected.sum() == pytest.approx(0.1, abs=0.005)
    assert expected[found < 1].sum() / expected.sum() == pytest.approx(0.8, abs=0.005)
    between = (found > 0) & (found < 1)
    slope, start = np.polyfit(expected[between], found[between], 1)
    np.testing.assert_allclose(found[between], slope * expected[between] + start, atol=1e-5)


@pytest.mark.parametrize("scales", [1, 3, 5])
def test_every_scale_counts_the_same_for_a_step(scales: int) -> None:
    position = np.arange(120) - 59.5
    image = np.repeat(position > 0, 20).reshape(120, 20) + 0.0
    found = _edges(image, method="sobel", smoothing=3.0, low=0.01, high=0.99, scales=scales)[:, 10]
    # The gradient of a smoothed step is a Gaussian, of the same height at each scale once multiplied by its sigma.
    expected = np.mean([np.exp(-0.5 * (position / (3 * 2 ** (k / 2))) ** 2) for k in range(scales)], axis=0)
    between = (found > 0) & (found < 1)
    slope, start = np.polyfit(expected[between], found[between], 1)
    np.testing.assert_allclose(found[between], slope * expected[between] + start, atol=0.02)


def test_laplacian_edges_lie_on_a_slanted_line_to_a_fraction_of_a_voxel() -> None:
    row, column = np.indices((50, 60))
    line = 24.3 + 0.2 * row
    image = norm.cdf((column - line) / 1.2)
    found = _edges(image, method="laplacian", high=0.9, low=0.01)[8:-8]
    center = (found * column[8:-8]).sum(1) / found.sum(1)
    assert np.abs(center - line[8:-8, 0]).max() < 0.2
    assert (found > 0).sum(1).max() <= 3


@pytest.mark.parametrize("method", METHODS)
def test_thick_slices_of_a_ball_have_the_edges_of_the_ball(method: EdgeMethod) -> None:
    image, _ = _ball(48, 15.7)
    cubic = _edges(image, method=method)
    thick = torch.from_numpy(image[:, :, ::4].copy())[None]
    settings = EdgeSettings(method=method)
    # Slices through the ball, where its outline is a circle; per voxel, the outline is lost among the slices.
    middle = slice(4, 9)
    agreement = []
    for spacing in ((1.0, 1.0, 4.0), None):
        found = extract_edges(thick, settings, spacing=spacing)[0].numpy()
        agreement.append(np.corrcoef(found[..., middle].ravel(), cubic[:, :, ::4][..., middle].ravel())[0, 1])
    assert agreement[0] > (0.75 if method == "laplacian" else 0.9)
    assert agreement[0] > agreement[1] + 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (1, 7, 9, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_images_have_finite_edges(method: EdgeMethod, shape: tuple[int, ...]) -> None:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = extract_edges(image, EdgeSettings(method=method))
    assert found.shape == shape
    check_edges(found, shape[1:])
    if shape[-1] == 1 and len(shape) == 4:
        flat = extract_edges(image[..., 0], EdgeSettings(method=method))
        torch.testing.assert_close(found[..., 0], flat, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "prewitt"}, "expected canny, sobel or laplacian, got 'prewitt'"),
        ({"smoothing": 0.0}, "expected a positive sigma in voxels, got 0.0"),
        ({"smoothing": float("nan")}, "expected a positive sigma in voxels, got nan"),
        ({"low": 0.7, "high": 0.6}, "expected 0 < low < high < 1, got low 0.7, high 0.6"),
        ({"low": 0.0}, "expected 0 < low < high < 1, got low 0.0"),
        ({"high": 1.0}, "expected 0 < low < high < 1, got low 0.2, high 1.0"),
        ({"scales": 0}, "edge scales: expected at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        EdgeSettings(**settings)  # type: ignore[arg-type]


def test_images_that_have_no_edges_to_speak_of_are_refused() -> None:
    image = torch.rand(1, 8, 9)
    with pytest.raises(BadInputError, match=r"expected one scan of shape \(C, H, W\[, D\]\), got \(8, 9\)"):
        extract_edges(image[0], EdgeSettings())
    with pytest.raises(BadInputError, match=r"got \(2, 1, 8, 9, 4\).*one by one"):
        extract_edges(torch.rand(2, 1, 8, 9, 4), EdgeSettings())
    with pytest.raises(BadInputError, match="expected finite intensities, got NaN or infinity"):
        extract_edges(torch.full((1, 8, 9), torch.inf), EdgeSettings())
    with pytest.raises(BadInputError, match=r"valid: expected the image's shape \(8, 9\), got \(1, 8, 9\)"):
        extract_edges(image, EdgeSettings(), valid=torch.ones(1, 8, 9, dtype=torch.bool))
    for spacing in ((1.0,), (1.0, 0.0)):
        with pytest.raises(BadInputError, match="spacing: expected 2 positive lengths in mm"):
            extract_edges(image, EdgeSettings(), spacing=spacing)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (torch.zeros(1, 8, 9), r"expected shape \(1, 8, 8\), got \(1, 8, 9\).*Resample"),
        (torch.zeros(8, 8), r"expected shape \(1, 8, 8\), got \(8, 8\)"),
        (torch.full((1, 8, 8), torch.nan), "expected values from 0 to 1, got NaN"),
        (torch.arange(64.0).view(1, 8, 8) * 4, "got 0 to 252. Divide an 8-bit map by 255.*extract its edges"),
        (torch.linspace(-1, 1, 64).view(1, 8, 8), "got -1 to 1"),
    ],
)
def test_edge_maps_that_do_not_fit_are_refused(edge: torch.Tensor, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        check_edges(edge, (8, 8))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_whole_numbers_are_edges_by_the_largest_of_their_bits(bits: int) -> None:
    whole = 2**bits - 1
    values = torch.tensor([0.0, whole])
    assert from_whole_numbers(values, bits).tolist() == [0, 1]
    assert not from_whole_numbers(torch.zeros(3), bits).any()
    if bits < 8:
        assert from_whole_numbers(values / whole, bits)[1] == 1 / whole
        return
    assert from_whole_numbers(values // 19, bits)[1] > 0.05  # the least that counts as gray
    with pytest.raises(
        BadInputError, match=rf"expected values from 0 to {whole} .*above 1, .*Multiply .* by {whole}\."
    ):
        from_whole_numbers(values / whole, bits)


def test_edge_maps_from_zero_to_one_pass() -> None:
    for edge in (torch.rand(1, 4, 5, 6), torch.ones(1, 4, 5, 6, dtype=torch.uint8), torch.zeros(1, 4, 5, 6).bool()):
        check_edges(edge, (4, 5, 6))


def _outlines(dims: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth scan of blobs, 0 to 1, and its Canny edges."""
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(48,) * dims), 4, mode="wrap")
    scan = (blobs - blobs.min()) / np.ptp(blobs)
    return scan, extract_edges(torch.from_numpy(scan)[None], EdgeSettings())[0].numpy()


@pytest.mark.parametrize("dims", [2, 3])
def test_outlines_pass_also_resized_and_smoothed_and_scans_do_not(dims: int) -> None:
    scan, edge = _outlines(dims)
    corner = scan * (np.indices(scan.shape).max(axis=0) < 24)  # in a black surround
    passing = [edge, np.zeros_like(edge), np.ones_like(edge), ndimage.gaussian_filter(edge, 0.5)]
    passing += [np.clip(ndimage.zoom(edge, factor, order=1), 0, 1) for factor in (0.5, 0.7, 1.5, 2)]
    for outlines in passing:
        check_outlines(torch.from_numpy(outlines)[None])
    for areas in (scan, 0.2 + 0.6 * scan, corner):
        with pytest.raises(BadInputError, match=r"expected outlines of 0 and 1, .*got gray areas \(\d+% of.*--edges"):
            check_outlines(torch.from_numpy(areas)[None])


@pytest.mark.parametrize("spatial", [(4, 5), (4, 5, 6)])
def test_no_edges_here_differs_from_no_edge_map(spatial: tuple[int, ...]) -> None:
    edge = torch.rand(3, 1, *spatial)
    edge[0], edge[2] = 0, torch.nan
    channels = edge_channels(edge, torch.tensor([True, True, False]))
    assert channels.shape == (3, 2, *spatial)
    assert torch.equal(channels[:2, :1], edge[:2])
    assert (channels[:2, 1] == 1).all()
    assert (channels[2] == 0).all()
    assert torch.equal(edge_channels(edge[:2]), channels[:2])


def test_edge_channels_refuse_other_shapes() -> None:
    with pytest.raises(BadInputError, match=r"edge: expected shape \(B, 1, H, W\[, D\]\), got \(2, 3, 4, 4\)"):
        edge_channels(torch.zeros(2, 3, 4, 4))
    with pytest.raises(BadInputError, match=r"present: expected shape \(2,\), got \(3,\)"):
        edge_channels(torch.zeros(2, 1, 4, 4), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (2, 1.0), (3, 0.0)])
@pytest.mark.parametrize("shape", [(30, 12), (30, 6, 7)])
def test_a_shifted_plane_matches_up_to_the_tolerance(shape: tuple[int, ...], shift: int, score: float) -> None:
    predicted, target = torch.zeros(2, *shape).unbind()
    target[10], predicted[10 + shift] = 1, 1
    assert boundary_f_score(predicted, target) == score


def test_precision_and_recall_make_the_score() -> None:
    target = torch.zeros(40, 10, dtype=torch.bool)
    target[5] = True
    predicted = target.clone()
    predicted[20], predicted[30] = True, True
    # A third of the prediction is right and all of the target is found, or the other way round.
    assert boundary_f_score(predicted, target) == pytest.approx(0.5)
    assert boundary_f_score(target, predicted) == pytest.approx(0.5)


def test_boundary_f_score_equals_a_nearest_neighbor_search() -> None:
    predicted, target = torch.rand(2, 12, 13, 14, generator=torch.Generator().manual_seed(0)) > 0.97
    for tolerance in (0.0, 1.0, 1.5, 2.0):
        precision = (cKDTree(target.nonzero()).query(predicted.nonzero())[0] <= tolerance).mean()
        recall = (cKDTree(predicted.nonzero()).query(target.nonzero())[0] <= tolerance).mean()
        expected = 2 * precision * recall / (precision + recall)
        assert boundary_f_score(predicted, target, tolerance) == pytest.approx(expected)


def test_empty_maps_agree_with_each_other_only() -> None:
    empty, full = torch.zeros(5, 6), torch.ones(5, 6)
    assert boundary_f_score(empty, empty) == 1.0
    assert boundary_f_score(empty, full) == boundary_f_score(full, empty) == 0.0


def test_the_score_refuses_maps_that_it_cannot_compare() -> None:
    edge = torch.zeros(5, 6)
    with pytest.raises(BadInputError, match=r"got \(5, 6\) and \(6, 5\)"):
        boundary_f_score(edge, edge.T)
    with pytest.raises(BadInputError, match=r"predicted edges: expected only 0 and 1.*Threshold"):
        boundary_f_score(edge + 0.5, edge)
    with pytest.raises(BadInputError, match="target edges: expected only 0 and 1"):
        boundary_f_score(edge, edge * torch.nan)
    with pytest.raises(BadInputError, match="tolerance: expected voxels from 0 on, got -1"):
        boundary_f_score(edge, edge, -1)
