"""The rows of the score table: distances over network features and over radiomic features in one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from medgen.report.numbers import finite, finite_pair
from medgen.report.score_words import BY_TAIL, FRD, LOWER, NEAR_FLOOR, SCORES, ScoreWords

# An unbiased floor is 0 but for chance, and a ratio to chance says nothing.
_NO_RATIO = {
    "kernel": "the floor is 0 on average",
    "frd-robust": "the floor is 0 on average",
    "frd-v1": "a logarithm: the difference counts",
}
_FIELDS = ("value", "interval", "floor", "floor_interval", "p_value")


@dataclass(frozen=True)
class Row:
    """One score beside its floor.

    Attributes:
        key: Name of the score or of the FRD protocol.
        words: What is said of it.
        value: Synthetic against real scans, all of them; None where it is not defined.
        interval: Confidence interval of the value.
        n: Real and synthetic scans.
        groups: Real and synthetic patients; None where not known.
        d: Number of features.
        floor: Real against real scans.
        floor_interval: Range of the floor.
        floor_n: Scans on both sides of the floor.
        at_floor_n: The value at as many scans as the floor, which alone compares with it; None where not known.
        p_value: Of the permutation test.
        smallest_p: Smallest p-value that the test can give; None where not known.
        floor_p_value: Of the test of real against real scans; None where there is none.
        confidence: Level of the intervals.
        missing: Why a field is None, by its name.
        warnings: What a reader should know.
    """

    key: str
    words: ScoreWords
    value: float | None
    interval: tuple[float, float] | None
    n: tuple[int, int]
    groups: tuple[int, int] | None
    d: int
    floor: float | None
    floor_interval: tuple[float, float] | None
    floor_n: tuple[int, int] | None
    at_floor_n: float | None
    p_value: float | None
    smallest_p: float | None = None
    floor_p_value: float | None = None
    confidence: float = 0.95
    missing: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Value over floor at the same n; None where that says nothing."""
        return None if self.why_no_ratio or self.at_floor_n is None or not self.floor else self.at_floor_n / self.floor

    @property
    def why_no_ratio(self) -> str:
        """Why there is no ratio; empty where there is one."""
        if self.floor is None:
            return "there is no floor"
        if self.at_floor_n is None:
            return "the floor has another n"
        if self.key in _NO_RATIO:
            return _NO_RATIO[self.key]
        if self.floor <= 0 or (self.floor_interval is not None and self.floor_interval[0] <= 0):
            return "the floor is not clearly above 0"
        return ""

    @property
    def p_is_smallest(self) -> bool:
        """Whether a smaller p-value would have taken more relabelings."""
        return bool(self.smallest_p and self.p_value is not None and self.p_value <= self.smallest_p * (1 + 1e-9))

    @property
    def p_is_too_small(self) -> str:
        """Why the p-value is smaller than it should be; empty where nothing speaks for that."""
        if self.p_value is None or self.groups is None:
            return ""
        alone = [groups == n for groups, n in zip(self.groups, self.n, strict=True)]
        if alone[0] == alone[1]:
            return ""
        known, other = ("synthetic", "real") if alone[0] else ("real", "synthetic")
        return f"patients are known for the {known} scans only, and the {other} ones count as independent"

    @property
    def same_n(self) -> bool:
        """Whether value and floor rest on as many scans."""
        return self.at_floor_n is not None and self.at_floor_n == self.value

    @property
    def interval_at_floor_n(self) -> tuple[float, float] | None:
        """The interval moved to the value at the floor's n; None where that is less than half of the scans."""
        if self.interval is None or self.value is None or self.at_floor_n is None:
            return None
        if not self.same_n and (self.floor_n is None or 2 * min(self.floor_n) < min(self.n)):
            return None
        step = self.at_floor_n - self.value
        return self.interval[0] + step, self.interval[1] + step

    @property
    def above_floor(self) -> bool:
        """Whether the value at the floor's n lies beyond the upper end of the floor's range."""
        if self.at_floor_n is None or self.floor is None:
            return False
        return self.at_floor_n > (self.floor_interval or (self.floor, self.floor))[1]

    @property
    def below_floor(self) -> bool:
        """Whether it lies beyond the lower end."""
        if self.at_floor_n is None or self.floor is None:
            return False
        return self.at_floor_n < (self.floor_interval or (self.floor, self.floor))[0]


def was_split(report: dict[str, Any]) -> bool:
    """Whether the real scans have a validation part that training did not see.

    Args:
        report: Content of ``report.json``.

    Returns:
        False where all real scans stand on both sides.
    """
    real = report["real"]
    return bool(real["train"] + real["val"] <= real["scans"])


