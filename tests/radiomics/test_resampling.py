"""Resampling against what must hold, SciPy's splines and, where it is installed, PyRadiomics."""

import logging

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from medgen.radiomics.resampling import INTERPOLATORS, resample
from medgen.types import BadInputError

FEW = settings(max_examples=120, deadline=None, derandomize=True)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) * 100


def full(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=bool)


@pytest.mark.parametrize("interpolator", INTERPOLATORS)
def test_a_constant_stays_one(interpolator: str) -> None:
    image, mask, spacing = resample(np.full((9, 8), 5.0), full(9, 8), (1, 1), (0.7, 1.6), interpolator=interpolator)
    assert spacing == (0.7, 1.6)
    np.testing.assert_allclose(image[mask], 5, rtol=1e-13)


def test_a_ramp_lies_at_the_centers_of_the_new_voxels() -> None:
    ramp = np.arange(12.0) * np.ones((10, 1))
    image, mask, _ = resample(ramp, full(10, 12), (1, 1), (0, 2), interpolator="sitkLinear")
    assert image.shape == (10, 6)
    # Two old voxels make a new one, whose center lies between theirs.
    np.testing.assert_allclose(image, np.tile([0.5, 2.5, 4.5, 6.5, 8.5, 10.5], (10, 1)))
    assert mask.all()


@pytest.mark.parametrize("shape", [(24, 31), (12, 25, 19)])
def test_splines_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    found, mask, _ = resample(image, full(*shape), (1.0,) * len(shape), (1.3,) * len(shape))
    centers = np.meshgrid(*[(np.arange(n) + 0.5) * 1.3 - 0.5 for n in found.shape], indexing="ij")
    expected = map_coordinates(image, centers, order=3, mode="mirror")
    assert mask.any()
    # ITK cuts the mirrored line at 1e-10.
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=1e-7)


def test_a_short_axis_is_mirrored_whole() -> None:
    image = noise(3, 20)
    found, mask, _ = resample(image, full(3, 20), (1, 1), (0.5, 1), pad_distance=0)
    centers = np.meshgrid((np.arange(found.shape[0]) + 0.5) * 0.5 - 0.5, np.arange(20), indexing="ij")
    np.testing.assert_allclose(found[mask], map_coordinates(image, centers, order=3, mode="mirror")[mask], atol=1e-10)


def test_centers_on_the_far_border_are_outside() -> None:
    image, mask, _ = resample(np.full((9, 8), 5.0), full(9, 8), (1, 1), (2, 2))
    assert image.shape == (5, 4)
    assert (image[-1] == 0).all() and not mask[-1].any()
    assert mask[:-1].all()


def test_a_mask_takes_the_nearest_voxel_and_halves_upward() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, 3:5] = True
    _, found, _ = resample(np.zeros((4, 8)), mask, (1, 1), (0, 2), pad_distance=9)
    # Centers lie at 0.5, 2.5, 4.5 and 6.5, so voxels 1, 3, 5 and 7 are asked.
    assert found.tolist() == [[False, True, False, False]] * 4


def test_axes_that_keep_their_spacing() -> None:
    thin = np.zeros((6, 8, 8), dtype=bool)
    thin[2] = True
    image, mask, spacing = resample(noise(6, 8, 8), thin, (3, 1, 1), (1, 2, 0), pad_distance=1)
    assert spacing == (3, 2, 1)
    assert image.shape == (5, 4, 8) == mask.shape


def test_equal_spacing_only_crops() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[3:5, 4] = True
    image = noise(9, 9)
    found, cut, spacing = resample(image, mask, (1, 0.5), (1.000001, 0), pad_distance=2)
    assert spacing == (1, 0.5)
    np.testing.assert_array_equal(found, image[1:7, 2:7])
    np.testing.assert_array_equal(cut, mask[1:7, 2:7])
    assert found.flags.c_contiguous and cut.flags.c_contiguous


def test_only_the_surroundings_are_kept() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[20:24, 20:24] = True
    whole = resample(noise(40, 40), full(40, 40), (1, 1), (2, 2))[0]
    image, cut, _ = resample(noise(40, 40), mask, (1, 1), (2, 2), pad_distance=3)
    # From floor(19.5 / 2 - 3) = 6 to ceil(23.5 / 2 + 3) = 15.
    np.testing.assert_allclose(image, whole[6:16, 6:16], atol=1e-12)
    assert cut.sum() == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": noise(4, 4).astype(np.float32)}, "C-contiguous float64 image of 2 or 3 axes, got float32"),
        ({"mask": np.ones((4, 4))}, r"boolean mask of the image's shape \(4, 4\), got float64"),
        ({"mask": np.zeros((4, 4), dtype=bool)}, "expected a mask with a region, got an empty one"),
        ({"spacing": (1, 0)}, r"spacing: expected 2 edge lengths above 0 mm, got \(1, 0\)"),
        ({"new_spacing": (1, 2, 2)}, r"resampledPixelSpacing: expected 2 edge lengths.*got \(1, 2, 2\)"),
        ({"new_spacing": (1, -2)}, r"resampledPixelSpacing: expected 2 edge lengths.*got \(1, -2\)"),
        (
            {"interpolator": "sitkGaussian"},
            "interpolator: .*sitkNearestNeighbor.*got 'sitkGaussian'.*engine='pyradiomics'",
        ),
        ({"pad_distance": -1}, "padDistance: expected a whole number of voxels of at least 0, got -1"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    given_ = {"image": noise(4, 4), "mask": full(4, 4), "spacing": (1, 1), "new_spacing": (2, 2)} | changes
    with pytest.raises(BadInputError, match=message):
        resample(**given_)


EDGES = st.one_of(st.sampled_from([0.5, 0.7, 0.9375, 1.0, 1.1, 1.25, 2.0, 3.0]), st.floats(0.4, 4))


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    spacing=st.lists(EDGES, min_size=3, max_size=3),
    new=st.lists(st.one_of(st.just(0.0), EDGES), min_size=3, max_size=3),
    interpolator=st.sampled_from(INTERPOLATORS),
    pad=st.integers(0, 6),
)
def test_pyradiomics_agrees(
    seed: int, shape: list[int], spacing: list[float], new: list[float], interpolator: str, pad: int
) -> None:
    imageoperations = pytest.importorskip("radiomics.imageoperations")
    sitk = pytest.importorskip("SimpleITK")
    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    # There ITK's splines read outside their image.
    assume("BSpline" not in interpolator or 2 not in shape)
    random = np.random.default_rng(seed)
    image = random.normal(size=shape) * 300
    low = [int(random.integers(n)) for n in shape]
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, int(random.integers(a, n)) + 1) for a, n in zip(low, shape, strict=True))] = True
    edges, wanted = tuple(spacing[: len(shape)]), tuple(new[: len(shape)])
    scan, label = sitk.GetImageFromArray(image), sitk.GetImageFromArray(mask.astype(np.uint8))
    scan.SetSpacing(edges[::-1])
    label.CopyInformation(scan)
    expected = imageoperations.resampleImage(
        scan, label, resampledPixelSpacing=list(wanted[::-1]), interpolator=interpolator, padDistance=pad
    )
    found, found_mask, found_spacing = resample(image, mask, edges, wanted, interpolator=interpolator, pad_distance=pad)
    np.testing.assert_allclose(found_spacing, expected[0].GetSpacing()[::-1], rtol=1e-15)
    np.testing.assert_array_equal(found_mask, sitk.GetArrayFromImage(expected[1]) == 1)
    np.testing.assert_allclose(found, sitk.GetArrayFromImage(expected[0]), rtol=0, atol=1e-10)
