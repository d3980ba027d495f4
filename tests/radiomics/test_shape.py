"""Shape features against bodies that are known, meshes of scikit-image and, where it is installed, PyRadiomics."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from skimage.measure import marching_cubes, mesh_surface_area

from medgen.radiomics.mesh import surface
from medgen.radiomics.shape import shape2d_features, shape_features
from medgen.types import BadInputError

FEW = settings(max_examples=120, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
EDGES = st.lists(st.floats(0.3, 4), min_size=3, max_size=3)


def random_mask(seed: int, shape: list[int]) -> np.ndarray:
    random = np.random.default_rng(seed)
    mask = random.random(shape) < random.choice([0.1, 0.5, 0.9])
    mask.flat[random.integers(mask.size)] = True
    return mask


def ball(radius: float, axes: int) -> np.ndarray:
    squares = [(np.arange(-int(radius) - 1, int(radius) + 2)) ** 2] * axes
    return sum(np.ix_(*squares)) <= radius**2


def test_a_voxel_is_an_octahedron() -> None:
    found = shape_features(np.ones((1, 1, 1), dtype=bool), (2.0, 3.0, 4.0))
    assert found["MeshVolume"] == pytest.approx(24 / 6)
    assert found["VoxelVolume"] == 24
    # Eight triangles with half edges 1, 1.5 and 2 as their intercepts.
    one = 0.5 * np.linalg.norm([1 * 1.5, 1.5 * 2, 1 * 2])
    assert found["SurfaceArea"] == pytest.approx(8 * one)
    assert found["Maximum3DDiameter"] == 4
    assert found["Maximum2DDiameterSlice"] == 4
    assert found["Maximum2DDiameterColumn"] == 4
    assert found["Maximum2DDiameterRow"] == 3
    assert found["MajorAxisLength"] == found["LeastAxisLength"] == 0
    assert np.isnan(found["Elongation"]) and np.isnan(found["Flatness"])


def test_a_pixel_is_a_rhombus() -> None:
    found = shape2d_features(np.ones((1, 1), dtype=bool), (2.0, 3.0))
    assert found["MeshSurface"] == pytest.approx(3)
    assert found["PixelSurface"] == 6
    assert found["Perimeter"] == pytest.approx(4 * np.hypot(1, 1.5))
    assert found["MaximumDiameter"] == 3
    assert np.isnan(found["Elongation"])


def test_a_ball_is_round() -> None:
    found = shape_features(ball(20, 3), (0.5, 0.5, 0.5), deprecated=True)
    assert found["MeshVolume"] == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.01)
    assert found["MeshVolume"] == pytest.approx(found["VoxelVolume"], rel=0.01)
    # The steps of the surface are cut, not smoothed, so it stays too large.
    assert found["SurfaceArea"] == pytest.approx(4 * np.pi * 10**2, rel=0.1)
    assert found["Sphericity"] * found["SphericalDisproportion"] == pytest.approx(1)
    assert found["Compactness2"] == pytest.approx(found["Sphericity"] ** 3)
    assert found["Compactness1"] == pytest.approx(found["Sphericity"] ** 1.5 / (6 * np.pi))
    assert found["Elongation"] == pytest.approx(1) and found["Flatness"] == pytest.approx(1)
    for name in ("Maximum3DDiameter", "Maximum2DDiameterSlice", "Maximum2DDiameterColumn", "Maximum2DDiameterRow"):
        assert found[name] == pytest.approx(20.5, rel=0.01)
    # The variance of a ball along an axis is a fifth of its squared radius.
    assert found["MajorAxisLength"] == pytest.approx(4 * 10 / 5**0.5, rel=0.01)


def test_a_disk_is_round() -> None:
    found = shape2d_features(ball(30, 2), (0.5, 0.5), deprecated=True)
    assert found["MeshSurface"] == pytest.approx(np.pi * 15**2, rel=0.01)
    assert found["Perimeter"] == pytest.approx(2 * np.pi * 15, rel=0.1)
    assert found["Sphericity"] * found["SphericalDisproportion"] == pytest.approx(1)
    assert found["MajorAxisLength"] == pytest.approx(found["MinorAxisLength"]) == pytest.approx(4 * 15 / 2, rel=0.01)


def test_a_plate_and_a_rod_have_axes_of_length_0() -> None:
    plate = shape_features(np.ones((1, 5, 9), dtype=bool), (3.0, 1.0, 1.0))
    assert plate["LeastAxisLength"] == 0 == plate["Flatness"]
    # The variance of n points in a row is (n² - 1) / 12.
    assert plate["MajorAxisLength"] == pytest.approx(4 * (80 / 12) ** 0.5)
    assert plate["Elongation"] == pytest.approx((24 / 80) ** 0.5)
    rod = shape2d_features(np.ones((6, 1), dtype=bool), (1.0, 1.0))
    assert rod["MinorAxisLength"] == 0 == rod["Elongation"]


@FEW
@given(SEEDS, st.lists(st.integers(1, 9), min_size=3, max_size=3), EDGES)
def test_diameters_are_those_of_all_pairs_of_vertices(seed: int, shape: list[int], edges: list[float]) -> None:
    mask = random_mask(seed, shape)
    padded = np.pad(mask, 1)
    vertices, _, _, _ = marching_cubes(padded.astype(np.float32), 0.5, method="lorensen")
    found = shape_features(mask, tuple(edges))
    assert found["Maximum3DDiameter"] == pytest.approx(pdist(vertices * edges).max())
    for axis, name in enumerate(["Slice", "Column", "Row"]):
        planes = [vertices[vertices[:, axis] == place] * edges for place in np.unique(vertices[:, axis])]
        widest = max(pdist(plane).max() for plane in planes if len(plane) > 1)
        assert found[f"Maximum2DDiameter{name}"] == pytest.approx(widest)


def test_a_convex_body_has_the_mesh_of_scikit_image() -> None:
    mask, edges = np.pad(ball(6.5, 3), 1), (1.0, 0.75, 2.0)
    vertices, faces, _, _ = marching_cubes(mask.astype(np.float32), 0.5, method="lorensen", spacing=edges)
    area, volume = surface(mask, edges)
    assert area == pytest.approx(mesh_surface_area(vertices, faces), rel=1e-5)
    a, b, c = vertices[faces].astype(float).transpose(1, 0, 2)
    assert volume == pytest.approx(abs((np.cross(a, b) * c).sum()) / 6, rel=1e-5)


def test_the_place_of_the_mask_does_not_matter() -> None:
    mask = random_mask(3, [5, 6, 7])
    moved = np.zeros((20, 21, 22), dtype=bool)
    moved[4:9, 9:15, 2:9] = mask
    assert shape_features(moved, (1.0, 2.0, 0.7)) == shape_features(mask, (1.0, 2.0, 0.7))


def test_names_and_their_order() -> None:
    mask = np.ones((2, 2, 2), dtype=bool)
    assert list(shape_features(mask, (1.0, 1.0, 1.0))) == [
        *("MeshVolume", "VoxelVolume", "SurfaceArea", "SurfaceVolumeRatio", "Sphericity", "Maximum3DDiameter"),
        *("Maximum2DDiameterSlice", "Maximum2DDiameterColumn", "Maximum2DDiameterRow", "MajorAxisLength"),
        *("MinorAxisLength", "LeastAxisLength", "Elongation", "Flatness"),
    ]
    assert list(shape2d_features(mask[0], (1.0, 1.0))) == [
        *("MeshSurface", "PixelSurface", "Perimeter", "PerimeterSurfaceRatio", "Sphericity", "MaximumDiameter"),
        *("MajorAxisLength", "MinorAxisLength", "Elongation"),
    ]


def test_bad_input() -> None:
    with pytest.raises(BadInputError, match=r"boolean mask of 3 axes with a region in it, got int64 .*mask == label"):
        shape_features(np.ones((2, 2, 2), dtype=np.int64), (1.0, 1.0, 1.0))
    with pytest.raises(BadInputError, match=r"boolean mask of 2 axes with a region in it, got bool .* with 0 voxels"):
        shape2d_features(np.zeros((2, 2), dtype=bool), (1.0, 1.0))
    with pytest.raises(BadInputError, match="expected 2 voxel edge lengths above 0 mm, got "):
        shape2d_features(np.ones((2, 2), dtype=bool), (1.0, 1.0, 1.0))


@FEW
@given(SEEDS, st.lists(st.integers(1, 9), min_size=2, max_size=3), EDGES)
def test_pyradiomics_agrees(seed: int, shape: list[int], edges: list[float]) -> None:
    pytest.importorskip("radiomics")
    sitk = pytest.importorskip("SimpleITK")
    from radiomics.shape import RadiomicsShape
    from radiomics.shape2D import RadiomicsShape2D

    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    mask, spacing = random_mask(seed, shape), tuple(edges[: len(shape)])
    box = tuple(slice(index.min(), index.max() + 1) for index in np.nonzero(mask))
    scan = sitk.GetImageFromArray(mask[box].astype(np.uint8))
    scan.SetSpacing(spacing[::-1])
    engine, ours = (RadiomicsShape, shape_features) if mask.ndim == 3 else (RadiomicsShape2D, shape2d_features)
    theirs = engine(scan, scan, label=1)
    found = ours(mask, spacing, deprecated=True)
    with np.errstate(invalid="ignore"):
        for name, value in found.items():
            expected = float(getattr(theirs, f"get{name}FeatureValue")())
            # Lengths and ratios of an axis that has none are the roots of rounding in PyRadiomics.
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-6, nan_ok=True), name
