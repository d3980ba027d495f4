"""The gates: tolerances fitted on real scans, and the verdict on a labelled scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from medgen.filtering import consistency, geometry, intensity, neighbors, size
from medgen.filtering.intensity import units_compare
from medgen.filtering.measure import KINDS, Measured
from medgen.filtering.neighbors import nearest_distance, same_patient, similarity
from medgen.filtering.reference import Reference
from medgen.filtering.tolerance import FEWEST, Tails, fit_tails, held_out_levels, joint_level
from medgen.types import BadInputError

Gate = Literal["consistency", "intensity", "size", "geometry", "outlier", "copy"]
GATES: tuple[Gate, ...] = ("consistency", "intensity", "size", "geometry", "outlier", "copy")
_KINDS: dict[str, Mapping[str, Any]] = {
    "consistency": consistency.KINDS,
    "intensity": intensity.KINDS,
    "size": size.KINDS,
    "geometry": geometry.KINDS,
    "outlier": neighbors.KINDS,
    "copy": {},
}
COPY = "copy"
ORIENTATION = "orientation"
_MOST_NAMED = 5
_WEAK_DICE = 0.1  # a tolerance of consistency below this lets nearly everything pass
MOST_ALIKE = 0.99  # of scans of two patients; above this only nearly exact copies are found
MISSING, UNSEEN, UNTESTED = "missing_class", "unseen_class", "untested_class"


@dataclass(frozen=True)
class Verdict:
    """What the gates say of one labelled scan.

    Attributes:
        reasons: Codes of what it failed, such as ``consistency:anterior``; none where it is accepted.
        scores: Its numbers, by the same codes.
        message: Why it cannot be read, where it cannot.
    """

    reasons: tuple[str, ...]
    scores: dict[str, float]
    message: str = ""

    @property
    def accepted(self) -> bool:
        """Whether it passed every gate."""
        return not self.reasons


@dataclass(frozen=True, eq=False)
class Gates:
    """Tolerances of all scores, at one level.

    Attributes:
        reference: The measured real scans.
        chosen: Which gates judge; classes that are missing always count.
        level: What all scores share: a scan is rejected if in any score fewer real scans are as far out than this level
            times the weight of the score.
        weights: Of each code; 1 in all. Half goes to consistency, which only a scan and its label together can fail.
        tails: Of the real scores, by code.
        always: Classes that every reference scan shows.
        source_units: Whether intensities in source units count.
        real_distances: Of each reference scan to the one of another patient that looks most like it.
        held_out: For each code, the share of reference scans that fail it, judged without their own patient; for
            ``any`` that of scans that fail at all.
        real_rejected: Share of real scans that was allowed.
    """

    reference: Reference
    chosen: tuple[str, ...]
    level: float
    weights: dict[str, float]
    tails: dict[str, Tails]
    always: frozenset[str]
    source_units: bool
    real_distances: list[float]
    held_out: dict[str, float]
    real_rejected: float

    def bounds(self, code: str) -> tuple[float, float]:
        """Tolerance of a score.

        Args:
            code: Such as ``volume:anterior``.

        Returns:
            Lowest and highest value that passes, in the units of the score; infinite where one end is open.
        """
        if code == COPY:
            return -np.inf, self.reference.copy_threshold
        kind = KINDS[code.partition(":")[0]]
        low, high = self.tails[code].bounds(self._level(code), kind.side)
        return (
            low if np.isinf(low) else kind.inverse(low),
            high if np.isinf(high) else kind.inverse(high),
        )

    def requested(self, label: Mapping[str, Any] | None) -> frozenset[str]:
        """Classes that a scan should show.

        Args:
            label: How its label arose, from its record; None where that is not known.

        Returns:
            Those that every reference scan shows, and those of the label map that it was made from, as its record says
            or, where an older record does not, as the reference folder has it.
        """
        label = label or {}
        names = self.reference.class_names
        if "classes" in label:
            return self.always | {names[value] for value in label["classes"] if value in names}
        return self.always | frozenset(self.reference.labels.get(str(label.get("sha256")), []))

    def patient_of(self, label: Mapping[str, Any] | None) -> str | None:
        """Reference patient over whose label map a scan was made.

        Args:
            label: How its label arose, from its record; None where that is not known.

        Returns:
            The patient, whom two of the segmenters have learned from; None for any other label map.
        """
        return self.reference.owners.get(str((label or {}).get("sha256")))

    def judge(self, scans: Sequence[Measured], requested: Sequence[Collection[str]]) -> list[Verdict]:
        """Judge labelled scans.

        Args:
            scans: What was measured of each.
            requested: Names of the classes that each should show.

        Returns:
            A verdict on each.
        """
        if not scans:
            return []
        copies = similarity(torch.stack([scan.descriptor for scan in scans]), self.reference.descriptors).tolist()
        features = torch.stack([scan.features for scan in scans])
        distances = nearest_distance(features, self.reference.features).tolist()
        verdicts = []
        for scan, wanted, alike, distance in zip(scans, requested, copies, distances, strict=True):
            scores = {**self._counted(scan.scores), "outlier": distance}
            reasons = [f"{MISSING}:{name}" for name in sorted(frozenset(wanted) - scan.classes)]
            reasons += [f"{UNTESTED}:{name}" for name in sorted(scan.classes - self._known)]
            reasons += [f"{UNSEEN}:{name}" for name in sorted(scan.unseen)] if "consistency" in self.chosen else []
            if "geometry" in self.chosen and scan.orientation not in self._orientations:
                reasons.append(f"{ORIENTATION}:{scan.orientation}")
            for code, value in scores.items():
                if code in self.tails and self._out(code, value):
                    reasons.append(code)
            if COPY in self.chosen and alike > self.reference.copy_threshold:
                reasons.append(COPY)
            verdicts.append(Verdict(tuple(reasons), {**scores, COPY: alike}))
        return verdicts

    @property
    def _known(self) -> frozenset[str]:
        return frozenset[str]().union(*(scan.classes for scan in self.reference.scans))

    @property
    def _orientations(self) -> frozenset[str]:
        return frozenset(scan.orientation for scan in self.reference.scans)

    def _counted(self, scores: Mapping[str, float]) -> dict[str, float]:
        left_out = "" if self.source_units else "intensity_source"
        return {code: value for code, value in scores.items() if code.partition(":")[0] != left_out}

    def _out(self, code: str, value: float) -> bool:
        kind = KINDS[code.partition(":")[0]]
        if not np.isfinite(value):
            return True
        return bool(self.tails[code].levels(kind.forward(np.array([value])), kind.side)[0] < self._level(code))

    def _level(self, code: str) -> float:
        """Level of one score, which is never more than what all together may take."""
        return min(self.level * self.weights[code], self.real_rejected)

    def weak_spots(self) -> list[str]:
        """Classes of which the gate consistency says little, as real scans are as bad.

        Returns:
            A sentence on each.
        """
        lows = {code: self.bounds(code)[0] for code in self.tails if code.startswith("consistency:")}
        return [
            f"{code}: a Dice of {max(low, 0.001):.2g} passes, since segmenters do no better on some real scans; it "
            "says little."
            for code, low in lows.items()
            if low < _WEAK_DICE
        ]

    def describe(self) -> dict[str, Any]:
        """What was fitted, for a report.

        Returns:
            JSON values: level, tolerance of each score, and the reference scans that fail.
        """
        tests = {}
        for code in [*self.tails, *([COPY] if COPY in self.chosen else [])]:
            low, high = self.bounds(code)
            tests[code] = {
                "low": None if np.isinf(low) else low,
                "high": None if np.isinf(high) else high,
                "level": None if code == COPY else self._level(code),
                "real_rejected": self.held_out.get(code, 0.0),
            }
        return {
            "gates": list(self.chosen),
            "level": self.level if np.isfinite(self.level) else None,
            "real_rejected_allowed": self.real_rejected,
            "real_rejected_held_out": self.held_out["any"],
            "reference_scans": len(self.reference.cases),
            "reference_patients": len(set(self.reference.patients)),
            "classes_always_shown": sorted(self.always),
            "source_units_compare": self.source_units,
            "segmenters": self.reference.settings,
            "reference_digest": self.reference.digest,
            "reference_cases": self.reference.cases,
            "reference_labels": sorted(self.reference.owners),
            "tests": tests,
        }


def check_gates(names: Sequence[str]) -> tuple[Gate, ...]:
    """Refuse gates that do not exist.

    Args:
        names: As the user gives them.

    Returns:
        Each once.

    Raises:
        BadInputError: If one is not known, or there is none.
    """
    unknown = [name for name in names if name not in GATES]
    if unknown or not names:
        raise BadInputError(f"gates: expected some of {', '.join(GATES)}, got {', '.join(unknown) or 'none'}.")
    return tuple(gate for gate in GATES if gate in names)


def fit_gates(reference: Reference, *, chosen: Sequence[str] = GATES, real_rejected: float = 0.05) -> Gates:
    """Fit tolerances so that all of them together reject no more than a share of real scans.

    The specs of such gates ask for each class's 5th percentile, and for at most 5 % of real scans to be rejected in
    all; with some twenty scores these exclude each other. Here all scores share one level, the largest at which real
    scans, each judged without its patient, keep to the share.

    Args:
        reference: The measured real scans.
        chosen: Which gates judge.
        real_rejected: Share of real scans that all gates together may reject.

    Returns:
        The gates.

    Raises:
        BadInputError: If a gate is not known or cannot run, the reference is too small, or too many real scans fail
            whatever the level.
    """
    chosen = check_gates(chosen)
    if "consistency" in chosen and reference.instruments.segmenters is None:
        raise BadInputError(
            "gates: expected a reference with segmenters for the gate consistency, got one that was measured without. "
            "Give the folder of the real scans, or leave the gate out."
        )
    if COPY in chosen and reference.copy_threshold > MOST_ALIKE:
        raise BadInputError(
            "gates: expected real scans of different patients that can be told from copies, got some so alike that "
            f"only copies of a correlation above {reference.copy_threshold:.4f} would be found. Say in a column "
            "`patient` which scans are of one patient, or leave the gate copy out with --gates."
        )
    patients, scans = reference.patients, reference.scans
    source_units = units_compare([scan.scores for scan in scans], [scan.span for scan in scans])
    same = same_patient(patients)
    distances = nearest_distance(reference.features, reference.features, same).numpy()
    kinds = {kind: gate for gate in chosen for kind in _KINDS[gate]}
    codes = list(dict.fromkeys(code for scan in scans for code in scan.scores if code.partition(":")[0] in kinds))
    codes = [code for code in codes if source_units or not code.startswith("intensity_source")]
    columns = {code: np.array([scan.scores.get(code, np.nan) for scan in scans]) for code in codes}
    if "outlier" in chosen:
        columns["outlier"] = distances
    _require_enough(columns, patients)
    levels = held_out_levels(columns, {code: KINDS[code.partition(":")[0]] for code in columns}, patients)
    outright = _outright(reference, chosen)
    weights = _weights(levels)
    # A level above the allowed share rejects nobody, whatever the weight.
    parts = [np.where(part > real_rejected, np.inf, part / weights[code]) for code, part in levels.items()]
    smallest = np.min([*parts, *(np.where(failed, 0.0, np.inf) for failed in outright.values())], axis=0)
    level = joint_level(smallest, patients, real_rejected)
    if level <= 0:
        failed = outright | {code: part <= 0 for code, part in levels.items()}
        raise BadInputError(_too_many(reference, failed, real_rejected))
    tails = {}
    for code, column in columns.items():
        kind = KINDS[code.partition(":")[0]]
        tails[code] = fit_tails(kind.forward(column[np.isfinite(column)]), kind.resolution)
    most = {code: min(level * weights[code], real_rejected) for code in levels}
    held_out = {code: float(np.mean(found < most[code])) for code, found in levels.items()}
    held_out |= {code: float(np.mean(failed)) for code, failed in outright.items()}
    held_out["any"] = float(np.mean(smallest < level))
    always = frozenset.intersection(*(scan.classes for scan in scans))
    return Gates(
        reference=reference,
        chosen=tuple(chosen),
        level=level,
        weights=weights,
        tails=tails,
        always=always,
        source_units=source_units,
        real_distances=distances.tolist(),
        held_out=held_out,
        real_rejected=real_rejected,
    )


def _weights(codes: Collection[str]) -> dict[str, float]:
    """Half for the scores of consistency, half for the others; within a half they weigh alike."""
    halves = [[code for code in codes if code.startswith("consistency") == first] for first in (True, False)]
    used = [half for half in halves if half]
    return {code: 1 / len(used) / len(half) for half in used for code in half}


def _outright(reference: Reference, chosen: Sequence[str]) -> dict[str, np.ndarray]:
    """Reference scans that fail whatever the level, judged beside those of other patients."""
    scans, patients = reference.scans, reference.patients
    failed = {}
    if "consistency" in chosen:
        failed[UNSEEN] = np.array([bool(scan.unseen) for scan in scans])
    if "geometry" in chosen:
        owners: dict[str, set[str]] = {}
        for scan, patient in zip(scans, patients, strict=True):
            owners.setdefault(scan.orientation, set()).add(patient)
        failed[ORIENTATION] = np.array([len(owners[scan.orientation]) < 2 for scan in scans])
    if COPY in chosen:
        failed[COPY] = (reference.similarity > reference.copy_threshold).numpy()
    return failed


def _too_many(reference: Reference, failed: Mapping[str, np.ndarray], real_rejected: float) -> str:
    """Message that names the real scans which fail whatever the level, and what each of them fails."""
    counts = Counter(reference.patients)
    named, share = [], 0.0
    for row, (case, patient) in enumerate(zip(reference.cases, reference.patients, strict=True)):
        if codes := [code for code in failed if failed[code][row]]:
            named.append(f"{case} ({', '.join(codes)})")
            share += 1 / counts[patient] / len(counts)
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    allowed = (real_rejected * (len(counts) + 1) - 1) / len(counts)
    advice = ["Look at these scans and their labels, or add scans."]
    if any(failed[code].any() for code in failed if code == UNSEEN or code.startswith("consistency")):
        advice.append(
            "Where the segmenters do not find what labels show, train them for more steps (--steps, with --overwrite "
            "where gates were begun)."
        )
    if COPY in failed and failed[COPY].any():
        advice.append("Of scans that copy another one, remove one, or say in a column `patient` that they are of one.")
    return (
        f"reference: expected at most {allowed:.1%} of the real scans to fail outright, so that no more than "
        f"{real_rejected:.1%} of new ones are rejected, got {share:.1%} (patients weigh alike): "
        f"{', '.join(named[:_MOST_NAMED])}{more}. {' '.join(advice)}"
    )


def _require_enough(columns: Mapping[str, np.ndarray], patients: Sequence[str]) -> None:
    """Every class needs scans that its tolerance can be fitted to, whichever patient is left out."""
    names = np.asarray(patients)
    for code, column in columns.items():
        shown = names[np.isfinite(column)]
        most = max((int((shown == name).sum()) for name in set(shown.tolist())), default=0)
        if len(shown) - most < FEWEST:
            raise BadInputError(
                f"reference: expected at least {FEWEST} scans beside those of any one patient for {code}, got "
                f"{len(shown) - most}. Add scans that show {code.partition(':')[2] or 'it'}, or take the class off the "
                "labels."
            )
