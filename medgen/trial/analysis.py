"""From scores of single scans to what an arm is worth: means, paired differences, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from medgen.seeding import stream

ALPHA = 0.05
_RESAMPLES = 2000
_FLIPS = 20_000
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Difference:
    """Scores of an arm less those of another, on the same test scans.

    Attributes:
        mean: Of all classes alike, over scans and runs.
        interval: 95 % interval over resampled patients and runs; None with fewer than two patients.
        p: Two-sided, by changing signs of whole patients.
        runs_better: Share of the runs (seeds, folds) in which the arm was better.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float
    runs_better: float

    def to_json(self) -> dict[str, Any]:
        """Plain values.

        Returns:
            Of all attributes.
        """
        return asdict(self)


def mean_score(scores: torch.Tensor) -> float:
    """Mean over runs, then over the scans that show a class, then over classes.

    Args:
        scores: ``(R, N, K)`` of R runs, N scans and K classes; NaN where a scan does not show the class.

    Returns:
        The mean.
    """
    return float(scores.double().mean(dim=0).nanmean(dim=0).nanmean())


def difference(arm: torch.Tensor, other: torch.Tensor, groups: Sequence[str], seed: int = 0) -> Difference:
    """Compare two arms run by run and patient by patient.

    The test changes the sign of all differences of a patient at once: where an arm does nothing, each sign is as likely
    (Fisher's randomization test). It takes the trained networks as given; the interval resamples runs as well.

    Args:
        arm: ``(R, N, K)`` scores.
        other: As `arm`, of the same runs and scans.
        groups: Patient of each scan.
        seed: Of resamples and signs.

    Returns:
        The difference.
    """
    delta = arm.double() - other.double()
    shown = ~delta[0].isnan()
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = F.one_hot(torch.tensor([names[group] for group in groups]), len(names)).double()
    counts = member.T @ shown.double()  # (P, K)
    sums = torch.einsum("np,rnk->rpk", member, delta.nan_to_num(0.0))
    known = counts.sum(dim=0) > 0
    counts, sums = counts[:, known], sums[..., known]
    parts = (sums.mean(dim=0) / counts.sum(dim=0)).mean(dim=1)  # what each patient adds to the mean
    mean = float(parts.sum())
    chance = stream(seed, "utility", "signs")
    signs = torch.randint(2, (_FLIPS, len(names)), generator=chance).double() * 2 - 1
    extreme = (signs @ parts).abs() >= abs(mean) - 1e-12
    by_run = (sums.sum(dim=1) / counts.sum(dim=0)).mean(dim=1)
    return Difference(
        mean=mean,
        interval=_interval(sums, counts, seed) if len(names) > 1 else None,
        p=float((extreme.sum() + 1) / (_FLIPS + 1)),
        runs_better=float((by_run > 0).double().mean()),
    )


def _interval(sums: torch.Tensor, counts: torch.Tensor, seed: int) -> tuple[float, float]:
    runs, patients, _ = sums.shape
    chance = stream(seed, "utility", "resamples")

    def weights(count: int) -> torch.Tensor:
        drawn = torch.randint(count, (_RESAMPLES, count), generator=chance)
        return torch.zeros(_RESAMPLES, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn).double()
        )

    of_runs, of_patients = weights(runs) / runs, weights(patients)
    means = torch.einsum("br,bp,rpk->bk", of_runs, of_patients, sums) / (of_patients @ counts)
    low, high = torch.nanquantile(means.nanmean(dim=1), torch.tensor(_TAILS, dtype=torch.float64)).tolist()
    return low, high


def adjust(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p values for their number (Holm 1979).

    Args:
        p_values: Of each arm.

    Returns:
        The corrected ones.
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


def least_p(patients: int) -> float:
    """Smallest p value that the test can give.

    Args:
        patients: Of the test scans.

    Returns:
        Two of all combinations of signs.
    """
    return math.ldexp(1.0, 1 - patients)
