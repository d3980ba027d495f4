from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from scipy.spatial import KDTree
from torchmetrics.functional.classification import binary_auroc

from medgen.filtering.consistency import Segmenters, deal_folds, dice
from medgen.filtering.geometry import field_of_view, orientation
from medgen.filtering.intensity import chance_of_more, class_intensities, units_compare
from medgen.filtering.neighbors import nearest_distance, same_patient, search_real, similarity
from medgen.filtering.size import class_sizes
from medgen.metrics.descriptor import describe
from medgen.segmentation import Preparation, Recipe, build_segmenter
from medgen.types import Grid

NAMES = {0: "background", 1: "shell", 2: "core"}


def test_intensities_are_percentiles_of_the_voxels_of_a_class() -> None:
    draw = np.random.default_rng(0)
    label = torch.from_numpy((np.arange(40_000) % 3).reshape(200, 200))
    image = torch.from_numpy(draw.normal(100, 5, (1, 200, 200)).astype(np.float32)) + 50 * (label == 2)
    unit = image / 200
    found = class_intensities(image, unit, label, NAMES, {0: "MR"})
    assert found["intensity_source:core"] == pytest.approx(150, abs=0.2)
    assert found["intensity_level:shell"] == pytest.approx(0.5, abs=0.002)
    assert found["intensity_spread:shell"] == pytest.approx(5 / 200, rel=0.03)  # a standard deviation
    few = torch.zeros(200, 200)
    few[0, :5] = 1
    assert set(class_intensities(image, unit, few, NAMES, {0: "MR"})) == {
        "intensity_level:shell",
        "intensity_contrast:shell",
        "intensity_source:shell",
    }
    both = class_intensities(image.repeat(2, 1, 1), unit.repeat(2, 1, 1), label, NAMES, {0: "T1", 1: "T2"})
    assert "intensity_level:core, T2" in both


def test_contrast_is_against_the_voxels_around_and_nothing_farther() -> None:
    label = torch.zeros(40, 40)
    label[16:24, 16:24] = 2
    unit = torch.full((1, 40, 40), 0.9)
    unit[0, 13:27, 13:27] = 0.25
    unit[0][label == 2] = 0.75
    found = class_intensities(unit, unit, label, NAMES, {0: "MR"})
    assert found["intensity_contrast:core"] == 1.0
    alike = class_intensities(unit, torch.where(label == 2, 0.25, unit), label, NAMES, {0: "MR"})
    assert alike["intensity_contrast:core"] == 0.5
    windowed = class_intensities(unit, unit**3, label, NAMES, {0: "MR"})
    assert windowed["intensity_contrast:core"] == found["intensity_contrast:core"]
    everywhere = class_intensities(unit, unit, torch.full((40, 40), 2), NAMES, {0: "MR"})
    assert "intensity_contrast:core" not in everywhere


def test_the_chance_of_more_is_the_area_under_the_roc_curve() -> None:
    draw = np.random.default_rng(0)
    values, others = draw.integers(0, 9, 300), draw.integers(2, 11, 400)  # with ties
    truth = np.repeat([1, 0], [300, 400])
    area = float(binary_auroc(torch.from_numpy(np.concatenate([values, others]) / 10.0), torch.from_numpy(truth)))
    assert chance_of_more(values, others) == pytest.approx(area, abs=1e-6)
    many = draw.normal(1, 1, 150_001), draw.normal(0, 1, 200_000)
    assert chance_of_more(*many) == pytest.approx(0.7602, abs=0.005)  # Phi(1 / sqrt 2)


def test_source_units_compare_where_scans_agree_on_them() -> None:
    tissue = [{"intensity_source:shell": 40.0 + index} for index in range(20)]
    gains = [{"intensity_source:shell": 40.0 * 10 ** (index / 4)} for index in range(20)]
    assert units_compare(tissue, [1000.0] * 20)
    assert not units_compare(gains, [80.0 * 10 ** (index / 4) for index in range(20)])


def test_sizes_are_in_cubic_millimeters() -> None:
    label = torch.zeros(10, 10, 10)
    label[:2, :3, :4] = 1
    label[5:7, 5:7, 5:7] = 2
    grid = Grid((10, 10, 10), np.diag([0.5, 2.0, 3.0, 1.0]))
    assert class_sizes(label, grid, NAMES) == pytest.approx(
        {"volume:shell": 72.0, "volume:core": 24.0, "share:shell": 0.75, "share:core": 0.25}
    )
    pixels = class_sizes(label[:, :, 0], Grid((10, 10), np.eye(4), known=False), {0: "background", 1: "shell"})
    assert pixels == {"volume:shell": 6.0}


