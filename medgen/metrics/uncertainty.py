"""How well a segmentation knows where it is wrong: calibration, failure detection, error maps and ambiguity.

References:
    Guo et al. 2017, arXiv:1706.04599 (ECE). Geifman et al. 2019, arXiv:1805.08206 (AURC).
    Kahl et al. 2024, arXiv:2401.08501 (ValUES). Zenk et al. 2025, arXiv:2406.03323 (failure detection).
    Kohl et al. 2018, arXiv:1806.05034 (GED). Wang et al. 2019, arXiv:1807.07356 (volume variation).
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from medgen.types import BadInputError


def calibration_error(
    probability: torch.Tensor,
    label: torch.Tensor,
    *,
    kind: Literal["expected", "average"] = "expected",
    foreground: bool = True,
    num_bins: int = 15,
) -> float:
    """How far probabilities are from the frequencies with which their classes are there, by MONAI.

    Args:
        probability: ``(K, *spatial)``, K classes with the background, sums of 1.
        label: ``(*spatial)`` class indices.
        kind: ``expected`` weighs the bins by their voxels (ECE), ``average`` all alike (ACE).
        foreground: Whether only voxels count which the label or the prediction gives a class, so that the sure and
            large background does not hide the rest.
        num_bins: Bins of probability in [0, 1].

    Returns:
        Mean over the classes but the background, in [0, 1]; NaN where no voxel counts.

    Raises:
        BadInputError: If the shapes do not fit, or a value is no probability.
    """
    from monai.metrics import CalibrationErrorMetric

    _check(probability, label)
    given, shown = label.flatten().long(), probability.flatten(1).float()
    if foreground:
        kept = (given > 0) | (shown.argmax(dim=0) > 0)
        given, shown = given[kept], shown[:, kept]
    if not given.numel():
        return math.nan
    metric = CalibrationErrorMetric(num_bins, include_background=False, calibration_reduction=kind)
    truth = torch.nn.functional.one_hot(given, len(probability)).T
    metric(shown[None], truth[None].float())
    return float(metric.aggregate())


def aurc(confidence: torch.Tensor, risk: torch.Tensor) -> float:
    """Area under the risk-coverage curve: mean risk of the most confident 1, 2, ... N cases, averaged.

    Cases of equal confidence are taken together: each counts the mean risk of them.

    Args:
        confidence: ``(N,)``, more is surer: for a segmentation for example the Dice between its views.
        risk: ``(N,)``, what goes wrong, such as 1 - Dice.

    Returns:
        In the range of the risk; that of a random order is its mean.

    Raises:
        BadInputError: If the two differ in length, are empty or not finite.
    """
    if confidence.ndim != 1 or confidence.shape != risk.shape or not len(risk):
        raise BadInputError(
            f"confidence and risk: expected (N,) each, got {tuple(confidence.shape)} and {tuple(risk.shape)}."
        )
    confidence, risk = confidence.double().cpu(), risk.double().cpu()
    if not (torch.isfinite(confidence).all() and torch.isfinite(risk).all()):
        raise BadInputError("confidence and risk: expected finite numbers, got others. Leave such cases out.")
    values, groups = confidence.unique(return_inverse=True)
    counts = torch.zeros(len(values)).double().index_add_(0, groups, torch.ones_like(risk))
    sums = torch.zeros(len(values)).double().index_add_(0, groups, risk)
    order = confidence.argsort(descending=True)
    running = (sums / counts)[groups][order].cumsum(0)
    return float((running / torch.arange(1, len(risk) + 1)).mean())


def error_map_auc(uncertainty: torch.Tensor, error: torch.Tensor) -> float:
    """Chance that a wrong voxel is more uncertain than a right one.

    Args:
        uncertainty: ``(*spatial)``, in any units.
        error: ``(*spatial)`` bool, where the prediction is wrong.

    Returns:
        Area under the ROC curve; NaN where all voxels are wrong, or none.

    Raises:
        BadInputError: If the shapes differ.
    """
    from torchmetrics.functional.classification import binary_auroc

    _check_maps(uncertainty, error)
    if error.all() or not error.any():
        return math.nan
    low, high = uncertainty.min(), uncertainty.max()
    scaled = (uncertainty.double() - low) / (high - low).clamp(min=1e-12)  # torchmetrics would squash other ranges
    return float(binary_auroc(scaled.flatten(), error.flatten().long()))


def error_map_dice(uncertainty: torch.Tensor, error: torch.Tensor, threshold: float) -> float:
    """Dice of the voxels that are called uncertain with those that are wrong.

    Args:
        uncertainty: ``(*spatial)``.
        error: ``(*spatial)`` bool, where the prediction is wrong.
        threshold: Above it a voxel is uncertain. Choose it on other scans.

    Returns:
        In [0, 1]; NaN where nothing is wrong and nothing uncertain.

    Raises:
        BadInputError: If the shapes differ.
    """
    _check_maps(uncertainty, error)
    called = uncertainty > threshold
    total = int(called.sum()) + int(error.sum())
    return 2 * int((called & error).sum()) / total if total else math.nan


def generalized_energy_distance(predicted: torch.Tensor, given: torch.Tensor, num_classes: int) -> float:
    """Squared distance between a distribution of segmentations and that of several readers.

    ``2 E d(s, y) - E d(s, s') - E d(y, y')`` with ``d = 1 - IoU``, the mean over the classes that one of the two has
    (Kohl et al. 2018, equation 5).

    Args:
        predicted: ``(S, *spatial)`` class indices of samples.
        given: ``(R, *spatial)`` of readers.
        num_classes: K, with the background, which does not count.

    Returns:
        At least 0 but for the bias of few samples.

    Raises:
        BadInputError: If the shapes differ.
    """
    if predicted.shape[1:] != given.shape[1:]:
        raise BadInputError(
            f"predicted and given: expected one grid, got {tuple(predicted.shape)} and {tuple(given.shape)}."
        )

    def mean_distance(left: torch.Tensor, right: torch.Tensor) -> float:
        return sum(_distance(a, b, num_classes) for a in left for b in right) / (len(left) * len(right))

    cross, own, other = (mean_distance(*pair) for pair in ((predicted, given), (predicted, predicted), (given, given)))
    return 2 * cross - own - other


def _distance(left: torch.Tensor, right: torch.Tensor, num_classes: int) -> float:
    distances = []
    for k in range(1, num_classes):
        a, b = left == k, right == k
        union = int((a | b).sum())
        if union:
            distances.append(1 - int((a & b).sum()) / union)
    return sum(distances) / len(distances) if distances else 0.0


def normalized_cross_correlation(uncertainty: torch.Tensor, disagreement: torch.Tensor) -> float:
    """Correlation of an uncertainty map with that of the disagreement of readers.

    Args:
        uncertainty: ``(*spatial)``.
        disagreement: ``(*spatial)``.

    Returns:
        In [-1, 1]; NaN where one of the two is constant.

    Raises:
        BadInputError: If the shapes differ.
    """
    _check_maps(uncertainty, disagreement)
    a, b = (values.double().flatten() - values.double().mean() for values in (uncertainty, disagreement))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else math.nan


def volume_cv(volumes: torch.Tensor) -> float:
    """Coefficient of variation of the volume of a structure over predictions: standard deviation over mean.

    Args:
        volumes: ``(V,)`` volumes, in any unit (Wang et al. 2019, section 3.3).

    Returns:
        From 0; NaN for fewer than two predictions or a mean of 0.
    """
    volumes = volumes.double()
    if len(volumes) < 2 or not float(volumes.mean()):
        return math.nan
    return float(volumes.std() / volumes.mean())


def _check(probability: torch.Tensor, label: torch.Tensor) -> None:
    if tuple(probability.shape[1:]) != tuple(label.shape):
        raise BadInputError(
            f"probability: expected (K, {', '.join(map(str, label.shape))}), got {tuple(probability.shape)}."
        )
    if not bool(((probability >= 0) & (probability <= 1 + 1e-4)).all()):
        raise BadInputError("probability: expected numbers in [0, 1], got others. Apply the softmax first.")


def _check_maps(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        raise BadInputError(f"maps: expected one shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
