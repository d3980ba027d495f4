"""The extraction as a whole: what it refuses, several labels at once, parameter files, threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from medgen.radiomics import Parameters, extract, extract_labels, luminance
from medgen.radiomics.region import normalize
from medgen.types import BadInputError


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(24, 20)), 1)
    return np.round((smooth - smooth.min()) / np.ptp(smooth) * 255)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    made = np.zeros((24, 20), dtype=np.int16)
    made[3:12, 4:15] = 1
    made[13:22, 2:10] = 4
    return made


def test_several_labels_in_one_pass_equal_each_alone(image: np.ndarray, labels: np.ndarray) -> None:
    content = {"imageType": {"Original": {}, "Wavelet": {}, "LoG": {"sigma": [1]}}, "setting": {"binWidth": 10}}
    for setting in ({}, {"resampledPixelSpacing": [1.5, 1.5], "padDistance": 3}, {"preCrop": True}):
        parameters = Parameters.from_dict(content).with_settings(**setting)
        both = extract_labels(image, labels, parameters=parameters)
        assert list(both) == [1, 4]
        for value, found in both.items():
            assert found == extract(image, labels, parameters=parameters, label=value)
            assert found == extract(image, (labels == value).astype(np.uint8), parameters=parameters)
    assert extract(image, labels, label=1) != extract(image, labels, label=4)


def test_tensors_and_threads_give_the_same(image: np.ndarray, labels: np.ndarray) -> None:
    expected = extract(image, labels)
    assert extract(torch.from_numpy(image), torch.from_numpy(labels)) == expected
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(lambda _: extract(image, labels), range(8)))


def test_a_parameter_file_of_pyradiomics_is_read_as_it_is(
    image: np.ndarray, labels: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "Params.yaml").write_text(
        "imageType:\n  Original: {}\n  LoG:\n    sigma: [1.0, 2.0]\n  Wavelet:\n    binWidth: 10\n"
        "featureClass:\n  shape2D:\n  firstorder: []\n  glcm:\n    - 'Autocorrelation'\n    - Contrast\n"
        "setting:\n  binWidth: 25\n  label: 4\n  interpolator: 'sitkBSpline'\n  resampledPixelSpacing:\n"
        "  weightingNorm:\n  geometryTolerance: 0.0001\nvoxelSetting:\n  kernelRadius: 2\n"
    )
    found = extract(image, labels, parameters=tmp_path / "Params.yaml")
    assert [name for name in found if "_glcm_" in name] == [
        f"{kind}_glcm_{name}"
        for kind in (
            "original",
            "log-sigma-1-0-mm-3D",
            "log-sigma-2-0-mm-3D",
            *(f"wavelet-{band}" for band in ("LH", "HL", "HH", "LL")),
        )
        for name in ("Autocorrelation", "Contrast")
    ]
    assert found["original_shape2D_PixelSurface"] == (labels == 4).sum()
    assert sum("firstorder" in name for name in found) == 7 * 18
    coarse = extract(image, labels, parameters=tmp_path / "Params.yaml", binWidth=50)
    assert coarse["original_glcm_Contrast"] < found["original_glcm_Contrast"]
    assert coarse["wavelet-LH_glcm_Contrast"] == found["wavelet-LH_glcm_Contrast"]  # has a width of its own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"setting": {"binwidth": 5}},
            r"setting: expected a name that PyRadiomics knows, got 'binwidth'. Did you mean 'binWidth'\?$",
        ),
        ({"setting": {"zzz": 5}}, "setting: .*got 'zzz'. The chapter 'Customizing the extraction'"),
        ({"setting": {"interpolator": "sitkFoo"}}, "setting interpolator: expected sitkNearestNeighbor, sitkLinear"),
        ({"setting": {"binWidth": 0}}, "setting binWidth: expected a positive number, got 0"),
        ({"setting": {"normalize": "yes"}}, "setting normalize: expected true or false, got 'yes'"),
        ({"setting": {"wavelet": "coif99"}}, "setting wavelet: expected a discrete wavelet of PyWavelets"),
        ({"setting": {"resampledPixelSpacing": [1, -1]}}, "resampledPixelSpacing: expected 2 or 3 lengths"),
        ({"imageType": {"Wavelets": {}}}, r"imageType: expected a name .*, got 'Wavelets'. Did you mean 'Wavelet'\?"),
        ({"imageType": {"LoG": {"sigmas": [1]}}}, "imageType LoG: .*, got 'sigmas'. Did you mean 'sigma'"),
        ({"featureClass": {"glcm": ["Contrasts"]}}, r"featureClass glcm: .*Did you mean 'Contrast'\?"),
        (
            {"features": {}},
            r"parameters: expected a name that PyRadiomics knows, got 'features'. Did you mean 'featureClass'\?",
        ),
        (
            {"zzz": {}},
            "parameters: expected one of imageType, featureClass, setting, voxelSetting, got 'zzz'",
        ),
        ({"setting": 5}, "setting: expected names with values, got 5"),
    ],
)
def test_a_parameter_that_does_not_exist_is_named(content: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Parameters.from_dict(content)


def test_a_parameter_file_that_cannot_be_read_is_named(image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"none\.yaml: expected a YAML parameter file"):
        extract(image, parameters=tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(BadInputError, match=r"list\.yaml: expected sections"):
        extract(image, parameters=str(tmp_path / "list.yaml"))
    (tmp_path / "wrong.yaml").write_text("setting:\n  binWith: 5\n")
    with pytest.raises(BadInputError, match=r"wrong\.yaml: setting: .*Did you mean 'binWidth'"):
        extract(image, parameters=tmp_path / "wrong.yaml")


def test_what_has_no_features_is_refused(image: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(BadInputError, match=r"mask: expected the shape of the image \(24, 20\), got \(20, 24\)"):
        extract(image, labels.T)
    with pytest.raises(BadInputError, match=r"mask: expected voxels of label 2, got none; it holds \[1, 4\]"):
        extract(image, labels, label=2)
    with pytest.raises(BadInputError, match="mask: expected voxels of label 1, got none; it holds only 0"):
        extract(image, np.zeros_like(labels))
    with pytest.raises(BadInputError, match="mask: expected at least one voxel above 0"):
        extract_labels(image, np.zeros_like(labels))
    speck = np.zeros_like(labels)
    speck[4, 4] = 1
    with pytest.raises(BadInputError, match="mask: expected more than one voxel, got a single one"):
        extract(image, speck)
    speck[4, 5:9] = 1
    with pytest.raises(BadInputError, match="extends along 2 axes, got 1"):
        extract(image, speck)
    assert np.isfinite(extract(image, speck, minimumROIDimensions=1)["original_firstorder_Mean"])
    with pytest.raises(BadInputError, match="mask: expected more than 500 voxels, got 99"):
        extract(image, labels, minimumROISize=500)
    hole = image.copy()
    hole[0, 0] = np.nan
    with pytest.raises(BadInputError, match="image: expected finite intensities, got NaN or infinity"):
        extract(hole, labels)
    for spacing in ((0, 1), (1, 1, 1), (1, np.inf)):
        with pytest.raises(BadInputError, match="spacing: expected 2 positive lengths in mm"):
            extract(image, labels, spacing=spacing)
    with pytest.raises(BadInputError, match="image: expected one channel"):
        extract(np.zeros((2, 3, 4, 5)))
    with pytest.raises(BadInputError, match="mask: expected whole numbers, got fractions"):
        extract(image, labels * 0.3)
    with pytest.raises(BadInputError, match="mask: expected whole numbers, got NaN or infinity"):
        extract(image, np.where(labels == 4, np.nan, labels))
    for label in ([1, 2], "1", 1.5, None):
        with pytest.raises(BadInputError, match=r"label: expected one whole number, got .*Use extract_labels"):
            extract_labels(image, labels, [label])  # type: ignore[list-item]
    with pytest.raises(BadInputError, match=r"label: expected one whole number, got \[1, 4\]. Use extract_labels"):
        extract(image, labels, label=[1, 4])  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"labels: expected whole numbers, such as \[1, 2\], got 4"):
        extract_labels(image, labels, 4)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"interpolator: .*got 'sitkGaussian'. Choose one of these, or pass engine"):
        extract(image, labels, interpolator="sitkGaussian", resampledPixelSpacing=[2, 2])
    with pytest.raises(BadInputError, match="resegmentRange: expected more than one voxel within"):
        extract(image, labels, resegmentRange=[1000, 2000])
    with pytest.raises(BadInputError, match="engine: expected medgen or pyradiomics, got 'torch'"):
        extract(image, labels, engine="torch")  # type: ignore[arg-type]


def test_a_constant_image_has_features_and_cannot_be_normalized(image: np.ndarray) -> None:
    flat = np.full_like(image, 7.0)
    found = extract(flat)
    assert found["original_firstorder_Variance"] == found["original_firstorder_Kurtosis"] == 0
    assert found["original_glcm_Correlation"] == found["original_glcm_MCC"] == 1
    assert found["original_ngtdm_Coarseness"] == 1e6
    with pytest.raises(BadInputError, match="image: expected intensities that vary, got a constant image of 7"):
        extract(flat, normalize=True)


def test_whole_intensities_are_normalized_to_the_last_bit_of_itk(image: np.ndarray) -> None:
    simple_itk = pytest.importorskip("SimpleITK")
    expected = simple_itk.GetArrayFromImage(simple_itk.Normalize(simple_itk.GetImageFromArray(image)))
    np.testing.assert_array_equal(normalize(image), expected)


def test_two_voxels_have_features_but_for_the_robust_deviation(image: np.ndarray) -> None:
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[4, 4] = mask[5, 5] = 1
    values = image.copy()
    values[4, 4], values[5, 5] = 10, 30
    found = extract(values, mask)
    assert np.isnan(found["original_firstorder_RobustMeanAbsoluteDeviation"])  # nothing between the percentiles
    assert found["original_firstorder_Mean"] == 20


def test_voxels_without_a_neighbor_have_what_pyradiomics_gives_them(image: np.ndarray) -> None:
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[4, 4] = mask[9, 15] = 1
    flat = np.zeros_like(image)
    apart = extract(flat, mask)
    merged = extract(flat, mask, weightingNorm="no_weighting")
    assert apart["original_glcm_MCC"] == 1
    assert np.isnan([apart["original_glcm_InverseVariance"], apart["original_glrlm_RunEntropy"]]).all()
    assert np.isnan([merged["original_glcm_MCC"], merged["original_glrlm_RunPercentage"]]).all()
    names = ("glcm_InverseVariance", "glrlm_RunEntropy", "glrlm_RunVariance")
    assert [merged[f"original_{name}"] for name in names] == [0, 0, 0]


def test_gray_levels_beyond_memory_are_refused() -> None:
    noise = np.random.default_rng(0).normal(size=(120, 120)) * 1e6
    with pytest.raises(BadInputError, match="glcm: expected at most 8191 gray levels, got 1"):
        extract(noise, binWidth=1)
    with pytest.raises(BadInputError, match="binWidth: expected a width that cuts"):
        extract(noise, binWidth=1e-3)
    with pytest.raises(BadInputError, match="binCount: expected at most 10000000 bins, got 1000000000000"):
        extract(noise, binCount=10**12)


def test_intensities_beyond_the_precision_of_numbers_are_refused() -> None:
    noise = np.random.default_rng(0).normal(size=(12, 12))
    with pytest.raises(
        BadInputError, match=r"image: expected intensities up to 1e\+70.*got .*e\+300. Divide the image"
    ):
        extract(noise * 1e300, binCount=8)
    with pytest.raises(BadInputError, match="binCount: expected intensities that can be cut into 32 bins"):
        extract(noise + 1e16, binCount=32)
    with pytest.raises(BadInputError, match="binWidth: expected a width that is not lost in the rounding"):
        extract(noise + 1e18, binWidth=5)


def test_a_volume_too_small_for_a_filter_says_what_is_left_out() -> None:
    volume = np.random.default_rng(0).normal(size=(12, 12, 3))
    with pytest.warns(UserWarning, match="log-sigma-1-0-mm-3D is left out"):
        found = extract(volume, parameters={"imageType": {"Original": {}, "LoG": {"sigma": [1.0]}}})
    assert not any("log-sigma" in name for name in found)


def test_colors_become_one_gray_image() -> None:
    colors = np.stack([np.full((2, 2), value) for value in (100.0, 10.0, 1.0)])
    np.testing.assert_allclose(luminance(colors), 0.2125 * 100 + 0.7154 * 10 + 0.0721)
    with pytest.raises(BadInputError, match=r"image: expected colors \(3, H, W\)"):
        luminance(colors[:2])


def test_the_first_call_says_that_it_compiles(tmp_path: Path) -> None:
    program = (
        "import numpy; from medgen.radiomics import Parameters, extract;"
        "p = Parameters(feature_classes={'firstorder': ()});"
        "extract(numpy.arange(64.0).reshape(8, 8), parameters=p)"
    )
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PATH": "", "NUMBA_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stderr)
    assert "medgen: compiling the radiomic kernels" in outputs[0]
    assert str(tmp_path) in outputs[0]
    assert "compiling" not in outputs[1]
