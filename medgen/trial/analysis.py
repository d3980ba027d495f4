"""From scores of single scans to what an arm is worth: means, paired differences, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch.nn import functional as F

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """Scores of an arm less those of another, on the same test scans.

    Attributes:
        mean: Of all classes alike, over scans and runs.
        interval: 95 % interval for other patients and other trainings; None with fewer than two patients.
        p: Two-sided; 1 with fewer than two patients.
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


def difference(
    arm: torch.Tensor, other: torch.Tensor, groups: Sequence[str], clusters: Sequence[int] | None = None
) -> Difference:
    """Compare two arms run by run and patient by patient.

    Both vary: another training and other patients would give another difference. Its variance is taken as the sum of
    that of the mean over runs and that of the mean over patients, each estimated from the other's means, which counts
    what is left of both twice and so errs to the safe side; t has Satterthwaite's degrees of freedom. Classes weigh
    alike, however many scans show them.

    Args:
        arm: ``(R, N, K)`` scores.
        other: As `arm`, of the same runs and scans.
        groups: Patient of each of the N scans.
        clusters: For each run the draw of training scans that it shares with others, which then count as one; None
            counts each run. Two are needed.

    Returns:
        The difference.

    Raises:
        ValueError: If there are fewer than two runs, or clusters.

    References:
        Satterthwaite 1946, An approximate distribution of estimates of variance components, Biometrics Bulletin 2(6).
    """
    delta = arm.double() - other.double()
    members = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters or range(len(delta))))}
    if len(members) < 2:
        raise ValueError(f"expected two runs or more, or runs of two clusters or more, got {len(members)}")
    shown = ~delta[0].isnan()
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = F.one_hot(torch.tensor([names[group] for group in groups]), len(names)).double()
    counts = member.T @ shown.double()  # (P, K)
    sums = torch.einsum("np,rnk->rpk", member, delta.nan_to_num(0.0))
    known = counts.sum(dim=0) > 0
    counts, sums = counts[:, known], sums[..., known]
    parts = (sums / counts.sum(dim=0)).mean(dim=2)  # (R, P), what each patient adds to the mean of a run
    weights = (counts / counts.sum(dim=0)).mean(dim=1)
    mean, by_run = float(parts.mean(dim=0).sum()), parts.sum(dim=1)
    better = float((by_run > 0).double().mean())
    patients = int((weights > 0).sum())
    if patients < 2:
        return Difference(mean, None, 1.0, better)
    own = torch.tensor([members[cluster] for cluster in clusters or range(len(delta))])
    by_cluster = torch.stack([by_run[own == index].mean() for index in range(len(members))])
    # Of a mean of ratios: what a patient adds beyond its share of the mean.
    beyond = parts.mean(dim=0) - mean * weights
    of_patients = patients / (patients - 1) * float(beyond.square().sum())
    of_runs = float(by_cluster.var()) / len(members)
    variance = of_patients + of_runs
    if variance == 0:
        return Difference(mean, (mean, mean), float(mean == 0), better)
    freedom = variance**2 / (of_patients**2 / (patients - 1) + of_runs**2 / (len(members) - 1))
    half = math.sqrt(variance) * float(stats.t.ppf(1 - ALPHA / 2, freedom))
    p = 2 * float(stats.t.sf(abs(mean) / math.sqrt(variance), freedom))
    return Difference(mean, (mean - half, mean + half), p, better)


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
