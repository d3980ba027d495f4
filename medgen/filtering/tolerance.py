"""How far from real scans a score may lie: tails of the real scores, and one level for all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from medgen.types import BadInputError

Scale = Literal["linear", "log", "logit"]
Side = Literal["low", "high", "both"]
_TAIL = 0.2  # share of the real scores to which the tail on either side is fitted
_LOGIT_END = 1e-6
_MOST_LOG = 709.0  # of what a float holds
_SHAPES = (-0.3, 0.5)
_END = 1e-3  # where a law that ends is left
FEWEST = 4  # scores that a tolerance can be fitted to: with 5 patients, those of the others


@dataclass(frozen=True)
class Kind:
    """How the scores of one kind are compared.

    Attributes:
        scale: Scale on which their tails are nearly exponential.
        side: Which scores are out of tolerance: low ones, high ones, or both.
        resolution: Smallest difference that counts, on that scale: the least mean excess of a tail.
    """

    scale: Scale
    side: Side
    resolution: float = 1e-6

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Onto the scale.

        Args:
            values: Scores of any shape.

        Returns:
            The same shape, float64.
        """
        values = np.asarray(values, dtype=np.float64)
        if self.scale == "log":
            return np.log(np.maximum(values, 1e-12))
        if self.scale == "logit":
            clipped = np.clip(values, _LOGIT_END, 1 - _LOGIT_END)
            return np.log(clipped / (1 - clipped))
        return values

    def inverse(self, value: float) -> float:
        """Back from the scale.

        Args:
            value: A number on the scale.

        Returns:
            The score.
        """
        if self.scale == "log":
            return math.exp(value) if value < _MOST_LOG else math.inf
        if self.scale == "logit":
            return float(expit(value))
        return value


@dataclass(frozen=True)
class Tail:
    """Real scores beyond a point, on the scale of their kind: a generalized Pareto law.

    The share of real scores that exceed ``start + x`` is ``share * (1 + shape x / width) ** (-1 / shape)``. The law
    only decides how the scores share the level that they are held to together; that level is calibrated on real scans
    and does not rest on it.

    Attributes:
        start: Where it begins.
        width: Scale of the excesses; their mean where `shape` is 0.
        shape: 0 is exponential, more is heavier, less has an end.
        share: Of the scores beyond `start`.
    """

    start: float
    width: float
    shape: float
    share: float

    def beyond(self, excess: np.ndarray) -> np.ndarray:
        """Share of real scores with a larger excess.

        Args:
            excess: ``(N,)`` from 0.

        Returns:
            ``(N,)`` above 0, also beyond the end of a law that has one, where it falls off exponentially.
        """
        x = excess / self.width
        if self.shape == 0:
            return self.share * np.exp(-x)
        base = 1 + self.shape * x
        kept = np.maximum(base, _END)
        return self.share * kept ** (-1 / self.shape) * np.exp(np.minimum(base - _END, 0))

    def excess(self, level: float) -> float:
        """Excess that this share of real scores has; the inverse of :meth:`beyond`.

        Args:
            level: Above 0.

        Returns:
            The excess, from 0.
        """
        part = min(level / self.share, 1.0)
        if self.shape == 0:
            return -self.width * math.log(part)
        if self.shape < 0 and part < (end := _END ** (-1 / self.shape)):
            return self.width * (_END - math.log(end / part) - 1) / self.shape
        return self.width * (part**-self.shape - 1) / self.shape


@dataclass(frozen=True)
class Tails:
    """Both tails of the real scores of one kind, on its scale.

    Attributes:
        low: Of the scores below its start.
        high: Of those above its start.
    """

    low: Tail
    high: Tail

    def levels(self, values: np.ndarray, side: Side) -> np.ndarray:
        """Share of real scores that are at least as far out.

        Args:
            values: ``(N,)`` on the scale; NaN where there is no score.
            side: Which ends count.

        Returns:
            ``(N,)`` in (0, 1]: 1 for NaN and for what lies in no tail. With both ends, twice the share of one.
        """
        ends = 2 if side == "both" else 1
        found = np.ones(np.shape(values))
        out = {"low": self.low.start - values, "high": values - self.high.start}
        for name, tail in (("low", self.low), ("high", self.high)):
            if side in (name, "both"):
                inside = np.nan_to_num(out[name], nan=0.0) > 0
                found = np.where(inside, np.minimum(1, ends * tail.beyond(np.maximum(out[name], 0))), found)
        return found

    def bounds(self, level: float, side: Side) -> tuple[float, float]:
        """Scores that have exactly this level.

        Args:
            level: In (0, 1).
            side: Which ends count.

        Returns:
            Lowest and highest score within the tolerance, on the scale; infinite where the end does not count.
        """
        each = level / (2 if side == "both" else 1)
        low = -math.inf if side == "high" else self.low.start - self.low.excess(each)
        high = math.inf if side == "low" else self.high.start + self.high.excess(each)
        return low, high


