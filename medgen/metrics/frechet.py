"""Fréchet distance between Gaussians, in float64 and without a matrix square root."""

from __future__ import annotations

import numpy as np
import torch

from medgen.metrics.features import check_feature_sets


def frechet_distance(
    mean_x: torch.Tensor, cov_x: torch.Tensor, mean_y: torch.Tensor, cov_y: torch.Tensor
) -> torch.Tensor:
    """Squared Fréchet distance between two Gaussians, in float64.

    ``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``. With ``C = F^T F`` the last trace is the nuclear norm of
    ``F_x F_y^T``, which stays exact where the covariances are singular (fewer scans than features). Biased upwards for
    few scans: compare equal sample counts only.

    Args:
        mean_x: ``(D,)`` mean of the first set, in feature units.
        cov_x: ``(D, D)`` unbiased covariance of the first set, in squared feature units.
        mean_y: ``(D,)`` mean of the second set.
        cov_y: ``(D, D)`` unbiased covariance of the second set.

    Returns:
        Scalar in squared feature units, at least 0; 0 up to rounding for identical moments.

    Raises:
        ValueError: If the sets differ in ``D``, or a covariance is not finite, symmetric and positive semi-definite.

    References:
        Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    moments = [tensor.detach().double() for tensor in (mean_x, cov_x, mean_y, cov_y)]
    size = moments[0].shape[0] if moments[0].ndim == 1 else -1
    if [tuple(tensor.shape) for tensor in moments] != [(size,), (size, size)] * 2:
        raise ValueError(
            "frechet_distance: expected means (D,) and covariances (D, D) with one D, "
            f"got {[tuple(tensor.shape) for tensor in moments]}. Extract both sets with the same network."
        )
    return _distance(moments[0], _factor(moments[1]), moments[2], _factor(moments[3]))


def frechet_distance_from_features(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    Equals :func:`frechet_distance` on the sample means and unbiased covariances, but never forms a covariance:
    its cost grows with ``min(N, D)``.

    Args:
        x: ``(N, D)`` features of the first set, one row a scan.
        y: ``(M, D)`` features of the second set.

    Returns:
        Scalar in squared feature units, at least 0.

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than two rows, or are not finite.
    """
    x, y = check_feature_sets("frechet_distance_from_features", x, y)
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    factors = []
    for features, mean in ((x, mean_x), (y, mean_y)):
        factor = (features - mean) / (len(features) - 1) ** 0.5
        if factor.shape[0] > factor.shape[1]:  # R has the same F^T F in fewer rows
            factor = torch.linalg.qr(factor, mode="r").R
        factors.append(factor)
    return _distance(mean_x, factors[0], mean_y, factors[1])


def frechet_distance_from_products(
    xy: torch.Tensor, mean_xx: torch.Tensor, mean_yy: torch.Tensor, trace_xx: torch.Tensor, trace_yy: torch.Tensor
) -> torch.Tensor:
    """Squared Fréchet distance from inner products alone, whatever the length of the features.

    Equals :func:`frechet_distance_from_features`. The nuclear norm of the centered `xy` is taken from the eigenvalues
    of its square, which is two to three times faster than its singular values: singular values below 1e-8 of the
    largest are rounding. So it serves resampling, where one Gram matrix gives all distances.

    Args:
        xy: ``(N, M)`` inner products between the sets, float64.
        mean_xx: Mean of the ``(N, N)`` inner products within the first set.
        mean_yy: Mean of the ``(M, M)`` inner products within the second set.
        trace_xx: Sum of the squared norms of the first set.
        trace_yy: Sum of the squared norms of the second set.

    Returns:
        Scalar in squared feature units, at least 0.
    """
    n, m = xy.shape
    mean_xy = xy.mean()
    centered = xy - xy.mean(dim=0) - xy.mean(dim=1, keepdim=True) + mean_xy
    squared = centered @ centered.T if n <= m else centered.T @ centered
    # NumPy's eigenvalues of a symmetric matrix take a third of the time of torch's on a CPU.
    values = torch.from_numpy(np.linalg.eigvalsh(squared.cpu().numpy()))
    cross = values.clamp(min=0).sqrt().sum().to(xy.device) / ((n - 1) * (m - 1)) ** 0.5
    spread = (trace_xx - n * mean_xx) / (n - 1) + (trace_yy - m * mean_yy) / (m - 1) - 2 * cross
    return (mean_xx + mean_yy - 2 * mean_xy + spread).clamp(min=0)


def _distance(
    mean_x: torch.Tensor, factor_x: torch.Tensor, mean_y: torch.Tensor, factor_y: torch.Tensor
) -> torch.Tensor:
    """Distance from means ``(D,)`` and factors ``(R, D)`` with ``F^T F`` the covariance."""
    cross = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    spread = factor_x.square().sum() + factor_y.square().sum() - 2 * cross
    return ((mean_x - mean_y).square().sum() + spread).clamp(min=0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """``F`` with ``F^T F = covariance``, ``(R, D)``, R the numerical rank."""
    if not torch.isfinite(covariance).all():
        raise ValueError("frechet_distance: expected finite covariances, got NaN or infinity. Check the features.")
    largest = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > 1e-6 * largest:
        raise ValueError("frechet_distance: expected symmetric covariances, got an asymmetric matrix.")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(
            f"frechet_distance: expected positive semi-definite covariances, got the eigenvalue {values[0].item():g}."
        )
    # Below this an eigenvalue is rounding, and its square root would be eight digits larger.
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return values[keep].sqrt()[:, None] * vectors[:, keep].T
