"""Intervals, floors, p-values and extrapolations of distances, all from row draws over one pool of scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch

from medgen.metrics.distances import Distance, Evaluate, Pair, Pool, Tail
from medgen.metrics.resampling import Groups, draw_half, draw_halves, draw_subset, join, relabel
from medgen.metrics.score import HALVES, REFERENCE, Score
from medgen.seeding import stream

# Chong and Forsyth fit 15 sizes; six from all scans down to a quarter of them do for sets of hundreds.
_SHARES = tuple(1 / factor for factor in np.linspace(1, 4, 6))
_FEWEST_TO_EXTRAPOLATE = 40
_FLOOR_SPLITS = 8  # halvings of the real scans that the extrapolated floor is the mean of


@dataclass(frozen=True)
class Inference:
    """Random draws over the pooled scans, and what the scores of all distances take from them.

    Each ``add_`` method fills its fields of the scores in place.

    Attributes:
        pools: Features of all scans, one pool a view.
        families: Distances.
        groups: Rows of each group of ``real``, ``synthetic`` and, where there is one, ``real_reference``.
        confidence: Level of the intervals.
        seed: Of all draws.
        bar: Progress bar.
    """

    pools: list[Pool]
    families: list[Distance]
    groups: dict[str, Groups]
    confidence: float
    seed: int
    bar: Any

    def _all_rows(self, name: str) -> torch.Tensor:
        return join(self.groups[name]).sort().values

    def _draw(self, count: int, key: str, draw: Callable[[torch.Generator], Pair]) -> list[Pair]:
        return [draw(stream(self.seed, key, index)) for index in range(count)]

    def _means(self, function: Evaluate, pairs: Sequence[Pair]) -> torch.Tensor:
        """Values ``(number of pairs, number of values)``, means over the views."""
        by_view = []
        for pool in self.pools:
            by_view.append(function(pool, pairs))
            self.bar.update(len(pairs))
        return torch.stack(by_view).mean(dim=0)

    def _evaluate(self, pairs: Sequence[Pair], families: Sequence[Distance] | None = None) -> dict[str, torch.Tensor]:
        """Values ``(number of pairs,)`` of every name."""
        values: dict[str, torch.Tensor] = {}
        for family in self.families if families is None else families:
            values |= zip(family.names, self._means(family.evaluate, pairs).unbind(dim=1), strict=True)
        return values

    def values(self) -> dict[str, Score]:
        """Scores that hold the values over all scans, and nothing else yet.

        Returns:
            One score per value, by its name.
        """
        pair = (self._all_rows("real"), self._all_rows("synthetic"))
        scores = {}
        for family in self.families:
            by_view = torch.cat([(family.exact or family.evaluate)(pool, [pair]) for pool in self.pools])
            for index, name in enumerate(family.names):
                scores[name] = Score(
                    name=name,
                    value=by_view[:, index].mean().item(),
                    views=tuple(by_view[:, index].tolist()),
                    n_real=len(pair[0]),
                    n_synthetic=len(pair[1]),
                    d=self.pools[0].features.shape[1],
                    groups_real=len(self.groups["real"]),
                    groups_synthetic=len(self.groups["synthetic"]),
                    confidence=self.confidence,
                    tail=family.tails[index],
                    seed=self.seed,
                )
        return scores

    def add_intervals(self, scores: dict[str, Score], resamples: int) -> None:
        """Confidence intervals from half-samples.

        Args:
            scores: Filled in place.
            resamples: Half-samples.
        """
        real, synthetic = self.groups["real"], self.groups["synthetic"]
        reason = "no resamples were asked for" if not resamples else self._why_no_halves(real, synthetic)
        if reason:
            _leave_out(scores, "interval", reason)
            return
        for name, margin in self._margins(real, synthetic, resamples, "interval").items():
            interval = self._around(name, scores[name].value, margin, real, synthetic)
            scores[name] = replace(scores[name], interval=interval, resamples=resamples)

    def _why_no_halves(self, *sets: Groups) -> str | None:
        """Why half of the groups of these sets cannot be compared, or None if they can."""
        fewest = min(len(groups) for groups in sets)
        if fewest < 4:
            alone = all(len(rows) == 1 for groups in sets for rows in groups)
            return f"expected at least 4 {'scans' if alone else 'patients'} in each set, got {fewest}"
        minimum = max(family.minimum for family in self.families)
        # The half with the smallest groups has to do.
        smallest = min(sum(sorted(map(len, groups))[: len(groups) // 2]) for groups in sets)
        return f"half of the scans are {smallest}, which is less than {minimum}" if smallest < minimum else None

    def _margins(self, x: Groups, y: Groups, resamples: int, key: str) -> dict[str, float]:
        """Half widths of the confidence intervals of all values between two sets."""
        halves = self._draw(resamples, key, lambda generator: (draw_half(x, generator), draw_half(y, generator)))
        # Drawn r of n without replacement, the spread is that of n scans times sqrt((n - r) / r): 1 at half.
        shares = [len(groups) // 2 / (len(groups) - len(groups) // 2) for groups in (x, y)]
        quantile = scipy.stats.t.ppf((1 + self.confidence) / 2, min(len(x), len(y)) - 1)
        factor = float(quantile) * math.sqrt(sum(shares) / 2)
        return {name: factor * values.std().item() for name, values in self._evaluate(halves).items()}

    def _around(self, name: str, value: float, margin: float, *sets: Groups) -> tuple[float, float]:
        low, high = next(family.bounds[family.names.index(name)] for family in self.families if name in family.names)
        interval = (value - margin, value + margin)
        if (low, high) == (0, 1):
            # Where all scans of all halves agree, the margin is 0; that of a binomial share is not.
            wilson = _wilson(value, min(map(len, sets)), self.confidence)
            interval = (min(interval[0], wilson[0]), max(interval[1], wilson[1]))
        return max(interval[0], low), min(interval[1], high)

    def add_floors(self, scores: dict[str, Score], count: int) -> None:
        """Real-versus-real floors, and the values at their n.

        Args:
            scores: Filled in place.
            count: Random halves, or subsets of the reference.
        """
        fields = ("floor", "floor_interval", "value_at_floor_n")
        if not count:
            _leave_out(scores, fields, "no floor was asked for")
        elif "real_reference" in self.groups:
            self._floor_to_reference(scores, count)
        elif reason := self._why_no_halves(self.groups["real"]):
            _leave_out(scores, fields, reason)
        else:
            self._floor_of_halves(scores, count)

    def _floor_of_halves(self, scores: dict[str, Score], count: int) -> None:
        real, synthetic = self.groups["real"], self.groups["synthetic"]
        splits = self._draw(count, "halves", lambda generator: draw_halves(real, generator))
        size = min([sum(map(len, synthetic)), *(len(side) for split in splits for side in split)])
        made = [draw_subset(synthetic, size, stream(self.seed, "synthetic", index)) for index in range(count)]
        floors = self._evaluate([(x[:size], y[:size]) for x, y in splits])
        values = self._evaluate([(x[:size], y) for (x, _), y in zip(splits, made, strict=True)])
        edges = torch.tensor([(1 - self.confidence) / 2, (1 + self.confidence) / 2], dtype=torch.float64)
        for name, floor in floors.items():
            low, high = floor.quantile(edges).tolist()
            scores[name] = replace(
                scores[name],
                floor=floor.mean().item(),
                floor_kind=HALVES,
                floor_n=(size, size),
                floor_interval=(low, high),
                floor_draws=count,
                value_at_floor_n=values[name].mean().item(),
            )

    def _floor_to_reference(self, scores: dict[str, Score], count: int) -> None:
        rows = self._all_rows("real")
        totals = {name: sum(map(len, self.groups[name])) for name in ("synthetic", "real_reference")}
        size = min(totals.values())
        means = {}
        for name, total in totals.items():
            groups, draws = self.groups[name], 1 if total == size else count
            means[name] = self._evaluate(
                [(rows, draw_subset(groups, size, stream(self.seed, name, index))) for index in range(draws)]
            )
        sides = (self.groups["real"], self.groups["real_reference"])
        reason = self._why_no_halves(*sides)
        margins = {} if reason else self._margins(*sides, max(count, 2), "floor interval")
        for name, floors in means["real_reference"].items():
            floor = floors.mean().item()
            whole = size == totals["synthetic"]
            scores[name] = replace(
                scores[name],
                floor=floor,
                floor_kind=REFERENCE,
                floor_n=(len(rows), size),
                floor_interval=self._around(name, floor, margins[name], *sides) if margins else None,
                floor_draws=len(floors),
                value_at_floor_n=scores[name].value if whole else means["synthetic"][name].mean().item(),
            )
        if reason:
            _leave_out(scores, "floor_interval", reason)

    def add_p_values(self, scores: dict[str, Score], permutations: int, most: int) -> None:
        """P-values from relabelings.

        Args:
            scores: Filled in place.
            permutations: Relabelings.
            most: Scans of a set that the tests of slow distances use.
        """
        if not permutations:
            _leave_out(scores, "p_value", "no permutations were asked for")
            return
        for cubic in (False, True):
            families = [family for family in self.families if family.cubic is cubic]
            if not families:
                continue
            x, y = (self._at_most(name, most if cubic else None) for name in ("real", "synthetic"))
            observed = (join(x), join(y))
            drawn = self._draw(permutations, "permutation", partial(relabel, x + y, len(observed[0])))
            pairs = [observed, *drawn]
            # Whole groups change sides, so a relabeled set can be smaller than either set.
            smallest = min(len(side) for pair in pairs for side in pair)
            for family in families:
                for name in family.names if family.minimum > smallest else ():
                    _leave_out(scores, "p_value", f"relabeled sets have {smallest} scans, too few", name)
            families = [family for family in families if family.minimum <= smallest]
            for name, values in self._evaluate(pairs, families).items() if families else ():
                scores[name] = replace(
                    scores[name],
                    p_value=_p_value(values[0], values[1:], scores[name].tail),
                    permutations=permutations,
                    permutation_n=(len(observed[0]), len(observed[1])),
                )

    def _at_most(self, name: str, most: int | None) -> Groups:
        """The groups of a set, or of a random subset of its scans where it has more than `most`."""
        groups = self.groups[name]
        if most is None or sum(map(len, groups)) <= most:
            return groups
        kept = set(draw_subset(groups, most, stream(self.seed, "permutation subset", name)).tolist())
        members = ([row for row in group if row in kept] for group in groups)
        return [rows for rows in members if rows]

    def add_extrapolations(self, scores: dict[str, Score]) -> None:
        """Values at infinite n.

        Args:
            scores: Filled in place.
        """
        for family in self.families:
            for index, name in enumerate(family.names):
                if family.at_infinity == "linear":
                    self._add_line(scores, family, index, name)
                elif family.at_infinity == "unknown":
                    reason = "how this value depends on n is not known"
                    _leave_out(scores, ("extrapolated", "floor_extrapolated"), reason, name)
                else:
                    value = scores[name].value
                    if family.unbiased:
                        pair = (self._all_rows("real"), self._all_rows("synthetic"))
                        value = self._means(family.unbiased, [pair])[0, index].item()
                    scores[name] = replace(scores[name], extrapolated=value)
                    reason = "unbiased for independent scans, so there is nothing to check"
                    _leave_out(scores, "floor_extrapolated", reason, name)

    def _add_line(self, scores: dict[str, Score], family: Distance, index: int, name: str) -> None:
        real = self.groups["real"]
        value, reason = self._extrapolate(family, index, real, self.groups["synthetic"], "extrapolation")
        scores[name] = replace(scores[name], extrapolated=value)
        if reason:
            _leave_out(scores, "extrapolated", reason, name)
        if scores[name].floor is None:
            _leave_out(scores, "floor_extrapolated", "there is no floor", name)
            return
        pairs = []
        if "real_reference" in self.groups:
            pairs.append((real, self.groups["real_reference"]))
        for split in range(0 if pairs else _FLOOR_SPLITS):
            first = set(draw_halves(real, stream(self.seed, "halves", split))[0].tolist())
            parts = [[group for group in real if (group[0] in first) is chosen] for chosen in (True, False)]
            pairs.append((parts[0], parts[1]))
        floors = []
        for index_of_pair, sides in enumerate(pairs):
            floor, reason = self._extrapolate(family, index, *sides, f"floor extrapolation {index_of_pair}")
            if floor is None:
                _leave_out(scores, "floor_extrapolated", str(reason), name)
                return
            floors.append(floor)
        floor = float(np.mean(floors))
        score = replace(scores[name], floor_extrapolated=floor)
        if floor > 0.25 * (score.floor or 0):  # bias that is left is positive; what is negative is chance
            warning = (
                f"Extrapolated, the floor of {score.floor:.3g} becomes {floor:.3g}, where 0 would be right: "
                "n is too small to extrapolate this value."
            )
            score = replace(score, warnings=(*score.warnings, warning))
        scores[name] = score

    def _extrapolate(
        self, family: Distance, index: int, x: Groups, y: Groups, key: str
    ) -> tuple[float | None, str | None]:
        """Intercept at 1/n = 0 of a line through values at several sizes, or why there is none."""
        counts = [sum(map(len, groups)) for groups in (x, y)]
        if min(counts) < _FEWEST_TO_EXTRAPOLATE:
            return None, f"expected at least {_FEWEST_TO_EXTRAPOLATE} scans a side, got {min(counts)}"
        inverse, pairs = [], []
        for size, share in enumerate(_SHARES):
            for repeat in range(1 if share == 1 else 2 * math.floor(1 / share)):  # about as many scans at every size
                generator = stream(self.seed, key, size, repeat)
                rows = [
                    draw_subset(groups, round(count * share), generator)
                    for groups, count in zip((x, y), counts, strict=True)
                ]
                inverse.append(1 / share)
                pairs.append((rows[0], rows[1]))
        values = self._means(family.evaluate, pairs)[:, index]
        return float(np.polynomial.Polynomial.fit(inverse, values.numpy(), 1).convert().coef[0]), None


def _wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    """Confidence interval of a binomial share: Wilson 1927."""
    z = float(scipy.stats.norm.ppf((1 + confidence) / 2))
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return center - half, center + half


def _p_value(observed: torch.Tensor, null: torch.Tensor, tail: Tail) -> float:
    """Share of the values under the null hypothesis, the observed one among them, that are as extreme.

    For ``both`` it is twice the smaller of the two shares, and so at least ``2 / (len(null) + 1)``.
    """
    slack = 1e-9 * torch.maximum(observed.abs(), null.abs().max())  # a difference of rounding is none
    upper = ((null >= observed - slack).sum().item() + 1) / (len(null) + 1)
    lower = ((null <= observed + slack).sum().item() + 1) / (len(null) + 1)
    return {"upper": upper, "lower": lower, "both": min(1.0, 2 * min(upper, lower))}[tail]


def _leave_out(scores: dict[str, Score], fields: str | tuple[str, ...], reason: str, only: str | None = None) -> None:
    """Write down why fields of all scores, or of one, are None."""
    reasons = dict.fromkeys((fields,) if isinstance(fields, str) else fields, reason)
    for name in scores if only is None else (only,):
        scores[name] = replace(scores[name], missing={**scores[name].missing, **reasons})
