"""Kernel distance: squared maximum mean discrepancy (MMD) with the polynomial kernel of KID."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medgen.metrics.feature_metric import FeatureSetMetric
from medgen.metrics.features import check_feature_sets


def polynomial_kernel(
    gram: torch.Tensor, num_features: int, *, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> torch.Tensor:
    """Kernel ``(gamma x.y + coef)^degree`` from inner products.

    Args:
        gram: ``(P, P)`` inner products of features.
        num_features: D, the length of the features.
        degree: Exponent.
        gamma: Factor on the inner product. None: ``1 / D``.
        coef: Summand.

    Returns:
        ``(P, P)`` values of the kernel.
    """
    return (gram * (1 / num_features if gamma is None else gamma) + coef) ** degree


def squared_mmd(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor, *, unbiased: bool = True) -> torch.Tensor:
    """Squared MMD from the values of a kernel.

    Args:
        xx: ``(N, N)`` kernel within the first set.
        xy: ``(N, M)`` kernel between the sets.
        yy: ``(M, M)`` kernel within the second set.
        unbiased: Whether pairs of a scan with itself are left out (Gretton et al. 2012, equation 3); with them
            (equation 5) the value is at least 0 and falls with n.

    Returns:
        Scalar. The unbiased value is on average the squared MMD of the distributions, whatever N and M, if scans are
        independent and the kernel is not chosen from them; for equal distributions that is 0, so it may be negative.

    References:
        Gretton et al. 2012, A kernel two-sample test, JMLR 13.
    """
    n, m = xy.shape
    if not unbiased:
        return (xx.mean() + yy.mean() - 2 * xy.mean()).clamp(min=0)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()


def kernel_distance(
    x: torch.Tensor, y: torch.Tensor, *, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> torch.Tensor:
    """Squared MMD between two sets of features: unbiased, polynomial kernel, over all pairs.

    With Inception features it is the KID of Bińkowski et al. without its random subsets, whose mean it is in the
    limit of many subsets. Unlike the Fréchet distance it has no bias by n, if the scans are independent; it may
    be negative.

    Args:
        x: ``(N, D)`` features of the first set, one row a scan.
        y: ``(M, D)`` features of the second set.
        degree: Exponent of the kernel ``(gamma x.y + coef)^degree``.
        gamma: Factor of the kernel. None: ``1 / D``.
        coef: Summand of the kernel.

    Returns:
        Float64 scalar.

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than two rows, or are not finite.

    References:
        Bińkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401, section 4.
    """
    x, y = check_feature_sets("kernel_distance", x, y)
    size = x.shape[1]
    xx, xy, yy = (
        polynomial_kernel(gram, size, degree=degree, gamma=gamma, coef=coef) for gram in (x @ x.T, x @ y.T, y @ y.T)
    )
    return squared_mmd(xx, xy, yy)


class KernelDistance(FeatureSetMetric):
    """:func:`kernel_distance` between the features of real and synthetic scans, averaged over views.

    It is called KID only with Inception features. Memory grows with the number of scans: ``(N + M) V D`` numbers, and
    the square of N + M in :meth:`compute`.

    Args:
        feature: Name of an extractor, or a module that maps ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
        degree: Exponent of the kernel ``(gamma x.y + coef)^degree``.
        gamma: Factor of the kernel. None: 1 over the number of features.
        coef: Summand of the kernel.
        **kwargs: As for :class:`medgen.metrics.feature_metric.FeatureMetric`.

    Attributes:
        higher_is_better: False.

    Example:
        >>> import torch
        >>> metric = KernelDistance(feature=torch.nn.Flatten())
        >>> metric.update(torch.zeros(3, 1, 2, 2), real=True)
        >>> metric.update(torch.ones(3, 1, 2, 2), real=False)
        >>> metric.compute().item()
        7.0
    """

    higher_is_better = False

    def __init__(
        self,
        feature: str | nn.Module = "efficientnet-lite0",
        *,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, **kwargs)
        self.degree, self.gamma, self.coef = degree, gamma, coef

    def compute(self) -> torch.Tensor:
        """Distance over everything that was added.

        Returns:
            Float64 scalar, the mean over the views; may be negative.

        Raises:
            ValueError: If either set has fewer than two scans.
        """
        settings = {"degree": self.degree, "gamma": self.gamma, "coef": self.coef}
        return self._mean_over_views(lambda x, y: kernel_distance(x, y, **settings))  # type: ignore[arg-type]
