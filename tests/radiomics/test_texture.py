"""Texture and first-order features against the reference values of the Image Biomarker Standardisation Initiative.

The digital phantom and its values: IBSI reference manual, arXiv:1612.07003v11, section 5 and chapter 3, for the
aggregation "3D, averaged over directions", which is PyRadiomics's.
"""

from __future__ import annotations

import numpy as np
import pytest

from medgen.radiomics import extract
from medgen.radiomics.binning import bin_edges

# Voxels outside the region are 0; rows run along y, one block a slice.
PHANTOM = np.array(
    [
        [[1, 4, 4, 1, 1], [1, 4, 6, 1, 1], [4, 1, 6, 4, 1], [4, 4, 6, 4, 1]],
        [[1, 4, 4, 1, 1], [1, 1, 6, 1, 1], [0, 1, 3, 1, 1], [4, 4, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 6, 1, 1]],
    ],
    dtype=float,
)
REFERENCE = {
    "firstorder_Mean": 2.15,
    "firstorder_Variance": 3.05,
    "firstorder_Skewness": 1.08,
    "firstorder_Kurtosis": 3 - 0.355,  # IBSI gives the excess
    "firstorder_Median": 1,
    "firstorder_Minimum": 1,
    "firstorder_10Percentile": 1,
    "firstorder_90Percentile": 4,
    "firstorder_Maximum": 6,
    "firstorder_InterquartileRange": 3,
    "firstorder_Range": 5,
    "firstorder_MeanAbsoluteDeviation": 1.55,
    "firstorder_RobustMeanAbsoluteDeviation": 1.11,
    "firstorder_Energy": 567,
    "firstorder_RootMeanSquared": 2.77,
    "firstorder_Entropy": 1.27,
    "firstorder_Uniformity": 0.512,
    "glcm_MaximumProbability": 0.503,
    "glcm_JointAverage": 2.14,
    "glcm_SumSquares": 3.1,
    "glcm_JointEntropy": 2.4,
    "glcm_DifferenceAverage": 1.43,
    "glcm_DifferenceVariance": 3.06,
    "glcm_DifferenceEntropy": 1.56,
    "glcm_SumAverage": 4.29,
    "glcm_SumEntropy": 1.92,
    "glcm_JointEnergy": 0.303,
    "glcm_Contrast": 5.32,
    "glcm_Id": 0.677,
    "glcm_Idn": 0.851,
    "glcm_Idm": 0.618,
    "glcm_Idmn": 0.898,
    "glcm_InverseVariance": 0.0604,
    "glcm_Correlation": 0.157,
    "glcm_Autocorrelation": 5.06,
    "glcm_ClusterTendency": 7.07,
    "glcm_ClusterShade": 16.6,
    "glcm_ClusterProminence": 145,
    "glcm_Imc1": -0.157,
    "glcm_Imc2": 0.52,
    "glrlm_ShortRunEmphasis": 0.705,
    "glrlm_LongRunEmphasis": 3.06,
    "glrlm_LowGrayLevelRunEmphasis": 0.603,
    "glrlm_HighGrayLevelRunEmphasis": 9.7,
    "glrlm_ShortRunLowGrayLevelEmphasis": 0.352,
    "glrlm_ShortRunHighGrayLevelEmphasis": 8.54,
    "glrlm_LongRunLowGrayLevelEmphasis": 2.39,
    "glrlm_LongRunHighGrayLevelEmphasis": 17.6,
    "glrlm_GrayLevelNonUniformity": 21.8,
    "glrlm_GrayLevelNonUniformityNormalized": 0.43,
    "glrlm_RunLengthNonUniformity": 26.9,
    "glrlm_RunLengthNonUniformityNormalized": 0.513,
    "glrlm_RunPercentage": 0.68,
    "glrlm_GrayLevelVariance": 3.46,
    "glrlm_RunVariance": 0.574,
    "glrlm_RunEntropy": 2.43,
    "glszm_SmallAreaEmphasis": 0.255,
    "glszm_LargeAreaEmphasis": 550,
    "glszm_LowGrayLevelZoneEmphasis": 0.253,
    "glszm_HighGrayLevelZoneEmphasis": 15.6,
    "glszm_SmallAreaLowGrayLevelEmphasis": 0.0256,
    "glszm_SmallAreaHighGrayLevelEmphasis": 2.76,
    "glszm_LargeAreaLowGrayLevelEmphasis": 503,
    "glszm_LargeAreaHighGrayLevelEmphasis": 1490,
    "glszm_GrayLevelNonUniformity": 1.4,
    "glszm_SizeZoneNonUniformity": 1,
    "glszm_ZonePercentage": 0.0676,
    "glszm_GrayLevelVariance": 2.64,
    "glszm_ZoneVariance": 331,
    "glszm_ZoneEntropy": 2.32,
    "gldm_SmallDependenceEmphasis": 0.045,
    "gldm_LargeDependenceEmphasis": 109,
    "gldm_LowGrayLevelEmphasis": 0.693,
    "gldm_HighGrayLevelEmphasis": 7.66,
    "gldm_GrayLevelNonUniformity": 37.9,
    "gldm_DependenceNonUniformity": 4.86,
    "gldm_DependenceVariance": 22.1,
    "gldm_DependenceEntropy": 4.4,
    "ngtdm_Coarseness": 0.0296,
    "ngtdm_Contrast": 0.584,
    "ngtdm_Busyness": 6.54,
    "ngtdm_Complexity": 13.5,
    "ngtdm_Strength": 0.763,
}


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    image = PHANTOM.transpose(2, 1, 0)
    return extract(image, image > 0, spacing=(2.0, 2.0, 2.0), binWidth=1)


@pytest.mark.parametrize("name", REFERENCE)
def test_equals_the_reference_value_of_the_phantom(found: dict[str, float], name: str) -> None:
    # The manual prints three digits.
    assert found[f"original_{name}"] == pytest.approx(REFERENCE[name], rel=6e-3)


def test_turning_and_mirroring_the_phantom_changes_nothing(found: dict[str, float]) -> None:
    image = PHANTOM.transpose(2, 1, 0)
    turned = np.flip(image, 1).transpose(2, 0, 1)
    other = extract(turned, turned > 0, spacing=(2.0, 2.0, 2.0), binWidth=1)
    texture = [name for name in found if "_shape_Maximum2D" not in name]
    assert {name: other[name] for name in texture} == pytest.approx({name: found[name] for name in texture}, rel=1e-9)


def test_bins_begin_at_multiples_of_the_width_or_divide_the_range() -> None:
    np.testing.assert_allclose(bin_edges(np.array([54.0, 166.0]), bin_width=25), [50, 75, 100, 125, 150, 175, 200])
    np.testing.assert_allclose(bin_edges(np.array([0.0, 8.0]), bin_count=4), [0, 2, 4, 6, 9])
    np.testing.assert_allclose(bin_edges(np.array([5.0, 5.0]), bin_width=5), [5, 10])
