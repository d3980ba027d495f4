"""The record of one distance between a real and a synthetic set, with what makes it readable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from medgen.metrics.distances import Tail

HALVES = "random halves of the real scans, patient by patient"
REFERENCE = "real scans against the real reference"


@dataclass(frozen=True)
class Score:
    """One distance between a real and a synthetic set, and how far it can be trusted. A field is None where `missing`
    says why.

    Attributes:
        name: Name of the value, such as ``"frechet"``.
        value: Over all scans, the mean over views.
        views: Value of each view.
        n_real: Number of real scans.
        n_synthetic: Number of synthetic scans.
        d: Number of features.
        groups_real: Number of patients of the real scans; where they are not known, each scan counts as one.
        groups_synthetic: Number of patients of the synthetic scans, likewise.
        confidence: Level of `interval` and `floor_interval`.
        interval: Confidence interval of the value that sets of this size have on average (its expectation at this n,
            bias included).
        resamples: Half-samples that the interval rests on.
        floor: Value of real against real scans; what a perfect generator would reach.
        floor_kind: Which real scans were compared.
        floor_n: Scans on the two sides of the floor.
        floor_interval: Central range of the floor over random halves, or its confidence interval against a reference.
        floor_draws: Random halves, or subsets of the reference, that the floor is the mean of.
        value_at_floor_n: Synthetic against real scans at `floor_n`, which alone compares with the floor.
        p_value: Of the permutation test of equal distributions; at least ``1 / (permutations + 1)``, and twice that
            where `tail` is ``both``.
        tail: Side on which a difference puts the value: ``upper``, ``lower`` or ``both``.
        permutations: Relabelings of the test.
        permutation_n: Scans of the two sides in the test; fewer than all where it would take too long.
        extrapolated: Estimate of the value at infinite n.
        floor_extrapolated: The same for real against real, whose truth is 0: the error of the extrapolation.
        warnings: What a reader should know.
        missing: Why a field is None, by its name.
        seed: Of all draws.
    """

    name: str
    value: float
    views: tuple[float, ...]
    n_real: int
    n_synthetic: int
    d: int
    groups_real: int
    groups_synthetic: int
    confidence: float
    interval: tuple[float, float] | None = None
    resamples: int = 0
    floor: float | None = None
    floor_kind: str | None = None
    floor_n: tuple[int, int] | None = None
    floor_interval: tuple[float, float] | None = None
    floor_draws: int = 0
    value_at_floor_n: float | None = None
    p_value: float | None = None
    tail: Tail = "upper"
    permutations: int = 0
    permutation_n: tuple[int, int] | None = None
    extrapolated: float | None = None
    floor_extrapolated: float | None = None
    warnings: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The score in plain types.

        Returns:
            Numbers, strings, lists, dicts and None, without NaN or infinity.
        """
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
