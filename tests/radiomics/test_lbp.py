"""Local binary patterns against the formulas, and against values of PyRadiomics, whose own code needs an old SciPy."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.special import gammaln, lpmv
from scipy.stats import kurtosis

from medgen.radiomics.filters import derive
from medgen.radiomics.lbp import icosphere


def derived(image: np.ndarray, image_type: str, mask: np.ndarray | None = None, **settings: object) -> dict:
    mask = np.ones(image.shape, dtype=bool) if mask is None else mask
    return dict(derive(image, mask, (1.0,) * image.ndim, image_type, settings))


def volume() -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.indices((5, 6, 7)).astype(float)
    image = 100 * (np.sin(1.3 * z + 0.2 * x * x) + np.cos(0.7 * y * x + z))
    return image, (z - 2) ** 2 + (y - 2.5) ** 2 + (x - 3) ** 2 < 7


def test_patterns_of_four_neighbors_by_hand() -> None:
    image = np.array([[0.0, 9.0, 0.0], [1.0, 5.0, 7.0], [0.0, 5.0, 0.0]])
    # Samples lie right, above, left and below: 7, 9 and 5 are at least 5, and 1 is not.
    found = derived(image, "LBP2D", lbp2DSamples=4, lbp2DMethod="default")["lbp-2D"]
    assert found[1, 1] == 1 + 2 + 8


def test_patterns_lie_in_the_plane_that_was_asked_for() -> None:
    image = np.random.default_rng(0).normal(size=(5, 6, 7))
    for axis in range(3):
        found = derived(image, "LBP2D", force2Ddimension=axis)["lbp-2D"]
        for index in range(image.shape[axis]):
            plane = np.ascontiguousarray(image.take(index, axis))
            np.testing.assert_array_equal(found.take(index, axis), derived(plane, "LBP2D")["lbp-2D"])


def test_flat_regions_have_no_nan() -> None:
    assert (derived(np.zeros((6, 6)), "LBP2D", lbp2DMethod="var")["lbp-2D"] == 0).all()
    flat = derived(np.full((5, 5, 5), 7.0), "LBP3D")
    assert all(np.isfinite(band).all() for band in flat.values())
    # Samples beyond the border are 0, so only the inner voxels are flat.
    assert (flat["lbp-3D-k"][1:-1, 1:-1, 1:-1] == 0).all()


@pytest.mark.parametrize(("subdivisions", "vertices"), [(0, 12), (1, 42), (2, 162)])
def test_icosphere(subdivisions: int, vertices: int) -> None:
    sphere = icosphere(subdivisions, 1.5)
    assert sphere.shape == (vertices, 3)
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), 1.5, rtol=1e-14)
    # Evenly spread: the mean of x xᵀ is a third of the squared radius.
    np.testing.assert_allclose(sphere.T @ sphere / vertices, np.eye(3) * 1.5**2 / 3, atol=1e-12)
    golden = (1 + 5**0.5) / 2
    corners = {(0.0, a * 1.0, b * golden) for a, b in itertools.product((-1, 1), repeat=2)}
    scaled = np.array(sorted(corners)) * 1.5 / np.hypot(1, golden)
    assert all(np.isclose(sphere, corner).all(axis=1).any() for corner in scaled)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            {
                "lbp-3D-m1": (5.1572095852421675, 3.094325751145299, 10.314419170484335, 709.6320389293219),
                "lbp-3D-m2": (3.801370960311026, 5.2883154259406675, 12.38928518434286, 700.2569029675012),
                "lbp-3D-k": (-0.8074276615477034, -0.7084554657621802, -1.2201009220421006, -27.102958908784796),
            },
        ),
        (
            {"lbp3DLevels": 3, "lbp3DIcosphereRadius": 1.5, "lbp3DIcosphereSubdivision": 2},
            {
                "lbp-3D-m1": (56.71992791789769, 5.064279278383715, 102.29844142335123, 5454.228782819272),
                "lbp-3D-m2": (39.0037884530681, 8.517915689138276, 97.21017864686817, 5151.681119443517),
                "lbp-3D-m3": (74.2283219299428, 7.58138727320885, 85.93312577680068, 4796.692207126963),
                "lbp-3D-k": (-0.8399547807737342, 1.101156484153007, 0.7232982744310186, 38.23040595399257),
            },
        ),
    ],
)
def test_volumes_as_pyradiomics_with_scipy_1_11_and_trimesh_4(settings: dict, expected: dict) -> None:
    image, mask = volume()
    found = derived(image, "LBP3D", mask, **settings)
    assert list(found) == list(expected)
    for name, (center, second, third, total) in expected.items():
        band = found[name]
        assert (band[~mask] == 0).all()
        values = (band[2, 2, 3], band[1, 3, 2], band[3, 4, 3], band.sum())
        np.testing.assert_allclose(values, (center, second, third, total), rtol=1e-9)


def test_volumes_by_the_formula() -> None:
    image, mask = volume()
    sphere = icosphere(1, 1.25)
    polar, azimuth = np.arccos(sphere[:, 2] / 1.25), np.arctan2(sphere[:, 1], sphere[:, 0])

    def harmonic(n: int, m: int) -> np.ndarray:
        # With the angles exchanged, as PyRadiomics calls it.
        norm = np.sqrt((2 * n + 1) / (4 * np.pi) * np.exp(gammaln(n - abs(m) + 1) - gammaln(n + abs(m) + 1)))
        value = norm * lpmv(abs(m), n, np.cos(azimuth)) * np.exp(1j * abs(m) * polar)
        return value if m >= 0 else (-1) ** m * value.conj()

    found = derived(image, "LBP3D", mask, lbp3DLevels=3, lbp3DIcosphereRadius=1.25)
    for voxel in np.argwhere(mask)[::7]:
        samples = map_coordinates(image, (voxel + sphere).T, order=3)
        pattern = samples >= image[tuple(voxel)]
        for n in range(3):
            part = sum((harmonic(n, m) * pattern).sum() * harmonic(n, m) for m in range(-n, n + 1))
            expected = np.sqrt((part**2).sum()).real
            assert found[f"lbp-3D-m{n + 1}"][tuple(voxel)] == pytest.approx(expected, rel=1e-9, abs=1e-6)
        assert found["lbp-3D-k"][tuple(voxel)] == pytest.approx(kurtosis(samples), rel=1e-9)


def test_many_voxels_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = volume()
    whole = derived(image, "LBP3D", mask)
    monkeypatch.setattr("medgen.radiomics.lbp._CHUNK", 9)
    for name, band in derived(image, "LBP3D", mask).items():
        np.testing.assert_allclose(band, whole[name], rtol=1e-12)
