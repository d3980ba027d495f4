"""From the predictions on many views to one, with its uncertainty; memory does not grow with their number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from medgen.types import BadInputError

Combination = Literal["mean", "logit", "vote"]
Weighting = Literal["equal", "confidence"]
_TINY = 1e-7  # below it a probability tells nothing


@dataclass(frozen=True, eq=False)
class Agreement:
    """What the predictions have in common, and where they differ.

    Attributes:
        label: ``(*spatial)`` int64 class indices of the consensus.
        probability: ``(K, *spatial)`` mean over the predictions; of ``logit`` the normalized geometric mean.
        vote: ``(*spatial)`` int64, the class that most predictions give; ties go to the more probable one.
        entropy: ``(*spatial)`` entropy of `probability` in nats: all uncertainty.
        mutual_information: ``(*spatial)`` what of it is between the predictions: entropy of their mean less their mean
            entropy (Houlsby et al. 2011, arXiv:1112.5745).
        variance: ``(K, *spatial)`` of the probabilities between the predictions.
        volume_cv: ``(K - 1,)`` coefficient of variation of the volume of each class but the background (Wang et al.
            2019, arXiv:1807.07356, section 3.3); NaN where no prediction has it.
        pairwise_dice: ``(K - 1,)`` Dice between predictions, of all pairs together: twice the sum of their
            intersections over that of their volumes; NaN where no prediction has the class, or there is only one.
        views: Predictions that count.
        dropped: Predictions left out as outliers.
    """

    label: torch.Tensor
    probability: torch.Tensor
    vote: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    variance: torch.Tensor
    volume_cv: torch.Tensor
    pairwise_dice: torch.Tensor
    views: int
    dropped: int


class Consensus:
    """Takes predictions one at a time and keeps sums of them.

    Args:
        combination: How they become one: ``mean`` of the probabilities, ``logit`` mean (their geometric mean), or the
            ``vote`` of their labels.
        weighting: ``equal``, or ``confidence``: each counts by 1 less its mean entropy over the classes' logarithm,
            where it or the consensus sees a class. Votes are equal.
        outlier_dice: Least Dice of a prediction with the others so far, as a share of the Dice of those between
            themselves; below it a prediction does not count. 0 takes all. Three have to be there for a judgement.

    Raises:
        BadInputError: If an option is not one of those, votes are to be weighted, or the share is out of range.
    """

    def __init__(
        self, *, combination: Combination = "mean", weighting: Weighting = "equal", outlier_dice: float = 0.0
    ) -> None:
        for name, value, known in (("combination", combination, Combination), ("weighting", weighting, Weighting)):
            if value not in get_args(known):
                raise BadInputError(f"{name}: expected one of {', '.join(get_args(known))}, got {value!r}.")
        if combination == "vote" and weighting == "confidence":
            raise BadInputError(
                "weighting: expected 'equal' for a vote, in which every prediction counts as one, got 'confidence'. "
                "Take combination 'mean' or 'logit'."
            )
        if not 0 <= outlier_dice <= 1:
            raise BadInputError(f"outlier_dice: expected a share in [0, 1], got {outlier_dice}. 0 takes all views.")
        self.combination, self.weighting, self.outlier_dice = combination, weighting, outlier_dice
        self.views = self.dropped = 0
        self._weight = 0.0
        self._volumes: list[list[int]] = []

    def add(self, probability: torch.Tensor) -> bool:
        """Take a prediction.

        Args:
            probability: ``(K, *spatial)`` float, sums of 1.

        Returns:
            Whether it counts.

        Raises:
            BadInputError: If it is of another shape than those before, or no probability.
        """
        p = probability.detach().float()
        self._check(p)
        if not self.views:
            self._mean, self._squares = torch.zeros_like(p), torch.zeros_like(p)
            self._log = torch.zeros_like(p) if self.combination == "logit" else None
            self._votes = torch.zeros(p.shape, dtype=torch.int32, device=p.device)
            self._entropy = torch.zeros(p.shape[1:], device=p.device)
        shown = p.argmax(dim=0)
        volumes = torch.bincount(shown.flatten(), minlength=len(p))
        if self.views >= 3 and self.outlier_dice and self._is_outlier(shown, volumes):
            self.dropped += 1
            return False
        entropy = _entropy(p)
        weight = 1.0 if self.weighting == "equal" else self._confidence(shown, entropy, len(p))
        self.views += 1
        self._weight += weight
        # West 1979: running mean and sum of squared differences, without the differences of large sums.
        change = p - self._mean
        self._mean += change * (weight / self._weight)
        self._squares += weight * change * (p - self._mean)
        self._entropy += (entropy - self._entropy) * (weight / self._weight)
        if self._log is not None:
            self._log += (p.clamp(min=_TINY).log() - self._log) * (weight / self._weight)
        self._votes.scatter_add_(0, shown[None], torch.ones_like(shown[None], dtype=torch.int32))
        self._volumes.append(volumes[1:].tolist())
        return True

    def label(self) -> torch.Tensor:
        """The consensus so far.

        Returns:
            ``(*spatial)`` int64.

        Raises:
            ValueError: If there is no prediction yet.
        """
        if not self.views:
            raise ValueError("expected a prediction, got none yet")
        return self._vote() if self.combination == "vote" else self._combined().argmax(dim=0)

    def result(self) -> Agreement:
        """What came of it.

        Returns:
            The consensus and its uncertainty.

        Raises:
            ValueError: If there is no prediction yet.
        """
        label = self.label()
        probability = self._combined()
        volumes = torch.tensor(self._volumes, dtype=torch.float64)
        mean = volumes.mean(dim=0)
        spread = volumes.std(dim=0) if self.views > 1 else torch.full_like(mean, math.nan)
        return Agreement(
            label=label,
            probability=probability,
            vote=self._vote(),
            entropy=_entropy(probability),
            mutual_information=(_entropy(self._mean) - self._entropy).clamp(min=0),
            variance=self._squares / self._weight,
            volume_cv=torch.where(mean > 0, spread / mean, math.nan),
            pairwise_dice=self._pairwise(),
            views=self.views,
            dropped=self.dropped,
        )

    def _combined(self) -> torch.Tensor:
        return self._mean.clone() if self._log is None else self._log.softmax(dim=0)

    def _vote(self) -> torch.Tensor:
        return (self._votes + 0.5 * self._mean).argmax(dim=0)

    def _pairwise(self) -> torch.Tensor:
        """A voxel that c of n predictions give a class lies in c (c - 1) / 2 intersections of pairs of them."""
        votes = self._votes[1:].flatten(1).double()
        total = votes.sum(dim=1)
        shared = (votes * (votes - 1)).sum(dim=1)
        defined = (total > 0) & (self.views > 1)
        return torch.where(defined, shared / (total * (self.views - 1)).clamp(min=1), math.nan).cpu()

    def _is_outlier(self, shown: torch.Tensor, volumes: torch.Tensor) -> bool:
        votes = self._votes.flatten(1)
        inside = torch.zeros(len(votes), dtype=torch.float64, device=votes.device)
        inside.index_add_(0, shown.flatten(), votes.gather(0, shown.flatten()[None])[0].double())
        total = votes.double().sum(dim=1)
        own = 2 * inside / (self.views * volumes + total).clamp(min=1)
        among = self._pairwise()
        seen = ~among.isnan()
        return bool(seen.any()) and float(own[1:].cpu()[seen].mean()) < self.outlier_dice * float(among[seen].mean())

    def _confidence(self, shown: torch.Tensor, entropy: torch.Tensor, classes: int) -> float:
        where = shown > 0
        if self.views:
            where = where | (self.label() > 0)
        if not bool(where.any()):
            return 1.0
        return max(1 - float(entropy[where].mean()) / math.log(classes), 1e-3)

    def _check(self, p: torch.Tensor) -> None:
        if p.ndim < 3 or len(p) < 2:
            raise BadInputError(
                f"prediction: expected (K, H, W[, D]) probabilities of two classes or more, got {tuple(p.shape)}."
            )
        if self.views and p.shape != self._mean.shape:
            raise BadInputError(
                f"prediction: expected the shape of those before {tuple(self._mean.shape)}, got {tuple(p.shape)}."
            )
        if not bool(torch.isfinite(p).all()) or float((p.sum(dim=0) - 1).abs().max()) > 1e-2 or float(p.min()) < -1e-4:
            raise BadInputError(
                "prediction: expected probabilities that sum to 1, got others. Say what the segmenter gives with "
                "`output`: logits, probabilities or sigmoid."
            )


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """``(K, *spatial)`` to ``(*spatial)``, in nats."""
    return -torch.xlogy(p, p).sum(dim=0)
