"""Fréchet distance over the features of any extractor, as a torchmetrics metric.

It is called FID only with the Inception features of :class:`medgen.metrics.inception.InceptionFeatures`; hence the
class's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medgen.metrics.feature_metric import FeatureMetric
from medgen.metrics.frechet import frechet_distance


class FrechetDistance(FeatureMetric):
    """Fréchet distance between the features of real and synthetic scans, averaged over the views of the extractor.

    States are sums, so that results add up over batches and processes; they take ``V * D^2 * 16`` bytes.
    Compare equal counts of scans only: the distance is biased upwards for few scans.

    Args:
        feature: Name of an extractor, or a module that maps ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
            A module without an attribute ``num_features`` needs the argument of that name.
        **kwargs: As for :class:`medgen.metrics.feature_metric.FeatureMetric`.

    Attributes:
        higher_is_better: False.
        real_count: Number of real scans.
        real_sum: ``(V, D)`` sum of their features.
        real_outer: ``(V, D, D)`` sum of the outer products of their features.
        synthetic_count: Number of synthetic scans.
        synthetic_sum: ``(V, D)`` sum of their features.
        synthetic_outer: ``(V, D, D)`` sum of the outer products of their features.

    Example:
        >>> import torch
        >>> metric = FrechetDistance(feature=torch.nn.Flatten(), num_features=4)
        >>> metric.update(torch.zeros(3, 1, 2, 2), real=True)
        >>> metric.update(torch.ones(3, 1, 2, 2), real=False)
        >>> metric.compute().item()
        4.0
    """

    higher_is_better = False

    real_count: torch.Tensor
    real_sum: torch.Tensor
    real_outer: torch.Tensor
    synthetic_count: torch.Tensor
    synthetic_sum: torch.Tensor
    synthetic_outer: torch.Tensor

    def __init__(self, feature: str | nn.Module = "efficientnet-lite0", **kwargs: Any) -> None:
        super().__init__(feature, **kwargs)
        size = getattr(self.feature, "num_features", None)
        if not isinstance(size, int):
            raise ValueError("num_features: expected the length of the feature vectors, got none. Pass num_features=D.")
        views = len(getattr(self.feature, "views", ("image",)))
        for name in ("real", "synthetic"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(f"{name}_count", default=zero, dist_reduce_fx="sum")
            self.add_state(f"{name}_sum", default=zero.expand(views, size).clone(), dist_reduce_fx="sum")
            self.add_state(f"{name}_outer", default=zero.expand(views, size, size).clone(), dist_reduce_fx="sum")

    def _add(self, features: torch.Tensor, name: str) -> None:
        if features.shape[1:] != self.real_sum.shape:
            raise ValueError(
                f"feature: expected {tuple(self.real_sum.shape)} views and features per scan, "
                f"got {tuple(features.shape[1:])}. Set num_views and num_features to what the module gives."
            )
        by_view = features.movedim(1, 0)
        setattr(self, f"{name}_count", getattr(self, f"{name}_count") + len(features))
        setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + by_view.sum(dim=1))
        setattr(self, f"{name}_outer", getattr(self, f"{name}_outer") + by_view.mT @ by_view)

    def compute(self) -> torch.Tensor:
        """Distance over everything that was added.

        Returns:
            Float64 scalar in squared feature units, the mean over the views.

        Raises:
            ValueError: If either set has fewer than two scans.
        """
        counts = (int(self.real_count), int(self.synthetic_count))
        if min(counts) < 2:
            raise ValueError(f"FrechetDistance: expected at least 2 real and 2 synthetic scans, got {counts}.")
        real = self._moments(self.real_count, self.real_sum, self.real_outer)
        synthetic = self._moments(self.synthetic_count, self.synthetic_sum, self.synthetic_outer)
        views = [frechet_distance(*r, *s) for r, s in zip(real, synthetic, strict=True)]
        return torch.stack(views).mean()

    @staticmethod
    def _moments(
        count: torch.Tensor, total: torch.Tensor, outer: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean ``(D,)`` and unbiased covariance ``(D, D)`` of each view."""
        mean = total / count
        covariance = (outer - count * mean[:, :, None] * mean[:, None, :]) / (count - 1)
        return list(zip(mean, covariance, strict=True))
