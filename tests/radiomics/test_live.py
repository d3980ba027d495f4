"""Features against an installed PyRadiomics, over random images, masks and settings."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("radiomics", reason="needs PyRadiomics: python -m pip install -e '.[oracle]'")
import SimpleITK
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from radiomics import imageoperations
from radiomics.featureextractor import RadiomicsFeatureExtractor
from scipy import ndimage

from medgen.radiomics import Parameters, extract
from medgen.types import BadInputError

LOOSE = ("_shape", "_MCC", "_Imc1", "_Imc2")


TEXTURE = ("firstorder", "glcm", "gldm", "glrlm", "glszm", "ngtdm")
# Values that both sides compute alike to the last bit from whole intensities; and what SimpleITK rounds to float32.
EXACT = ("Original", "LBP2D", "Square", "SquareRoot", "Logarithm", "Exponential")
SINGLE = ("LoG", "Gradient")
# What does not look at the bins.
WITHOUT_BINS = [f"_firstorder_{name}" for name in ("Mean", "Minimum", "Maximum", "Energy", "Variance", "Median")]


def _scan(seed: int, shape: tuple[int, ...], kind: str, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """An image of a kind with a region of its own: whole gray values, smooth, noisy, or with flat parts."""
    source = np.random.default_rng(seed)
    image = source.normal(size=shape)
    if kind != "noise":
        image = ndimage.gaussian_filter(image, 1.0)
    image = np.round((image - image.min()) / np.ptp(image) * 255)
    if kind == "flat":
        image = np.where(image < 120, 40.0, image)
    blob = ndimage.gaussian_filter(source.normal(size=shape), 1.5)
    mask = (blob > np.quantile(blob, 1 - fill)).astype(np.uint8)
    return image, mask


def _mask(draw: Any, blob: np.ndarray) -> np.ndarray:
    """The blob, one plane or line of voxels, or two voxels."""
    form = draw(st.sampled_from(["blob", "blob", "plane", "line", "two"]))
    if form == "blob":
        return blob
    mask = np.zeros_like(blob)
    place = [draw(st.integers(0, n - 1)) for n in blob.shape]
    axis = draw(st.integers(0, blob.ndim - 1))
    if form == "two":
        near = draw(st.booleans())
        other = [min(a + 1, n - 1) if near else n - 1 - a for a, n in zip(place, blob.shape, strict=True)]
        mask[tuple(place)] = mask[tuple(other)] = 1
    else:
        line, plane = [slice(n, n + 1) for n in place], [slice(None)] * blob.ndim
        line[axis], plane[axis] = slice(None), slice(place[axis], place[axis] + 1)
        mask[tuple(line if form == "line" else plane)] = 1
    return mask


@st.composite
def _own(draw: Any, image_type: str) -> dict[str, Any]:
    """Settings of one image type."""
    if image_type == "Wavelet":
        return {
            "wavelet": draw(st.sampled_from(["coif1", "haar", "db2", "db4", "sym5", "bior1.3", "rbio2.2"])),
            "level": draw(st.integers(1, 2)),
            "start_level": draw(st.integers(0, 1)),
        }
    if image_type == "LoG":
        return {"sigma": [draw(st.sampled_from([0.5, 1, 2.0])), draw(st.sampled_from([2.5, 4.0]))]}
    if image_type == "Gradient":
        return {"gradientUseSpacing": draw(st.booleans())}
    if image_type == "LBP2D":
        return {
            "lbp2DRadius": draw(st.sampled_from([1, 1.5, 2])),
            "lbp2DSamples": draw(st.integers(4, 9)),
            "lbp2DMethod": draw(st.sampled_from(["default", "ror", "uniform"])),
        }
    return {}


@st.composite
def _cases(draw: Any, image_type: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], Parameters]:
    dims = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.integers(4, 12 if dims == 3 else 30)) for _ in range(dims))
    kind = draw(st.sampled_from(["smooth", "noise", "flat"]))
    image, blob = _scan(draw(st.integers(0, 10**6)), shape, kind, draw(st.sampled_from([0.05, 0.3, 0.7, 1.0])))
    mask = _mask(draw, blob)
    spacing = tuple(draw(st.sampled_from([0.7, 1.0, 1.5, 3.0])) for _ in range(dims))
    chosen: dict[str, Any] = {"binWidth": draw(st.sampled_from([5, 25, 12.5]))}
    if draw(st.booleans()):
        chosen = {"binCount": draw(st.sampled_from([2, 4, 16, 32]))}
    if draw(st.booleans()):
        chosen["distances"] = draw(st.sampled_from([[1], [2], [1, 3]]))
    if draw(st.booleans()):
        chosen["weightingNorm"] = draw(st.sampled_from(["manhattan", "euclidean", "infinity", "no_weighting"]))
    if draw(st.booleans()):
        chosen["symmetricalGLCM"] = False
    if draw(st.booleans()):
        chosen["gldm_a"] = draw(st.sampled_from([1, 2]))
    if draw(st.booleans()):
        chosen["voxelArrayShift"] = 100
    if draw(st.sampled_from([True, True, True, False])):
        chosen["minimumROIDimensions"] = 1
    if dims == 3 and draw(st.booleans()):
        chosen.update(force2D=True, force2Ddimension=draw(st.integers(0, 2)))
    prepared = draw(st.sampled_from(["not", "not", "normalize", "preCrop", "resample"]))
    if prepared == "normalize":
        chosen.update(normalize=True, normalizeScale=100)
        if draw(st.booleans()):
            chosen["removeOutliers"] = 2
    elif prepared == "preCrop":
        chosen.update(preCrop=True, padDistance=draw(st.integers(0, 5)))
    elif prepared == "resample":
        wanted = [draw(st.sampled_from([0, 1.1, 1.5, 2])) for _ in range(dims)]
        chosen.update(resampledPixelSpacing=wanted, padDistance=draw(st.integers(0, 5)))
        chosen["interpolator"] = draw(st.sampled_from(["sitkBSpline", "sitkLinear", "sitkNearestNeighbor"]))
    elif draw(st.booleans()):
        chosen.update(resegmentRange=[20, 220], resegmentMode="absolute")
    # PyRadiomics looks up whether a volume is flat along the wrong axis; test_shape.py has shape2D of volumes.
    shapes = ("shape2D",) if dims == 2 else ("shape",)
    return (
        image,
        mask,
        spacing,
        Parameters({image_type: draw(_own(image_type))}, dict.fromkeys((*TEXTURE, *shapes), ()), chosen),
    )


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """What PyRadiomics took its last features of: for each image the intensities of the region, and its bin edges."""
    images: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    compute = RadiomicsFeatureExtractor.computeFeatures

    def watch(self: Any, image: Any, mask: Any, name: str, **kwargs: Any) -> Any:
        values = SimpleITK.GetArrayFromImage(image)[SimpleITK.GetArrayFromImage(mask) == 1]
        edges = np.asarray(imageoperations.getBinEdges(values, **kwargs))
        # With a count, the first edge is the minimum and the last one lies beyond the maximum, whatever they are.
        images[name] = values, edges if kwargs.get("binCount") is None else edges[1:-1]
        return compute(self, image, mask, name, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RadiomicsFeatureExtractor, "computeFeatures", watch)
        yield images


def _on_an_edge(values: np.ndarray, edges: np.ndarray, rounding: float) -> bool:
    """Whether rounding errors of this size, relative to the largest intensity, may move a voxel into another bin,
    or are all that tells the voxels apart.
    """
    error = rounding * np.abs(values).max()
    return bool(np.abs(values[:, None] - edges).min(initial=np.inf) <= error or np.ptp(values) <= error)


def _compare(found: dict[str, float], expected: dict[str, float], relative: float, absolute: float) -> None:
    assert set(found) == set(expected)
    wrong = []
    for name, value in expected.items():
        loose = any(part in name for part in LOOSE)
        bounds = (
            {"rel_tol": max(relative, 1e-6), "abs_tol": 1e-6} if loose else {"rel_tol": relative, "abs_tol": absolute}
        )
        both_nan = math.isnan(value) and math.isnan(found[name])
        if not both_nan and not math.isclose(found[name], value, **bounds):
            wrong.append(f"{name}: {found[name]!r} instead of {value!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore:.* is left out")  # of LoG, which PyRadiomics leaves out too
@pytest.mark.parametrize(
    ("image_type", "cases"),
    [("Original", 150), ("Wavelet", 60), ("LoG", 40), ("Gradient", 40), ("LBP2D", 40)]
    + [(name, 25) for name in ("Square", "SquareRoot", "Logarithm", "Exponential")],
)
def test_features_equal_pyradiomics(seen: dict[str, Any], image_type: str, cases: int) -> None:
    count: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_cases(image_type))
    def check(case: Any) -> None:
        image, mask, spacing, parameters = case
        seen.clear()
        try:
            expected = _by_pyradiomics(image, mask, spacing, parameters)
        except BadInputError as error:
            if "angle count" in str(error):  # the region is shorter than the distances, and has no voxel pair
                found = extract(image, mask, spacing=spacing, parameters=parameters)
                assert all(math.isnan(value) for name, value in found.items() if name.endswith("_glcm_Contrast"))
                return
            with pytest.raises(BadInputError):
                extract(image, mask, spacing=spacing, parameters=parameters)
            return
        options = parameters.settings
        exact = image_type in EXACT and "resampledPixelSpacing" not in options
        rounding = 0.0 if exact else 1e-6 if image_type in SINGLE else 1e-12
        fragile = tuple(f"{name}_" for name, it in seen.items() if not exact and _on_an_edge(*it, rounding))
        found = extract(image, mask, spacing=spacing, parameters=parameters)
        kept = [
            name
            for name in expected
            if not name.startswith(fragile) or any(name.endswith(part) for part in WITHOUT_BINS)
        ]
        assert set(found) == set(expected)
        count["images"] += len(seen)
        count["fragile"] += len(fragile)
        count["values"] += len(kept)
        _compare({name: found[name] for name in kept}, {name: expected[name] for name in kept}, 1e-9, 1e-9)

    check()
    assert count["fragile"] <= count["images"] / 2, "too few images are compared"


def _by_pyradiomics(image: np.ndarray, mask: np.ndarray, spacing: Any, parameters: Parameters) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, in its own means over nothing
        return extract(image, mask, spacing=spacing, parameters=parameters, engine="pyradiomics")


@pytest.mark.parametrize(
    "chosen",
    [
        {"resampledPixelSpacing": [2, 2, 2], "padDistance": 4},
        {"resampledPixelSpacing": [1.5, 0, 2], "interpolator": "sitkLinear"},
        {"preCrop": True, "padDistance": 3, "removeOutliers": 2},
        {"resegmentRange": [-1, 2], "resegmentMode": "sigma", "resegmentShape": True},
    ],
    ids=lambda chosen: "-".join(chosen),
)
def test_prepared_images_equal_pyradiomics(chosen: dict[str, Any]) -> None:
    image, mask = _scan(5, (22, 25, 19), "smooth", 0.3)
    types = {"Original": {}, "Wavelet": {"binWidth": 10}, "LoG": {"sigma": [2]}}
    options = {"normalize": True, "normalizeScale": 100, "binWidth": 5, **chosen}
    parameters = Parameters(types, settings=options)
    found = extract(image, mask, spacing=(1.0, 1.2, 1.7), parameters=parameters, diagnostics=True)
    expected = extract(
        image, mask, spacing=(1.0, 1.2, 1.7), parameters=parameters, diagnostics=True, engine="pyradiomics"
    )
    _compare(
        {name: found[name] for name in expected if name in found},
        {k: v for k, v in expected.items() if k in found},
        1e-6,
        1e-9,
    )
    assert {name for name in expected if not name.startswith("diagnostics")} == {
        name for name in found if not name.startswith("diagnostics")
    }
