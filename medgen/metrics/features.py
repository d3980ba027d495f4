"""Sets of feature vectors, checked before anything is computed from them."""

from __future__ import annotations

import numpy as np
import torch


def check_feature_sets(
    caller: str, x: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray, *, minimum: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features as every distance wants them: one length, enough rows, finite, float64, without gradient.

    Args:
        caller: Name of the function that asks, for the message of an error.
        x: ``(N, D)`` features of the first set, one row a scan.
        y: ``(M, D)`` features of the second set.
        minimum: Fewest rows of a set.

    Returns:
        Both sets in float64, on their devices.

    Raises:
        ValueError: If the sets differ in ``D``, have fewer than `minimum` rows, or are not finite.
    """
    x, y = (torch.as_tensor(features).detach() for features in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < minimum:
        raise ValueError(
            f"{caller}: expected (N, D) and (M, D) with N, M >= {minimum} and one D, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}. Add scans, and extract both sets with the same network."
        )
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError(
            f"{caller}: expected finite features, got NaN or infinity. Look for NaN in the scans that gave them."
        )
    return x.double(), y.double()


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Gram matrix of the same features at unit norm.

    Args:
        gram: ``(P, P)`` inner products of features.

    Returns:
        ``(P, P)`` in [-1, 1], with ones on the diagonal.

    Raises:
        ValueError: If a feature vector is zero, which has no direction.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    if bool((norms == 0).any()):
        raise ValueError(
            f"features: expected vectors that are not zero, got {int((norms == 0).sum())} zero ones of {len(norms)}. "
            "A direction is needed; look for empty scans."
        )
    unit = (gram / norms[:, None] / norms).clamp(-1, 1)
    return unit.fill_diagonal_(1)
