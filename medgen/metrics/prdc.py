"""Precision, recall, density and coverage: how much of each set lies in the neighborhoods of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medgen.metrics.feature_metric import FeatureSetMetric
from medgen.metrics.features import check_feature_sets

NAMES = ("precision", "recall", "density", "coverage")
# A scan that equals a neighbor lies exactly on the border of a ball; this keeps it inside whatever the rounding.
_BORDER = 1 + 1e-9


def squared_distances(gram: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances from inner products.

    Args:
        gram: ``(P, P)`` inner products, float64; best of centered features, which rounds less.

    Returns:
        ``(P, P)``, at least 0, with a diagonal of exact zeros.
    """
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp(min=0).fill_diagonal_(0)


def prdc_from_radii(
    radii_x: torch.Tensor, xy: torch.Tensor, radii_y: torch.Tensor, *, nearest_k: int = 5
) -> torch.Tensor:
    """The four values of :func:`prdc` from squared distances.

    Args:
        radii_x: ``(N,)`` from each real scan to its k-th nearest neighbor in the real set.
        xy: ``(N, M)`` from real to synthetic.
        radii_y: ``(M,)`` from each synthetic scan to its k-th nearest neighbor in the synthetic set.
        nearest_k: k.

    Returns:
        ``(4,)``: precision, recall, density, coverage.
    """
    in_real = xy <= (radii_x * _BORDER)[:, None]
    precision = in_real.any(dim=0).double().mean()
    recall = (xy <= radii_y * _BORDER).any(dim=1).double().mean()
    density = in_real.sum().double() / (nearest_k * xy.shape[1])
    coverage = in_real.any(dim=1).double().mean()
    return torch.stack([precision, recall, density, coverage])


def prdc(real: torch.Tensor, synthetic: torch.Tensor, *, nearest_k: int = 5) -> dict[str, torch.Tensor]:
    """Precision and recall (improved), density and coverage of a synthetic set against a real one.

    Each scan is given the ball that reaches to its k-th nearest neighbor in its own set. Precision: share of synthetic
    scans in any ball of a real one (fidelity). Recall: share of real scans in any ball of a synthetic one (diversity).
    Density: balls of real scans that hold a synthetic scan, over k: as precision, but robust to outliers among the
    real scans, and may exceed 1. Coverage: share of real scans whose ball holds a synthetic scan. They depend on n and
    k, and are not 1 for equal distributions (but for density, on average): compare equal n only.

    Args:
        real: ``(N, D)`` features of the real set, one row a scan.
        synthetic: ``(M, D)`` features of the synthetic set.
        nearest_k: k; Kynkäänniemi et al. use 3, Naeem et al. 5.

    Returns:
        ``precision``, ``recall``, ``coverage`` in [0, 1] and ``density`` from 0, as float64 scalars.

    Raises:
        ValueError: If the sets differ in ``D``, have no more than k rows, or are not finite.

    References:
        Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2; Naeem et al. 2020, arXiv:2002.09797,
        equations 3 and 4.
    """
    if nearest_k < 1:
        raise ValueError(f"nearest_k: expected at least 1, got {nearest_k}.")
    real, synthetic = check_feature_sets("prdc", real, synthetic, minimum=nearest_k + 1)
    center = real.mean(dim=0)
    pooled = torch.cat([real - center, synthetic - center])
    distances, n = squared_distances(pooled @ pooled.T), len(real)
    # The k + 1 smallest of a row are the scan itself and its k nearest neighbors.
    radii = [within.kthvalue(nearest_k + 1, dim=1).values for within in (distances[:n, :n], distances[n:, n:])]
    values = prdc_from_radii(radii[0], distances[:n, n:], radii[1], nearest_k=nearest_k)
    return dict(zip(NAMES, values, strict=True))


class PRDC(FeatureSetMetric):
    """:func:`prdc` of the features of synthetic scans against those of real ones, averaged over views.

    Memory as for :class:`medgen.metrics.kernel.KernelDistance`.

    Args:
        feature: Name of an extractor, or a module that maps ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
        nearest_k: Neighbors that a ball reaches to.
        **kwargs: As for :class:`medgen.metrics.feature_metric.FeatureMetric`.

    Attributes:
        higher_is_better: True.
    """

    higher_is_better = True

    def __init__(self, feature: str | nn.Module = "efficientnet-lite0", *, nearest_k: int = 5, **kwargs: Any) -> None:
        super().__init__(feature, **kwargs)
        if nearest_k < 1:
            raise ValueError(f"nearest_k: expected at least 1, got {nearest_k}.")
        self.nearest_k = nearest_k

    def compute(self) -> dict[str, torch.Tensor]:
        """Values over everything that was added.

        Returns:
            ``precision``, ``recall``, ``density``, ``coverage``: float64 scalars, means over the views.

        Raises:
            ValueError: If either set has no more than `nearest_k` scans.
        """
        values = self._mean_over_views(
            lambda x, y: torch.stack(list(prdc(x, y, nearest_k=self.nearest_k).values())),
            minimum=self.nearest_k + 1,
        )
        return dict(zip(NAMES, values, strict=True))