def fit_tails(values: np.ndarray, resolution: float) -> Tails:
    """Fit both tails to the outer fifths of the scores, by probability-weighted moments.

    The shape is drawn towards 0 where there are few excesses, as though twenty more had an exponential law.

    Args:
        values: ``(N,)`` real scores on the scale, at least 4.
        resolution: Least mean excess.

    Returns:
        The tails.

    References:
        Hosking and Wallis 1987, Parameter and quantile estimation for the generalized Pareto distribution,
        Technometrics 29(3), equations 7 to 9; their k is minus `shape`.
    """
    ordered = np.sort(values)
    count = max(1, round(_TAIL * len(ordered)))
    low, high = float(ordered[count]), float(ordered[-count - 1])
    share = count / len(ordered)
    return Tails(
        _fit_tail(low, (low - ordered[:count])[::-1], share, resolution),
        _fit_tail(high, ordered[-count:] - high, share, resolution),
    )


def _fit_tail(start: float, excesses: np.ndarray, share: float, resolution: float) -> Tail:
    """From the excesses in ascending order."""
    count = len(excesses)
    mean = float(np.mean(excesses))
    if mean <= resolution:
        return Tail(start, resolution, 0.0, share)
    weighted = float(np.mean(excesses * (1 - (np.arange(1, count + 1) - 0.35) / count)))
    shape = 2 - mean / (mean - 2 * weighted) if mean > 2 * weighted else _SHAPES[0]
    shape = min(max(shape * count / (count + 20), _SHAPES[0]), _SHAPES[1])
    return Tail(start, mean * (1 - shape), 0.0 if abs(shape) < 1e-6 else shape, share)


def held_out_levels(
    scores: Mapping[str, np.ndarray], kinds: Mapping[str, Kind], patients: Sequence[str]
) -> dict[str, np.ndarray]:
    """Level of every real score by the tails of the other patients' scores.

    Args:
        scores: ``(N,)`` by name, NaN where a scan has none.
        kinds: Of each name.
        patients: Patient of each of the N scans.

    Returns:
        ``(N,)`` in [0, 1] by name.
    """
    names = np.asarray(patients)
    found = {name: np.ones(len(names)) for name in scores}
    for name, column in scores.items():
        values = kinds[name].forward(column)
        for patient in dict.fromkeys(patients):
            own = names == patient
            others = values[~own]
            tails = fit_tails(others[np.isfinite(others)], kinds[name].resolution)
            found[name][own] = tails.levels(values[own], kinds[name].side)
    return found


def joint_level(smallest: np.ndarray, patients: Sequence[str], rejected: float) -> float:
    """The largest level at which a new patient's real scan fails any gate with probability `rejected` at most.

    Every real scan brings the smallest level of its scores, each over its weight, found without the scans of its
    patient; the reject rule is a smaller level than the returned one. Patients weigh alike and the new one counts as a
    patient who fails, so that the promise holds for the next patient and not only for these: of K patients, scans of
    ``rejected * (K + 1) - 1`` may fail.

    Args:
        smallest: ``(N,)`` smallest level of each real scan, over the weight of its score; 0 for one that fails at any
            level, infinite for one that fails at none.
        patients: Patient of each.
        rejected: Share in (0, 1).

    Returns:
        The level; infinite where no limit is needed, 0 where more scans fail at any level than may.

    Raises:
        BadInputError: If there are too few patients for this share.

    References:
        Lei et al. 2018, Distribution-free predictive inference for regression, JASA 113(523), section 2; Dunn et al.
        2023, Distribution-free prediction sets for two-layer hierarchical models, JASA 118(544), on scans in patients.
    """
    counts = {name: list(patients).count(name) for name in dict.fromkeys(patients)}
    require_patients(len(counts), rejected)
    allowed = rejected * (len(counts) + 1) - 1
    order = np.argsort(smallest, kind="stable")
    spent = np.cumsum([1 / counts[patients[row]] for row in order])
    first = int(np.searchsorted(spent, allowed + 1e-9, side="right"))
    return float(smallest[order[first]])


def require_patients(count: int, rejected: float) -> None:
    """Refuse a reference with which no promise on a share can be kept.

    Args:
        count: Patients of the reference, K.
        rejected: Share of real scans that may be rejected.

    Raises:
        BadInputError: If the share is out of range, or ``rejected * (K + 1) < 1``.
    """
    if not 0 < rejected < 1:
        raise BadInputError(f"real_rejected: expected a share between 0 and 1, got {rejected}. Try 0.05.")
    needed = max(3, math.ceil(1 / rejected - 1e-9) - 1)
    if count < needed:
        share = math.ceil(1000 / (count + 1)) / 1000
        other = f", or allow a larger share with --real_rejected {share:g}, which makes stricter gates" * (count >= 3)
        raise BadInputError(
            f"reference: expected labelled training scans of at least {needed} patients, with whom the promise to "
            f"reject at most {rejected:.1%} of real scans can be kept, got {count} beside those held out for "
            f"tests. Add scans{other}."
        )
