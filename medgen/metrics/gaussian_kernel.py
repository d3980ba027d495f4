"""Gaussian kernel distance: squared MMD on unit-norm features, which with CLIP features is CMMD."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medgen.metrics.feature_metric import FeatureSetMetric
from medgen.metrics.features import check_feature_sets, cosines
from medgen.metrics.kernel import squared_mmd

SIGMA = 10.0
SCALE = 1000.0


def gaussian_kernel(cosine: torch.Tensor, *, sigma: float = SIGMA) -> torch.Tensor:
    """Kernel ``exp(-|x - y|^2 / (2 sigma^2))`` of unit vectors.

    Args:
        cosine: ``(P, P)`` inner products of unit vectors.
        sigma: Width of the kernel, in units of the norm of the features, which is 1.

    Returns:
        ``(P, P)`` in (0, 1].
    """
    return torch.exp((cosine - 1) / sigma**2)


def gaussian_kernel_distance(
    x: torch.Tensor, y: torch.Tensor, *, sigma: float = SIGMA, scale: float = SCALE, unbiased: bool = False
) -> torch.Tensor:
    """Squared MMD with a Gaussian kernel between two sets of features, each vector scaled to unit norm first.

    With the CLIP features of its paper (ViT-L/14 at 336 pixels) and the default arguments this is CMMD; with any other
    extractor it is not, and is not to be called so. The published implementation counts each scan's pair with itself,
    so the value is biased upwards for few scans, as is the default here. `unbiased` leaves those pairs out: if
    the scans are independent, the value is then on average the squared MMD of the two distributions, whatever N and M.
    That holds because the width of the kernel is a constant; one chosen from the scans would bias it.

    Args:
        x: ``(N, D)`` features of the first set, one row a scan.
        y: ``(M, D)`` features of the second set.
        sigma: Width of the kernel; features have norm 1.
        scale: Factor on the result, which makes it readable.
        unbiased: Whether to leave out the pairs of a scan with itself; the value may then be negative.

    Returns:
        Float64 scalar; at least 0 unless `unbiased`.

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than two rows, are not finite, or hold a zero vector.

    References:
        Jayasumana et al. 2024, Rethinking FID, arXiv:2401.09603, section 4.
    """
    x, y = check_feature_sets("gaussian_kernel_distance", x, y)
    pooled = torch.cat([x, y])
    kernel = gaussian_kernel(cosines(pooled @ pooled.T), sigma=sigma)
    n = len(x)
    return scale * squared_mmd(kernel[:n, :n], kernel[:n, n:], kernel[n:, n:], unbiased=unbiased)


class GaussianKernelDistance(FeatureSetMetric):
    """:func:`gaussian_kernel_distance` between the features of real and synthetic scans, averaged over views.

    It is CMMD only if `feature` gives the CLIP features of that paper. Memory as for
    :class:`medgen.metrics.kernel.KernelDistance`.

    Args:
        feature: Name of an extractor, or a module that maps ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
        sigma: Width of the kernel; features have norm 1.
        scale: Factor on the result.
        unbiased: Whether to leave out the pairs of a scan with itself.
        **kwargs: As for :class:`medgen.metrics.feature_metric.FeatureMetric`.

    Attributes:
        higher_is_better: False.
    """

    higher_is_better = False

    def __init__(
        self,
        feature: str | nn.Module = "efficientnet-lite0",
        *,
        sigma: float = SIGMA,
        scale: float = SCALE,
        unbiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, **kwargs)
        self.sigma, self.scale, self.unbiased = sigma, scale, unbiased

    def compute(self) -> torch.Tensor:
        """Distance over everything that was added.

        Returns:
            Float64 scalar, the mean over the views.

        Raises:
            ValueError: If either set has fewer than two scans.
        """
        return self._mean_over_views(
            lambda x, y: gaussian_kernel_distance(x, y, sigma=self.sigma, scale=self.scale, unbiased=self.unbiased)
        )
