"""Feature names and numbers as people read them."""

from __future__ import annotations

import pytest

from medgen.metrics.protocols import PROTOCOLS
from medgen.radiomics.parameters import DEPRECATED, FEATURES
from medgen.report.feature_words import describe_feature, feature_in_words
from medgen.report.numbers import interval, number, p_equals, p_value, percent
from medgen.report.tracks import linear, ticks


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_every_feature_of_a_protocol_has_its_own_words(protocol: str, dims: int) -> None:
    names = PROTOCOLS[protocol].columns(dims)
    phrases = [feature_in_words(name) for name in names]
    assert len(set(phrases)) == len(names)
    for name, phrase in zip(names, phrases, strict=True):
        words = describe_feature(name)
        assert words.meaning != name and "_" not in phrase and words.feature in phrase
        assert not words.image or words.filter


def test_every_feature_of_the_engine_has_words() -> None:
    for group, features in FEATURES.items():
        for feature in (*features, *DEPRECATED.get(group, ())):
            words = describe_feature(f"original_{group}_{feature}")
            assert words.feature.endswith(feature) and "_" not in words.meaning and not words.image


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        (
            "wavelet-LH_glcm_Contrast",
            "contrast of neighboring gray levels (GLCM Contrast), fine detail from top to bottom (wavelet LH)",
        ),
        ("wavelet-HL_firstorder_Mean", "mean intensity (first order Mean), fine detail from side to side (wavelet HL)"),
        ("wavelet-LHH_firstorder_Mean", "mean intensity (first order Mean), fine detail along y and z (wavelet LHH)"),
        ("wavelet2-LLL_firstorder_Mean", "mean intensity (first order Mean), image smoothed again (wavelet2 LLL)"),
        ("log-sigma-2-5-mm-3D_ngtdm_Busyness", "about 2.5 mm (pixels, where their size is unknown) (LoG σ = 2.5 mm)"),
        ("channel0_shape2D_Sphericity", "roundness of the region (2D shape Sphericity), channel 1"),
        ("diagnostics_Mask-original_VoxelNum", "number of voxels of the region as read"),
        ("squareroot_glcm_Id", "square root of the intensities (square root)"),
        ("my_own_feature", "my_own_feature"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_feature_in_words(name: str, phrase: str) -> None:
    assert phrase in feature_in_words(name)


@pytest.mark.parametrize(
    ("value", "beside", "text"),
    [
        (1.23456, (), "1.23"),
        (0.0123456, (), "0.0123"),
        (635.4, (), "635"),
        (12345.6, (), "12,346"),
        (-0.04, (0.344,), "−0.040"),
        (-0.0001, (5.0,), "0.00"),
        (0.0, (), "0"),
        (0.0, (0.055,), "0"),
        (1.5e-7, (), "1.50 × 10⁻⁷"),
        (-2.5e8, (), "−2.50 × 10⁸"),
        (None, (), "not defined"),
        (float("nan"), (1.0,), "not defined"),
    ],
)
def test_numbers_have_three_digits_and_equal_decimals_side_by_side(value: float, beside: tuple, text: str) -> None:
    assert number(value, beside=beside) == text


def test_intervals_shares_and_p_values() -> None:
    assert interval((0.26, 1.05)) == "0.26 to 1.05" and interval(None) == "not defined"
    assert [p_value(p) for p in (0.0004, 0.005, 0.0995, 0.5, None)] == [
        "< 0.001",
        "0.005",
        "0.10",
        "0.50",
        "not defined",
    ]
    assert p_equals(0.0004) == "p < 0.001" and p_equals(0.02) == "p = 0.020"
    assert [percent(share) for share in (0.214, 0.022, 0, None)] == ["21 %", "2.2 %", "0 %", "not defined"]


def test_axes_have_round_marks_in_their_places() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.3, 0.2) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1, 0.2])
    scale = linear(0, 2)
    assert scale(1) == pytest.approx(50) and scale(-1) == scale(0) < scale(2) == scale(3)