def score_rows(report: dict[str, Any]) -> list[Row]:
    """All scores of a report, those of network features first.

    Args:
        report: Content of ``report.json``.

    Returns:
        One row a score.
    """
    return [*_feature_rows(report), *_radiomic_rows(report)]


def all_warnings(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Every warning of a report once, with what it concerns.

    Args:
        report: Content of ``report.json``.

    Returns:
        Warnings, and the titles of the parts that gave each; none for one that concerns the whole report.
    """
    found: dict[str, list[str]] = {warning: [] for warning in report.get("warnings") or []}
    parts = [(row.words.title, row.warnings) for row in score_rows(report)]
    parts += [
        (f"{FRD[name].title if name in FRD else name}, floor", tuple((frd.get("floor") or {}).get("warnings") or ()))
        for name, frd in (report.get("frd") or {}).items()
    ]
    parts.append(("Copies", tuple((report.get("memorization") or {}).get("warnings") or ())))
    whole = set(found)
    for title, warnings in parts:
        for warning in warnings:
            if warning not in whole:
                found.setdefault(warning, []).append(title)
    return list(found.items())


def _feature_rows(report: dict[str, Any]) -> Iterator[Row]:
    published = (report.get("extractor") or {}).get("published_name")
    for key, score in (report.get("scores") or {}).items():
        words = SCORES.get(key) or ScoreWords(
            key.replace("_", " ").capitalize(), BY_TAIL.get(score.get("tail"), NEAR_FLOOR), "A score of the user's own."
        )
        if key == "frechet" and published:
            words = ScoreWords(published, words.direction, words.meaning, words.reference)
        elif key == "kernel" and published == "FID":  # both names belong to Inception features
            words = ScoreWords("KID", words.direction, words.meaning, words.reference)
        yield Row(
            key=key,
            words=words,
            value=finite(score["value"]),
            interval=finite_pair(score.get("interval")),
            n=(score["n_real"], score["n_synthetic"]),
            groups=_sizes((score.get("groups_real"), score.get("groups_synthetic"))),
            d=score["d"],
            floor=finite(score.get("floor")),
            floor_interval=finite_pair(score.get("floor_interval")),
            floor_n=_sizes(score.get("floor_n")),
            at_floor_n=finite(score.get("value_at_floor_n")),
            p_value=finite(score.get("p_value")),
            smallest_p=_smallest_p(score),
            confidence=finite(score.get("confidence")) or 0.95,
            missing=dict(score.get("missing") or {}),
            warnings=tuple(score.get("warnings") or ()),
        )


def _radiomic_rows(report: dict[str, Any]) -> Iterator[Row]:
    for key, frd in (report.get("frd") or {}).items():
        floor = frd.get("floor") or {}
        n = (frd["n_real"], frd["n_synthetic"])
        floor_n = _sizes([floor.get("n_real"), floor.get("n_synthetic")])
        # Only the robust distance does not depend on n.
        comparable = key == "frd-robust" or (floor_n is not None and sorted(floor_n) == sorted(n))
        row = Row(
            key=key,
            words=FRD.get(key) or ScoreWords(f"FRD ({key})", LOWER, "Distance of radiomic features."),
            value=finite(frd.get("value")),
            interval=finite_pair(frd.get("interval")),
            n=n,
            groups=_sizes((frd.get("groups_real"), frd.get("groups_synthetic"))),
            d=frd["columns"],
            floor=finite(floor.get("value")),
            floor_interval=finite_pair(floor.get("interval")),
            floor_n=floor_n,
            at_floor_n=finite(frd.get("value")) if comparable else None,
            p_value=finite(frd.get("p_value")),
            smallest_p=_smallest_p(frd),
            floor_p_value=finite(floor.get("p_value")),
            warnings=tuple(frd.get("warnings") or ()),
        )
        yield _with_reasons(row, robust=key == "frd-robust")


def _with_reasons(row: Row, *, robust: bool) -> Row:
    """Why fields of a radiomic distance are None."""
    none = "too few scans" if robust else "only frd-robust has one"
    reasons = {"value": "not a finite number", "interval": none, "p_value": none}
    reasons["floor"] = "the real scans were not split"
    reasons["floor_interval"] = reasons["floor"] if row.floor is None else none
    row.missing.update({name: reasons[name] for name in _FIELDS if getattr(row, name) is None})
    return row


def _smallest_p(score: dict[str, Any]) -> float | None:
    """Share of the observed labeling among all; a test of both tails doubles it."""
    permutations = score.get("permutations")
    return min(1.0, (2 if score.get("tail") == "both" else 1) / (1 + permutations)) if permutations else None


def _sizes(values: Any) -> tuple[int, int] | None:
    return None if not values or None in values else (int(values[0]), int(values[1]))
