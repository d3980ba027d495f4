from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torchmetrics.functional.classification import binary_calibration_error

from medgen.metrics.uncertainty import (
    aurc,
    calibration_error,
    error_map_auc,
    error_map_dice,
    generalized_energy_distance,
    normalized_cross_correlation,
    volume_cv,
)
from medgen.types import BadInputError


def test_expected_calibration_error_of_two_classes_is_that_of_torchmetrics() -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.rand(40, 50, generator=draw)
    label = (torch.rand(40, 50, generator=draw) < p**2).long()
    found = calibration_error(torch.stack([1 - p, p]), label, foreground=False, num_bins=10)
    assert found == pytest.approx(float(binary_calibration_error(p, label, n_bins=10)), abs=1e-6)


def test_foreground_calibration_leaves_out_what_nobody_sees_a_class_in() -> None:
    probability, label = torch.zeros(2, 10, 10), torch.zeros(10, 10, dtype=torch.long)
    probability[0] = 1
    label[:2] = 1
    probability[:, :2] = torch.tensor([0.1, 0.9]).view(2, 1, 1)
    assert calibration_error(probability, label) == pytest.approx(0.1, abs=1e-6)
    assert calibration_error(probability, label, foreground=False) == pytest.approx(0.02, abs=1e-6)
    assert calibration_error(probability, label, kind="average", foreground=False) == pytest.approx(0.05, abs=1e-6)
    assert math.isnan(calibration_error(probability[:, 2:], label[2:]))
    with pytest.raises(BadInputError, match="Apply the softmax"):
        calibration_error(3 * probability, label)
    with pytest.raises(BadInputError, match="expected \\(K, 10, 10\\)"):
        calibration_error(probability[:, 1:], label)


def test_risk_coverage_areas_of_known_orders() -> None:
    risk = torch.tensor([0.1, 0.2, 0.6])
    assert aurc(torch.tensor([3.0, 2.0, 1.0]), risk) == pytest.approx((0.1 + 0.15 + 0.3) / 3)
    assert aurc(torch.tensor([1.0, 2.0, 3.0]), risk) == pytest.approx((0.6 + 0.4 + 0.3) / 3)
    assert aurc(torch.zeros(3), risk) == pytest.approx(0.3)
    # Ties count as the mean over their orders.
    orders = [aurc(torch.tensor(c), risk) for c in ([3.0, 2.0, 1.0], [2.0, 3.0, 1.0])]
    assert aurc(torch.tensor([2.0, 2.0, 1.0]), risk) == pytest.approx(sum(orders) / 2)
    with pytest.raises(BadInputError, match="confidence and risk: expected"):
        aurc(torch.zeros(2), risk)
    with pytest.raises(BadInputError, match="expected finite"):
        aurc(torch.tensor([0.0, math.nan, 1.0]), risk)


def test_error_maps() -> None:
    draw = np.random.default_rng(0)
    error = torch.from_numpy(draw.random((30, 30)) < 0.2)
    uncertainty = torch.from_numpy(draw.normal(0, 1, (30, 30))) + 2 * error
    wrong, right = uncertainty[error].numpy(), uncertainty[~error].numpy()
    chance = (wrong[:, None] > right[None]).mean()
    assert error_map_auc(uncertainty, error) == pytest.approx(chance, abs=1e-6)
    called = uncertainty > 1
    assert error_map_dice(uncertainty, error, 1.0) == pytest.approx(
        2 * float((called & error).sum()) / float(called.sum() + error.sum())
    )
    assert math.isnan(error_map_auc(uncertainty, torch.zeros_like(error)))
    assert math.isnan(error_map_dice(uncertainty, torch.zeros_like(error), 1e9))


def test_energy_distance_is_zero_for_one_distribution_and_that_of_the_paper_for_others() -> None:
    first, second = torch.zeros(8, 8, dtype=torch.long), torch.zeros(8, 8, dtype=torch.long)
    first[:4] = 1
    second[:2] = 1  # IoU 1/2
    both = torch.stack([first, second])
    assert generalized_energy_distance(both, both, 2) == pytest.approx(0)
    assert generalized_energy_distance(first[None], second[None], 2) == pytest.approx(2 * 0.5)
    assert generalized_energy_distance(first[None], both, 2) == pytest.approx(2 * 0.25 - 0.25)
    assert generalized_energy_distance(torch.zeros_like(both), torch.zeros_like(both), 2) == 0


def test_correlation_and_volumes() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(6, 7, generator=draw)
    b = a + torch.rand(6, 7, generator=draw)
    wanted = pearsonr(a.flatten().numpy(), b.flatten().numpy()).statistic
    assert normalized_cross_correlation(a, b) == pytest.approx(wanted, abs=1e-6)
    assert math.isnan(normalized_cross_correlation(a, torch.ones_like(a)))
    volumes = torch.tensor([90.0, 100.0, 110.0])
    assert volume_cv(volumes) == pytest.approx(np.std([90, 100, 110], ddof=1) / 100)
    assert math.isnan(volume_cv(volumes[:1])) and math.isnan(volume_cv(torch.zeros(3)))
    with pytest.raises(BadInputError, match="maps: expected one shape"):
        normalized_cross_correlation(a, b[1:])
