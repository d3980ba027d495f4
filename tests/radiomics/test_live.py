"""Features against an installed PyRadiomics, over random images, masks and settings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("radiomics", reason="needs PyRadiomics: python -m pip install -e '.[oracle]'")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medgen.radiomics import Parameters, extract
from medgen.types import BadInputError

LOOSE = ("_shape", "_MCC", "_Imc1", "_Imc2")


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


@st.composite
def _cases(draw: Any) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], dict[str, Any]]:
    dims = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.integers(7, 18 if dims == 3 else 40)) for _ in range(dims))
    kind = draw(st.sampled_from(["smooth", "noise", "flat"]))
    image, mask = _scan(draw(st.integers(0, 10**6)), shape, kind, draw(st.sampled_from([0.05, 0.3, 0.7, 1.0])))
    spacing = tuple(draw(st.sampled_from([0.7, 1.0, 1.5, 3.0])) for _ in range(dims))
    chosen: dict[str, Any] = {"binWidth": draw(st.sampled_from([5, 25, 12.5]))}
    if draw(st.booleans()):
        chosen = {"binCount": draw(st.sampled_from([4, 16, 32]))}
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
    if dims == 3 and draw(st.booleans()):
        chosen.update(force2D=True, force2Ddimension=draw(st.integers(0, 2)))
    if draw(st.booleans()):
        chosen.update(resegmentRange=[20, 220], resegmentMode="absolute")
    return image, mask, spacing, chosen


def _compare(found: dict[str, float], expected: dict[str, float], relative: float, absolute: float) -> None:
    assert set(found) == set(expected)
    wrong = []
    for name, value in expected.items():
        bound = max(relative, 1e-6) if any(part in name for part in LOOSE) else relative
        both_nan = math.isnan(value) and math.isnan(found[name])
        if not both_nan and not math.isclose(found[name], value, rel_tol=bound, abs_tol=absolute):
            wrong.append(f"{name}: {found[name]!r} instead of {value!r}")
    assert not wrong, "\n".join(wrong)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_cases())
def test_original_images_equal_pyradiomics(case: Any) -> None:
    image, mask, spacing, chosen = case
    classes = dict.fromkeys(("firstorder", "glcm", "gldm", "glrlm", "glszm", "ngtdm"), ())
    parameters = Parameters(feature_classes=classes, settings=chosen)
    try:
        expected = _by_pyradiomics(image, mask, spacing, parameters)
    except BadInputError:
        with pytest.raises(BadInputError):
            extract(image, mask, spacing=spacing, parameters=parameters)
        return
    _compare(extract(image, mask, spacing=spacing, parameters=parameters), expected, 1e-9, 1e-12)


def _by_pyradiomics(image: np.ndarray, mask: np.ndarray, spacing: Any, parameters: Parameters) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, in its own means over nothing
        return extract(image, mask, spacing=spacing, parameters=parameters, engine="pyradiomics")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "image_type", ["Wavelet", "LoG", "Square", "SquareRoot", "Logarithm", "Exponential", "Gradient"]
)
def test_derived_images_equal_pyradiomics(dims: int, image_type: str) -> None:
    image, mask = _scan(3, (17, 20, 15)[:dims] if dims == 3 else (41, 38), "smooth", 0.4)
    own = {"sigma": [1.0, 2.5]} if image_type == "LoG" else {}
    classes = dict.fromkeys(("firstorder", "glcm", "glrlm", "glszm", "ngtdm"), ())
    parameters = Parameters({image_type: own}, classes, {"binWidth": 7})
    spacing = (1.0, 1.3, 2.0)[:dims]
    found = extract(image, mask, spacing=spacing, parameters=parameters)
    _compare(found, _by_pyradiomics(image, mask, spacing, parameters), 1e-6, 1e-9)


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
