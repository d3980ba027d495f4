"""Vendi score: the effective number of different scans in a set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from medgen.metrics.feature_metric import FeatureSetMetric
from medgen.metrics.features import check_feature_sets, cosines


def vendi_from_cosines(cosine: torch.Tensor, *, order: float = 1.0) -> torch.Tensor:
    """The score of :func:`vendi_score` from inner products of unit vectors.

    Args:
        cosine: ``(N, N)`` similarities with ones on the diagonal, float64.
        order: q.

    Returns:
        Scalar in [1, N].
    """
    # NumPy's eigenvalues of a symmetric matrix take a third of the time of torch's on a CPU.
    values = torch.from_numpy(np.linalg.eigvalsh((cosine / len(cosine)).cpu().numpy())).to(cosine.device)
    # What is left of zero after rounding would count with q < 1, where small eigenvalues weigh most.
    values = values[values > len(values) * torch.finfo(values.dtype).eps * values[-1]]
    if order == 1:
        return torch.exp(-(values * values.log()).sum())
    if math.isinf(order):
        return 1 / values[-1]
    return values.pow(order).sum() ** (1 / (1 - order))


def vendi_score(features: torch.Tensor, *, order: float = 1.0) -> torch.Tensor:
    """Effective number of different scans: the exponential of the Rényi entropy of the similarities' eigenvalues.

    Similarity is the cosine between features. 1 if all are alike, N if no two have anything in common. It says nothing
    about realism, and grows with N: read it beside that of as many real scans.

    Args:
        features: ``(N, D)``, one row a scan.
        order: q, at least 0; 1 is the published score (Shannon entropy), larger ones weigh common scans more, infinity
            only the most common.

    Returns:
        Float64 scalar in [1, N].

    Raises:
        ValueError: If the features are not ``(N, D)``, not finite or hold a zero vector, or `order` is negative.

    References:
        Friedman and Dieng 2023, The Vendi score, arXiv:2210.02410, equation 2; Pasarkar and Dieng 2024,
        arXiv:2310.12952, equation 3, for other orders.
    """
    if not order >= 0:
        raise ValueError(f"order: expected at least 0, got {order}.")
    features, _ = check_feature_sets("vendi_score", features, features, minimum=1)
    return vendi_from_cosines(cosines(features @ features.T), order=order)


class VendiScore(FeatureSetMetric):
    """:func:`vendi_score` of the features of real and of synthetic scans, averaged over views.

    The score of the real scans is the yardstick; it is one only if both sets have as many scans. Either set may be
    left out. Memory as for :class:`medgen.metrics.kernel.KernelDistance`.

    Args:
        feature: Name of an extractor, or a module that maps ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
        order: q of the entropy; 1 is the published score.
        **kwargs: As for :class:`medgen.metrics.feature_metric.FeatureMetric`.

    Attributes:
        higher_is_better: True.
    """

    higher_is_better = True

    def __init__(self, feature: str | nn.Module = "efficientnet-lite0", *, order: float = 1.0, **kwargs: Any) -> None:
        super().__init__(feature, **kwargs)
        if not order >= 0:
            raise ValueError(f"order: expected at least 0, got {order}.")
        self.order = order

    def compute(self) -> dict[str, torch.Tensor]:
        """Scores over everything that was added.

        Returns:
            ``real`` and ``synthetic``, those of the two that have scans: float64 scalars, means over the views.

        Raises:
            ValueError: If neither set has two scans.
        """
        sets = {name: self._features(name) for name in ("real", "synthetic")}
        usable = {name: features for name, features in sets.items() if len(features) >= 2}
        if not usable:
            counts = tuple(len(features) for features in sets.values())
            raise ValueError(f"VendiScore: expected at least 2 scans of one set, got {counts}. Call update first.")
        return {
            name: torch.stack([vendi_score(view, order=self.order) for view in features.unbind(dim=1)]).mean()
            for name, features in usable.items()
        }
