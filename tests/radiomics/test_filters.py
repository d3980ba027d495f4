"""Derived images against closed forms, PyWavelets and, where it is installed, PyRadiomics."""

import logging
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pywt
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_laplace

from medgen.radiomics.filters import IMAGE_TYPES, derive, skipped
from medgen.types import BadInputError

# scikit-image warns of ties in float images, on the side of PyRadiomics.
pytestmark = pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern`")

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)


def derived(image: np.ndarray, image_type: str, spacing: tuple[float, ...] = (), **options: object) -> dict:
    """All images of a type, of an image without a mask."""
    spacing = spacing or (1.0,) * image.ndim
    return dict(
        derive(np.ascontiguousarray(image, dtype=float), np.ones(image.shape, bool), spacing, image_type, options)
    )


# Wavelet


@FEW
@given(
    SEEDS, st.lists(st.integers(1, 12), min_size=2, max_size=3), st.sampled_from(["coif1", "haar", "db4", "bior1.3"])
)
def test_wavelet_is_that_of_pywavelets(seed: int, half: list[int], wavelet: str) -> None:
    image = np.random.default_rng(seed).normal(size=[2 * n for n in half]) * 100
    axes = tuple(reversed(range(image.ndim)))
    expected = pywt.swtn(image, wavelet, level=1, axes=axes)[0]
    found = derived(image, "Wavelet", wavelet=wavelet)
    assert len(found) == len(expected)
    for letters, band in expected.items():
        name = "wavelet-" + letters.replace("a", "L").replace("d", "H")
        np.testing.assert_allclose(found[name], band, rtol=0, atol=1e-11)


def test_wavelet_letters_run_x_y_z() -> None:
    rows = np.tile((-1.0) ** np.arange(8)[:, None], (1, 8))
    energy = {name: np.abs(band).max() for name, band in derived(rows, "Wavelet").items()}
    assert max(energy, key=lambda name: energy[name]) == "wavelet-LH"
    slices = np.broadcast_to((-1.0) ** np.arange(8)[:, None, None], (8, 6, 4))
    energy = {name: np.abs(band).max() for name, band in derived(slices, "Wavelet").items()}
    assert max(energy, key=lambda name: energy[name]) == "wavelet-LLH"
    assert sum(value > 1e-9 for value in energy.values()) == 1


def test_wavelet_of_odd_sizes_wraps_its_first_voxels() -> None:
    image = np.random.default_rng(1).normal(size=(7, 9))
    padded = np.pad(image, ((0, 1), (0, 1)), "wrap")
    whole = derived(padded, "Wavelet")
    for name, band in derived(image, "Wavelet").items():
        np.testing.assert_array_equal(band, whole[name][:-1, :-1])


def test_wavelet_levels_are_taken_one_after_another() -> None:
    image = np.random.default_rng(2).normal(size=(8, 10))
    first = derived(image, "Wavelet")
    second = derived(first["wavelet-LL"], "Wavelet")
    both = derived(image, "Wavelet", level=2)
    assert list(both) == [
        *("wavelet-LH", "wavelet-HL", "wavelet-HH"),
        *("wavelet2-LH", "wavelet2-HL", "wavelet2-HH", "wavelet2-LL"),
    ]
    np.testing.assert_array_equal(both["wavelet-HL"], first["wavelet-HL"])
    np.testing.assert_array_equal(both["wavelet2-LH"], second["wavelet-LH"])
    np.testing.assert_array_equal(both["wavelet2-LL"], second["wavelet-LL"])
    later = derived(image, "Wavelet", start_level=1)
    assert list(later) == ["wavelet-LH", "wavelet-HL", "wavelet-HH", "wavelet-LL"]
    np.testing.assert_array_equal(later["wavelet-LH"], second["wavelet-LH"])


def test_wavelet_in_the_plane_only() -> None:
    image = np.random.default_rng(3).normal(size=(1, 6, 8))
    flat = derived(image[0], "Wavelet")
    for name, band in derived(image, "Wavelet", force2D=True).items():
        np.testing.assert_array_equal(band[0], flat[name])
    assert list(derived(image[0], "Wavelet", force2D=True)) == ["wavelet-H", "wavelet-L"]


# LoG


@pytest.mark.parametrize("axes", [2, 3])
def test_log_of_a_gaussian_is_known(axes: int) -> None:
    # Smoothing adds variances; the Laplacian of a Gaussian is (r²/v² - n/v) times it.
    spacing, width, sigma = (1.5, 1.0, 0.75)[-axes:], 4.0, 2.0
    mm = np.stack(np.meshgrid(*[(np.arange(40) - 20) * edge for edge in spacing], indexing="ij"))
    squared = (mm**2).sum(axis=0)
    image = np.exp(-squared / (2 * width**2))
    variance = width**2 + sigma**2
    blurred = (width**2 / variance) ** (axes / 2) * np.exp(-squared / (2 * variance))
    expected = sigma**2 * (squared / variance**2 - axes / variance) * blurred
    found = derived(image, "LoG", spacing, sigma=[sigma])["log-sigma-2-0-mm-3D"]
    # The recursive filter is an approximation, good to about a hundredth.
    middle = (slice(8, -8),) * axes
    np.testing.assert_allclose(found[middle], expected[middle], rtol=0, atol=0.02 * np.abs(expected).max())


def test_log_is_near_that_of_scipy_also_at_the_border() -> None:
    image = np.random.default_rng(4).normal(size=(30, 40))
    expected = 9 * gaussian_laplace(image, 3.0, mode="nearest", truncate=8)
    found = derived(image, "LoG", sigma=[3])["log-sigma-3-mm-3D"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_log_of_a_constant_is_nothing() -> None:
    assert np.abs(derived(np.full((9, 8, 7), 1000.0), "LoG", sigma=[1.0])["log-sigma-1-0-mm-3D"]).max() < 1e-3


def test_what_is_too_small_for_log_is_told() -> None:
    options = {"sigma": [1.0, 5.0]}
    image, spacing = np.zeros((8, 7, 5)), (1.0, 1.0, 1.0)
    assert list(derived(image, "LoG", spacing, **options)) == ["log-sigma-1-0-mm-3D"]
    reasons = skipped(image.shape, spacing, "LoG", options)
    assert list(reasons) == ["log-sigma-5-0-mm-3D"]
    reason = reasons["log-sigma-5-0-mm-3D"]
    assert "has 5 voxels of 1 mm along one axis, and a LoG (Laplacian of Gaussian) of sigma 5.0 mm needs" in reason
    assert "at least 6. Extract from single slices" in reason
    assert not derived(np.zeros((3, 30, 30)), "LoG", **options)
    reasons = skipped((3, 30, 30), (1.0, 1.0, 1.0), "LoG", options)
    assert all("has 3 voxels of 1 mm along one axis" in reason for reason in reasons.values())
    assert len(reasons) == 2


# Point by point


def test_values_by_hand() -> None:
    image = np.array([[0.0, 1.0], [-4.0, 2.0]])
    np.testing.assert_allclose(derived(image, "Square")["square"], [[0, 0.25], [4, 1]])
    np.testing.assert_allclose(derived(image, "SquareRoot")["squareroot"], [[0, 2], [-4, 8**0.5]])
    scale = 4 / np.log(5)
    np.testing.assert_allclose(
        derived(image, "Logarithm")["logarithm"], [[0, scale * np.log(2)], [-4, scale * np.log(3)]]
    )
    np.testing.assert_allclose(derived(image, "Exponential")["exponential"], [[1, 4**0.25], [0.25, 2]])
    assert derived(image, "Original")["original"].tolist() == image.tolist()


@pytest.mark.parametrize("image_type", ["Square", "SquareRoot", "Logarithm", "Exponential", "Gradient"])
def test_images_of_zeros_stay_finite(image_type: str) -> None:
    (band,) = derived(np.zeros((4, 5)), image_type).values()
    assert (band == (1.0 if image_type == "Exponential" else 0.0)).all()


def test_gradient_of_a_ramp() -> None:
    image = np.arange(5.0)[:, None] * 3 + np.arange(6.0) * 4
    found = derived(image, "Gradient", (0.5, 1.0))["gradient"]
    np.testing.assert_allclose(found[1:-1, 1:-1], np.hypot(6, 4), rtol=1e-6)
    # At the border the difference is one-sided, over twice the distance.
    np.testing.assert_allclose(found[0, 1:-1], np.hypot(3, 4), rtol=1e-6)
    found = derived(image, "Gradient", (0.5, 1.0), gradientUseSpacing=False)["gradient"]
    np.testing.assert_allclose(found[1:-1, 1:-1], 5, rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("image_type", "options", "message"),
    [
        ("Wavelets", {}, "expected an image type out of Original, Wavelet, LoG.*got 'Wavelets'"),
        ("LoG", {}, r"sigma: LoG expects a list of widths above 0 mm, such as \[2.0, 3.0\], got None"),
        ("LoG", {"sigma": [1.0, 0]}, "sigma: .* got "),
        ("LoG", {"sigma": 2.0}, "sigma: .* got 2.0"),
        ("Wavelet", {"wavelet": "coif99"}, "wavelet: expected a name such as coif1.*got 'coif99'"),
        ("Wavelet", {"wavelet": 3}, "wavelet: expected a name such as coif1.*got 3"),
        ("Wavelet", {"level": 0}, "level: expected a whole number of at least 1, got 0"),
        ("Wavelet", {"start_level": -1}, "start_level: expected a whole number of at least 0, got -1"),
        ("Wavelet", {"force2D": True, "force2Ddimension": 2}, "force2Ddimension: expected an axis below 2.*got 2"),
        ("LBP2D", {"lbp2DMethod": "fast"}, "lbp2DMethod: expected one of default, ror.*got 'fast'"),
        ("LBP2D", {"lbp2DRadius": 0}, "lbp2DRadius: expected a number above 0, got 0"),
        ("LBP2D", {"lbp2DSamples": 2.5}, "lbp2DSamples: expected a whole number of at least 1, got 2.5"),
        ("LBP3D", {"lbp3DLevels": 0}, "lbp3DLevels: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(image_type: str, options: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        derived(np.zeros((6, 6)), image_type, **options)


def test_bad_arrays() -> None:
    image, mask = np.zeros((6, 6)), np.ones((6, 6), dtype=bool)
    with pytest.raises(BadInputError, match="C-contiguous float64 image of 2 or 3 axes, got float32"):
        list(derive(image.astype(np.float32), mask, (1.0, 1.0), "Square", {}))
    with pytest.raises(BadInputError, match=r"boolean mask of the image's shape \(6, 6\), got int64"):
        list(derive(image, mask.astype(np.int64), (1.0, 1.0), "Square", {}))
    with pytest.raises(BadInputError, match="2 voxel edge lengths above 0 mm, one per axis, got "):
        list(derive(image, mask, (1.0, 1.0, 1.0), "Square", {}))


def test_a_plane_has_no_patterns_in_space() -> None:
    assert not derived(np.zeros((6, 6)), "LBP3D")
    reasons = skipped((6, 6), (1.0, 1.0), "LBP3D", {"lbp3DLevels": 3})
    assert list(reasons) == ["lbp-3D-m1", "lbp-3D-m2", "lbp-3D-m3", "lbp-3D-k"]
    assert set(reasons.values()) == {
        "LBP3D needs a volume, and the image is a plane. Take LBP3D out of the image types."
    }


# PyRadiomics


@pytest.fixture(scope="module")
def pyradiomics() -> ModuleType:
    module = pytest.importorskip("radiomics.imageoperations")
    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    return module


@FEW
@given(
    seed=SEEDS,
    shape=st.lists(st.integers(1, 16), min_size=2, max_size=3),
    edges=st.lists(st.floats(0.3, 4), min_size=3, max_size=3),
    options=st.fixed_dictionaries(
        {
            "sigma": st.lists(st.sampled_from([0.5, 1, 1.5, 3.0, 5.0]), min_size=1, max_size=2, unique=True),
            "wavelet": st.sampled_from(["coif1", "haar", "db3", "sym5", "rbio2.2"]),
            "level": st.integers(1, 2),
            "start_level": st.integers(0, 1),
            "force2D": st.booleans(),
            "force2Ddimension": st.integers(0, 1),
            "gradientUseSpacing": st.booleans(),
            "lbp2DRadius": st.sampled_from([1, 1.5, 2]),
            "lbp2DSamples": st.integers(4, 9),
            "lbp2DMethod": st.sampled_from(["default", "ror", "uniform"]),
        }
    ),
)
def test_pyradiomics_agrees(
    pyradiomics: ModuleType, seed: int, shape: list[int], edges: list[float], options: dict[str, Any]
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = np.random.default_rng(seed).normal(size=shape) * 300
    spacing = tuple(edges[: image.ndim])
    scan = sitk.GetImageFromArray(image)
    scan.SetSpacing(spacing[::-1])
    mask = np.ones(image.shape, dtype=bool)
    for image_type in set(IMAGE_TYPES) - {"LBP3D"}:
        expected = {
            name: sitk.GetArrayFromImage(band).astype(float)
            for band, name, _ in getattr(pyradiomics, f"get{image_type}Image")(scan, None, **options)
        }
        found = dict(derive(image, mask, spacing, image_type, options))
        assert list(found) == list(expected)
        if image_type == "LoG":
            left_out = skipped(image.shape, spacing, image_type, options)
            assert len(left_out) + len(found) == len(options["sigma"])
        for name, band in expected.items():
            # Both are single precision in the end, where a last bit of double precision may tip the rounding.
            rtol = 1e-6 if image_type in ("LoG", "Gradient") else 1e-13
            np.testing.assert_allclose(found[name], band, rtol=0, atol=rtol * np.abs(band).max(), err_msg=name)