def test_field_of_view_is_in_millimeters_and_orientation_that_of_the_header() -> None:
    grid = Grid((10, 20, 30), np.array([[0, -2.0, 0, 0], [1.5, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]))
    found = field_of_view(grid)
    assert found["spacing:left-right"] == 1.5 and found["extent:down-up"] == 90
    assert orientation(grid) == "ALS"
    flat = Grid((8, 9), np.eye(4), known=False)
    assert field_of_view(flat) == {"extent:rows": 8, "extent:columns": 9} and orientation(flat) == "unknown"


def test_dice_is_that_of_monai_for_each_segmenter_and_then_the_mean() -> None:
    networks = tuple(build_segmenter(Recipe(1, 1), 2, 1, 3, seed).eval() for seed in (0, 1, 2))
    preparation = Preparation((1.0, 1.0), (1.0, 1.0), (32, 32), 1)
    segmenters = Segmenters(preparation, networks, {"a": 1}, "digest")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 32, 32, generator=generator).half()
    label = torch.randint(0, 3, (32, 32), generator=generator).to(torch.uint8)

    def expected(network: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found = network(image[None].float()).argmax(1)
        both = (torch.stack([values == k for k in (1, 2)], 1).float() for values in (found, given[None]))
        return compute_dice(*both)[0]

    each, together = dice(segmenters.agreement((image, label)))
    mean = torch.stack([expected(network, label) for network in networks]).mean(0)
    torch.testing.assert_close(torch.tensor(each), mean)
    found = [network(image[None].float()).argmax(1)[0].numpy() for network in networks]
    equal = [((map_ == label.numpy()) & (map_ > 0)).sum() for map_ in found]
    shares = [2 * n / ((map_ > 0).sum() + (label > 0).sum()) for n, map_ in zip(equal, found, strict=True)]
    assert together == pytest.approx(float(np.mean(shares)))
    own, _ = dice(segmenters.agreement((image, label), "a"))
    torch.testing.assert_close(torch.tensor(own), expected(networks[1], label))
    without, _ = dice(segmenters.agreement((image, torch.where(label == 2, 0, label).to(torch.uint8))))
    assert np.isnan(without[1]) and not np.isnan(without[0])


def test_dice_of_all_classes_counts_what_is_not_in_the_label() -> None:
    counts = torch.tensor([[[50.0, 60, 60], [0, 40, 0]]])
    each, together = dice(counts)
    assert each[0] == pytest.approx(100 / 120) and np.isnan(each[1])
    assert together == pytest.approx(100 / 160)


def test_folds_keep_patients_whole_and_are_of_one_size() -> None:
    folds = deal_folds([f"p{index % 10}" for index in range(50)], seed=0)
    assert len(folds) == 10 and sorted(np.bincount(list(folds.values())).tolist()) == [3, 3, 4]
    assert folds == deal_folds([f"p{index}" for index in reversed(range(10))], seed=0)


def test_distance_to_the_nearest_is_that_of_a_tree() -> None:
    draw = np.random.default_rng(0)
    made, real = draw.normal(size=(7, 20)), draw.normal(size=(30, 20))
    found = nearest_distance(torch.from_numpy(made), torch.from_numpy(real))
    np.testing.assert_allclose(found, KDTree(real).query(made)[0])
    patients = [f"p{index // 3}" for index in range(30)]
    own = nearest_distance(torch.from_numpy(real), torch.from_numpy(real), same_patient(patients))
    for row in (0, 17):
        others = real[[index for index in range(30) if index // 3 != row // 3]]
        assert float(own[row]) == pytest.approx(KDTree(others).query(real[row])[0])


def test_a_mirrored_copy_is_found_and_others_are_not() -> None:
    from scipy.ndimage import gaussian_filter

    draw = np.random.default_rng(0)
    scans = torch.from_numpy(gaussian_filter(draw.normal(size=(30, 1, 48, 48)), (0, 0, 2, 2)))
    search, warnings = search_real(describe(scans[:24]), [f"p{index}" for index in range(24)])
    assert not warnings
    made = torch.cat([scans[:1].flip(-1), scans[24:]])
    alike = similarity(describe(made), describe(scans[:24]))
    assert alike[0] > search.threshold > alike[1:].max()
