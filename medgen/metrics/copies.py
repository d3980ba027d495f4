"""Which synthetic scans are copies of training scans, judged by how alike real scans of different patients are."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from medgen.metrics.matching import Matches, closest

OWN_GROUP = -1  # the group of a scan that is of no known patient: shared with nobody
_FEW = 20  # patients, or scans of unknown patients, below which the threshold is a guess
_ALIKE = 0.99  # a threshold above this finds only nearly exact copies


@dataclass(frozen=True, eq=False)
class CopySearch:
    """What :func:`find_copies` found, one entry a scan.

    Attributes:
        closest: The closest real scan of each of the M synthetic ones.
        ratio: ``(M,)`` float64 from 0: distance of a synthetic scan to its closest real scan, over the distance of that
            one to its closest real scan of another patient; the distance is ``sqrt(2 - 2 similarity)``.
        is_copy: ``(M,)`` whether the similarity exceeds the threshold.
        threshold: Similarity in (-1, 1).
        closest_real: The closest real scan of another patient of each of the N real ones.
    """

    closest: Matches
    ratio: torch.Tensor
    is_copy: torch.Tensor
    threshold: float
    closest_real: Matches


def copy_threshold(similarity: torch.Tensor, *, false_alarm_rate: float = 0.005) -> float:
    """Similarity that a scan which copies nothing is to exceed with probability `false_alarm_rate`.

    The similarity of a scan to its closest one is a maximum over many, so its Fisher transform ``artanh`` is given
    the law of maxima, ``P(z > t) = 1 - exp(-exp(-(t - mu) / beta))`` (Gumbel). Its quartiles are put on those of
    `similarity`, so that duplicates among the real scans, as long as they are few, do not hide copies. Scans of one
    organ have lighter tails, and so fewer false alarms; a mixture of very different kinds of scans can have more.

    Args:
        similarity: ``(N,)`` of each real scan to its closest real scan of another patient, in [-1, 1].
        false_alarm_rate: In (0, 0.5].

    Returns:
        The threshold, in (-1, 1).

    Raises:
        ValueError: If there are fewer than two similarities, or the rate is out of range.
    """
    if similarity.ndim != 1 or len(similarity) < 2:
        raise ValueError(
            f"copy_threshold: expected (N,) similarities with N >= 2, got {tuple(similarity.shape)}. Add real scans."
        )
    if not 0 < false_alarm_rate <= 0.5:
        raise ValueError(f"false_alarm_rate: expected above 0 and at most 0.5, got {false_alarm_rate}.")
    z = torch.atanh(similarity.double().clamp(-1 + 1e-6, 1 - 1e-6))
    low, middle, high = (float(value) for value in torch.quantile(z, z.new_tensor([0.25, 0.5, 0.75])))
    beta = (high - low) / (_reduced(0.75) - _reduced(0.25))
    return math.tanh(middle + beta * (_reduced(1 - false_alarm_rate) - _reduced(0.5)))


def _reduced(probability: float) -> float:
    """Quantile of the Gumbel law with mu 0 and beta 1."""
    return -math.log(-math.log(probability))


def find_copies(
    real: torch.Tensor,
    synthetic: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    false_alarm_rate: float = 0.005,
) -> CopySearch:
    """Compare every synthetic scan with every real one, and every real one with those of other patients.

    Args:
        real: ``(N, C, G, G[, G])`` descriptors of the training scans, from :func:`medgen.metrics.descriptor.describe`.
        synthetic: ``(M, C, G, G[, G])`` descriptors of the synthetic scans.
        groups: ``(N,)`` integers: scans of one patient share theirs and are not compared; a negative one is shared
            with nobody. None: each scan is alone.
        false_alarm_rate: As for :func:`copy_threshold`.

    Returns:
        Matches and verdicts.

    Raises:
        ValueError: If there are real scans of fewer than two patients, or the sets do not compare.
    """
    ids = (torch.full((len(real),), OWN_GROUP) if groups is None else groups).to(real.device)
    if ids.shape != (len(real),):
        raise ValueError(f"groups: expected one for each of {len(real)} real scans, got shape {tuple(ids.shape)}.")
    same = (ids[:, None] == ids) & (ids >= 0) | torch.eye(len(real), dtype=torch.bool, device=real.device)
    count = int(ids[ids >= 0].unique().numel() + (ids < 0).sum())
    if count < 2:
        raise ValueError(
            f"find_copies: expected real scans of at least 2 patients, got {count} of {len(real)} scan(s). "
            "Add scans of other patients, or leave groups out: how alike different patients are sets the threshold."
        )
    matches = closest(synthetic, real)
    neighbors = closest(real, real, exclude=same)
    threshold = copy_threshold(neighbors.similarity, false_alarm_rate=false_alarm_rate)
    if count < _FEW:
        warnings.warn(
            f"copies: the threshold rests on {count} real scans or patients only; expected {_FEW} or more.",
            stacklevel=2,
        )
    elif threshold > _ALIKE:
        warnings.warn(
            f"copies: real scans are so alike that only copies of similarity above {threshold:.4f} are found. "
            "If several are of one patient, say so by groups.",
            stacklevel=2,
        )
    away, around = (
        torch.sqrt((2 - 2 * similarity).clamp(min=0))
        for similarity in (matches.similarity, neighbors.similarity[matches.index])
    )
    return CopySearch(matches, away / around.clamp(min=1e-6), matches.similarity > threshold, threshold, neighbors)
