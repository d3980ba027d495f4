"""Rarity against scikit-image's region sizes, SciPy's nearest neighbors and densities that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.stats import norm, spearmanr
from skimage.measure import regionprops

from medgen.metrics.rarity import describe_classes, find_tail, rarity, standardize


def normal(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_classes_are_described_as_region_properties_are():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (6, 7, 5), generator=generator)
    image = torch.rand(2, 6, 7, 5, generator=generator)
    found = describe_classes(label, 4, image=image, voxel_volume=0.5)
    regions = regionprops(label.numpy() + 1, intensity_image=image.movedim(0, -1).numpy())
    sizes = [math.log(region.num_pixels * 0.5) for region in regions[1:]]
    means = np.array([region.intensity_mean for region in regions]).T  # (C, K)
    missing = np.full((2, 1), np.nan)
    expected = [1, 1, 0, *sizes, math.nan, *np.hstack([means, missing]).ravel()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(describe_classes(label, 4, voxel_volume=0.5).numpy(), expected[:6], rtol=1e-12)


def test_what_is_missing_lies_at_the_mean_and_what_is_constant_keeps_its_unit():
    reference = torch.tensor([[1.0, 2.0, 7.0], [1.0, 4.0, 7.0], [0.0, math.nan, 7.0]], dtype=torch.float64)
    made = standardize(reference, torch.tensor([[0.0, math.nan, 7.0], [1.0, 5.0, 8.0]], dtype=torch.float64))
    mean, std = 2 / 3, math.sqrt(2) / 3
    expected = [[-mean / std, 0, 0], [(1 - mean) / std, 2, 1]]
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64))


def test_distances_are_those_of_a_tree_over_other_patients():
    reference, features = normal(40, 3, 0), normal(15, 3, 1)
    patients = [f"patient{index // 4}" for index in range(40)]
    own = [f"patient{index}" for index in range(15)]  # the last five are of nobody in the reference
    found = rarity(features, reference, groups=own, reference_groups=patients, nearest_k=3)
    for row, (point, patient) in enumerate(zip(features, own, strict=True)):
        others = reference[[other != patient for other in patients]]
        assert float(found[row]) == pytest.approx(cKDTree(others.numpy()).query(point.numpy(), 3)[0][2], rel=1e-12)


def test_rarity_orders_points_as_their_density_does():
    points = normal(2000, 2, 0)
    found = rarity(points, points, groups=range(2000), reference_groups=range(2000))
    density = norm.logpdf(points.numpy()).sum(axis=1)
    assert spearmanr(found, density).statistic < -0.75


def test_the_tail_of_equal_sets_is_a_tenth_and_noise_does_not_count():
    real = normal(3000, 2, 0)
    names = [f"real{index}" for index in range(3000)]
    made = torch.cat([normal(1000, 2, 1), 1000 * normal(1000, 2, 2)])
    tail = find_tail(real, made, groups=names, synthetic_groups=[None] * 2000)
    assert float((tail.real > tail.threshold).double().mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(tail.in_tail[:1000].double().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(tail.in_tail[1000:].double().mean()) < 0.01
    assert tail.share == pytest.approx(float(tail.in_tail.double().mean()))
    sound = torch.arange(2000) % 2 == 0
    kept = find_tail(real, made, groups=names, synthetic_groups=[None] * 2000, sound=sound)
    assert torch.equal(kept.in_tail, tail.in_tail & sound)


def test_a_copy_of_a_rare_scan_is_rare_by_its_patient():
    real = torch.cat([normal(60, 2, 0) * 0.1, torch.tensor([[4.0, 4.0]], dtype=torch.float64).repeat(6, 1)])
    groups = [*map(str, range(60)), *["rare"] * 6]  # six scans of one rare patient lie together
    made = real[-1:].clone()
    tail = find_tail(real, made, groups=groups, synthetic_groups=["rare"])
    assert tail.in_tail.tolist() == [True]
    assert find_tail(real, made, groups=groups, synthetic_groups=["nobody"]).in_tail.tolist() == [False]


def test_what_does_not_go_together_is_refused():
    real, made = normal(8, 2, 0), normal(3, 2, 1)
    sets = {"groups": range(8), "synthetic_groups": "abc"}
    with pytest.raises(ValueError, match=r"share: expected above 0 and below 1, got 1\. 0\.1 is the lowest decile"):
        find_tail(real, made, share=1, **sets)
    with pytest.raises(ValueError, match=r"sound: expected \(3,\), got \(2,\)"):
        find_tail(real, made, sound=torch.ones(2), **sets)
    with pytest.raises(ValueError, match=r"groups: expected one for each of 3 and 8 scans, got 2 and 8"):
        rarity(made, real, groups="ab", reference_groups=range(8))
    with pytest.raises(ValueError, match=r"nearest_k: expected 1 to 7, the real scans of other patients, got 8"):
        rarity(real, real, groups=range(8), reference_groups=range(8), nearest_k=8)
    with pytest.raises(ValueError, match=r"standardize: expected \(N, D\) and \(M, D\), got \(8, 2\) and \(3, 1\)"):
        find_tail(real, made[:, :1], **sets)
    with pytest.raises(ValueError, match=r"rarity: expected finite features, got NaN or infinity"):
        find_tail(real, made / 0, **sets)
    with pytest.raises(ValueError, match=r"rarity: expected \(N, D\) and \(M, D\)"):
        rarity(made[:, :1], real, groups="abc", reference_groups=range(8))
