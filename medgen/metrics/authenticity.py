"""Whether features of synthetic scans lie suspiciously close to those of the training scans: AuthPct and C_T."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata

from medgen.metrics.features import check_feature_sets


def auth_pct(train: torch.Tensor, synthetic: torch.Tensor) -> torch.Tensor:
    """AuthPct: percentage of synthetic scans that are authentic.

    A synthetic scan ``j`` with nearest training scan ``i*`` is authentic if ``d(i*, j)`` exceeds the distance of ``i*``
    to its own nearest neighbor among the other training scans. Copies are not, but neither are many good scans: for
    equal distributions it is near 50 in high dimension, not 100. Compare it with the value of held-out real scans.

    Args:
        train: ``(N, D)`` features of the scans that the generator was trained on, one row a scan.
        synthetic: ``(M, D)`` features of synthetic scans, M at least 2.

    Returns:
        Float64 scalar in [0, 100].

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than two rows, or are not finite.

    References:
        Alaa et al. 2022, How faithful is your synthetic data?, arXiv:2102.08921, section 4 (authenticity); as a
        percentage: Stein et al. 2023, arXiv:2306.04675.
    """
    train, synthetic = check_feature_sets("auth_pct", train, synthetic)
    within = _distances(train, train).fill_diagonal_(math.inf).amin(dim=1)
    nearest = _distances(synthetic, train).min(dim=1)
    return 100 * (nearest.values > within[nearest.indices]).double().mean()


def c_t(
    train: torch.Tensor,
    held_out: torch.Tensor,
    synthetic: torch.Tensor,
    *,
    num_cells: int = 3,
    least_share: float | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Data-copying test C_T: whether synthetic scans lie closer to the training scans than held-out scans do.

    k-means on the training features divides feature space into cells. In each, the distances of synthetic and of
    held-out scans to their nearest training scan of the cell are compared by the Mann-Whitney statistic,
    ``Z_U = (U - nm/2) / sqrt(nm(n + m + 1)/12)`` with U the number of pairs in which the synthetic distance is the
    larger, ties counted half. C_T is the mean of Z_U over the cells that hold enough synthetic scans, weighted by
    their held-out scans. Clearly below 0 (-3, say): copying. Clearly above: the generator misses the distribution.

    Args:
        train: ``(L, D)`` features of the scans that the generator was trained on, one row a scan.
        held_out: ``(N, D)`` features of real scans that it has not seen.
        synthetic: ``(M, D)`` features of synthetic scans.
        num_cells: Cells k; the paper leaves some tens of held-out scans to each.
        least_share: Least share tau of the synthetic scans in a cell that counts. None: ``20 / M``, but at most
            ``1 / (2 k)``.
        seed: Of k-means.

    Returns:
        Float64 scalar, in standard deviations of a cell's null distribution.

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than two rows, are not finite, if there are not 1 to L
            cells, or if no cell holds enough synthetic and any held-out scans.

    References:
        Meehan, Chaudhuri and Dasgupta 2020, A non-parametric test to detect data-copying in generative models,
        arXiv:2004.05675, sections 3 and 4. The authors' code adds 1/2 to U (continuity); this does not.
    """
    train, held_out = check_feature_sets("c_t", train, held_out)
    train, synthetic = check_feature_sets("c_t", train, synthetic)
    if not 1 <= num_cells <= len(train):
        raise ValueError(f"num_cells: expected 1 to {len(train)}, the training scans, got {num_cells}. Set fewer.")
    share = min(20 / len(synthetic), 1 / (2 * num_cells)) if least_share is None else least_share
    centers, cells = kmeans2(train.cpu().numpy(), num_cells, minit="++", rng=np.random.default_rng(seed))
    middle = torch.from_numpy(centers).to(train)
    of_train = torch.from_numpy(cells).to(train.device)
    of_held_out, of_synthetic = (_distances(rows, middle).argmin(dim=1) for rows in (held_out, synthetic))
    total, weight = 0.0, 0
    for cell in range(num_cells):
        base, expected, found = train[of_train == cell], held_out[of_held_out == cell], synthetic[of_synthetic == cell]
        if len(base) and len(expected) and len(found) and len(found) >= share * len(synthetic):
            distances = [_distances(rows, base).amin(dim=1) for rows in (expected, found)]
            total += len(expected) * _z_of_u(*distances)
            weight += len(expected)
    if not weight:
        raise ValueError(
            f"c_t: expected a cell with held-out scans and {share:.3g} of the synthetic ones, got none of {num_cells}. "
            "Set fewer cells or a smaller least_share."
        )
    return torch.tensor(total / weight, dtype=torch.float64)


def _z_of_u(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Z-scored count of pairs in which the second is the larger."""
    n, m = len(expected), len(found)
    ranks = rankdata(torch.cat([found, expected]).cpu().numpy())
    u = float(ranks[:m].sum()) - m * (m + 1) / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs of rows; without inner products, which would round copies away from 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
