"""What the numbers of a report carry, finding by finding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medgen.report.feature_words import feature_in_words
from medgen.report.numbers import count, finite, listed, number, p_equals
from medgen.report.rows import Row, score_rows, was_split

Level = Literal["good", "unknown", "caution", "poor"]
_TESTS = ("frechet", "frd-robust", "kernel")  # chosen before any number was seen, so that p can be corrected
_ALPHA = 0.05
_FEW = 20  # scans or patients below which a test finds only gross differences
_MANY = 100  # and from which it finds fine ones
_FAR = 2.0  # times the floor: farther off than two real sets by as much as these are themselves
_FAR_ROBUST = 0.25  # the average radiomic feature is off by half a standard deviation
_MANY_REJECTED = 0.05  # of all scans
_COPYING = -3.0  # C_T, in standard deviations
_NOTHING = 0.1  # mean Dice below which a segmenter has learned nothing of use
_UNMEASURED: dict[str, tuple[str, str]] = {  # why the use for training is not known, and what to do
    "diverged": (
        "the training of the small segmenter diverged, which says nothing about the synthetic scans: their use for "
        "training is not known",
        "Look for scans with broken intensities or labels, or evaluate with another --seed",
    ),
    "refused": ("the use for training could not be measured, and the warnings say why", ""),
    "failed": ("measuring the use for training failed, and the warnings say why", ""),
}
MORE_ALIKE = 0.05  # MS-SSIM of synthetic pairs within this of real ones counts as equally diverse


@dataclass(frozen=True)
class Finding:
    """One thing that was found, or that could not be.

    Attributes:
        level: How it weighs.
        text: It, in a sentence without the full stop.
        next_step: What to look at next; may be empty.
        headline: Whether it belongs into the first line.
    """

    level: Level
    text: str
    next_step: str = ""
    headline: bool = False


def findings(report: dict[str, Any]) -> dict[str, list[Finding]]:
    """All that the numbers of a report carry.

    Args:
        report: Content of ``report.json``.

    Returns:
        Findings by what they concern, in the order in which they are read.
    """
    rows = {row.key: row for row in score_rows(report)}
    return {
        "realism": list(_realism(report, rows)),
        "copies": list(_copies(report)),
        "variety": list(_variety(report, rows)),
        "usefulness": list(_usefulness(report)),
        "doubts": list(_doubts(report, rows)),
    }


def _realism(report: dict[str, Any], rows: dict[str, Row]) -> Iterator[Finding]:
    """Whether the tests tell synthetic from real scans, and by how much."""
    tests = [rows[key] for key in _TESTS if key in rows and rows[key].p_value is not None]
    if not tests:
        yield Finding("unknown", "whether synthetic scans differ from real ones was not tested", headline=True)
        return
    threshold = _ALPHA / len(tests)  # Bonferroni
    significant = [row for row in tests if row.p_value is not None and row.p_value < threshold]
    scans = f"{tests[0].n[0]} real and {tests[0].n[1]} synthetic scans"
    if significant:
        yield from _difference(report, significant, scans)
        return
    smallest = min(row.p_value for row in tests if row.p_value is not None)
    few = min(min(row.n) for row in tests)
    patients = min((min(row.groups) for row in tests if row.groups), default=few)
    if min(few, patients) < _FEW or all((row.smallest_p or 0) >= threshold for row in tests):
        counted = scans if few < _FEW or patients >= _FEW else f"scans of only {count(patients, 'patient')}"
        yield Finding(
            "unknown",
            f"too few to tell: with {counted} no difference was found (smallest {p_equals(smallest)}), and only a "
            "gross one would have been",
            "Compare more scans: from 50 a side on, of as many patients as there are",
            headline=True,
        )
        return
    above = [row for row in tests if row.above_floor]
    yield Finding(
        "caution" if above else "good",
        f"no difference between synthetic and real scans was found (smallest {p_equals(smallest)} of "
        f"{count(len(tests), 'test')}; {scans})",
        "Show the two contact sheets to a reader who does not know which is which"
        if report.get("utility")
        else "Measure what the scans are for: train a segmenter on them and test it on real scans",
        headline=True,
    )
    for row in above:
        yield Finding("caution", f"still, the {row.words.title} lies above the range of its floor")
    if few < _MANY:
        yield Finding("good", f"with {few} scans on a side a small difference can go unseen")


def _difference(report: dict[str, Any], told: Sequence[Row], scans: str) -> Iterator[Finding]:
    """What is said where tests tell the sets apart."""
    named = [row for row in told if row.key != "kernel"] or told  # the Fréchet distance says it in readers' terms
    inside = all(row.floor is not None and row.at_floor_n is not None and not row.above_floor for row in told)
    far = any((row.ratio or 0) >= _FAR and row.above_floor for row in told if row.key == "frechet")
    far = far or any((row.value or 0) >= _FAR_ROBUST and not inside for row in told if row.key == "frd-robust")
    p = p_equals(min(row.p_value for row in told if row.p_value is not None))
    yield Finding(
        "poor" if far else "caution",
        f"synthetic scans are told apart from real ones: {listed([_size(row) for row in named])} ({p}; {scans})",
        _where_to_look(report),
        headline=True,
    )
    if inside:
        yield Finding("caution", "still, the difference is no larger than that between the two parts of the real scans")


def _size(row: Row) -> str:
    title = row.words.title
    if row.ratio is not None:
        return f"{title} {number(row.ratio, digits=2)} times the real-versus-real floor"
    if row.floor is None:
        return f"{title} {number(row.value, digits=2)} without a floor to compare it with"
    return f"{title} {number(row.value, digits=2)} where real against real is {number(row.floor, digits=2)}"


def _where_to_look(report: dict[str, Any]) -> str:
    shift = report.get("radiomic_shift") or {}
    if not shift.get("beyond_chance"):
        return "Compare the two contact sheets for what gives the synthetic scans away"
    first = shift["largest"][0]
    effect = float(first["effect"])
    way = "higher" if effect > 0 else "lower"
    return (
        f"Look at what differs most: {feature_in_words(first['feature'])} is on average {way} in synthetic scans by "
        f"{number(abs(effect))} standard deviations"
    )


def _copies(report: dict[str, Any]) -> Iterator[Finding]:
    """Whether synthetic scans are copies of real ones."""
    found = report.get("memorization")
    if not found:
        yield Finding("caution", "copies of training scans were not looked for")
        return
    flagged, scans = int(found["copies"]), int(report["synthetic"]["scans"])
    expected = finite(found.get("expected_false_alarms"))
    of = "training scan" if was_split(report) else "real scan"
    if not flagged:
        yield Finding("good", f"none of {count(scans, 'synthetic scan')} looks like a copy of a {of}", headline=True)
    else:
        looks = f"looks like a copy of a {of}" if flagged == 1 else f"look like copies of {of}s"
        more = expected is not None and _poisson_tail(flagged, expected) < _ALPHA
        chance = "" if expected is None else f" ({number(expected, digits=2)} expected by chance)"
        yield Finding(
            "poor" if more else "caution",
            f"{flagged} of {scans} {looks}{chance}",
            "Look at the closest pairs, and leave out every synthetic scan that is a copy",
            headline=True,
        )
        if expected is not None and not more:
            yield Finding("caution", "so few flagged scans may be chance: the closest pairs decide")
    c_t = finite(found.get("c_t"))
    if c_t is not None and c_t < _COPYING:
        yield Finding(
            "poor",
            f"synthetic scans lie closer to the training scans than unseen real scans do (C_T = {number(c_t)})",
            "Look at the closest pairs: the generator keeps close to its training scans",
        )
    apart = found.get("held_out") or {"copies": 0}
    if apart["copies"]:
        more = _poisson_tail(apart["copies"], apart["expected_false_alarms"]) < _ALPHA
        chance = f"{number(apart['expected_false_alarms'], digits=2)} expected by chance"
        yield Finding(
            "poor" if more else "caution",
            f"{apart['copies']} of {scans} {'is' if apart['copies'] == 1 else 'are'} close to a held-out real scan "
            f"({chance})" + (", which the generator is not to have seen" if more else ""),
            "Check that the generator did not learn from the held-out scans: if it did, every score flatters it"
            if more
            else "",
        )


def _poisson_tail(copies: int, expected: float) -> float:
    """Probability of that many false alarms or more."""
    term = fewer = math.exp(-expected)
    for k in range(1, copies):
        term *= expected / k
        fewer += term
    return 1 - fewer


def _variety(report: dict[str, Any], rows: dict[str, Row]) -> Iterator[Finding]:
    """What of the real scans the synthetic ones lack."""
    step = "Look through the contact sheets for looks of the real scans that the synthetic ones lack"
    for key, text in (
        ("precision", "some synthetic scans look like no real one"),
        ("recall", "some of the variety of the real scans is missing"),
        ("coverage", "some kinds of real scans are missing"),
        ("vendi", "the synthetic set holds fewer different scans than real ones would be"),
    ):
        row = rows.get(key)
        if row and row.p_value is not None and row.p_value < _ALPHA and row.below_floor:
            value, floor = (
                number(x, beside=(row.at_floor_n, row.floor), digits=2) for x in (row.at_floor_n, row.floor)
            )
            yield Finding(
                "caution",
                f"{text}: {row.words.title.lower() if key != 'vendi' else row.words.title} {value}, "
                f"real scans among themselves {floor} ({p_equals(row.p_value)})",
                step if key != "precision" else "",
            )
    similarity = report.get("ms_ssim")
    if similarity:
        real, made = (float(similarity[name]["mean"]) for name in ("real", "synthetic"))
        if made - real > MORE_ALIKE:
            yield Finding(
                "caution",
                "pairs of synthetic scans are more alike than pairs of real ones "
                f"(MS-SSIM {number(made, digits=2)} against {number(real, digits=2)})",
                step,
            )


def _usefulness(report: dict[str, Any]) -> Iterator[Finding]:
    """What a segmenter learns from the synthetic scans."""
    utility = report.get("utility")
    if not utility:
        if missing := report.get("utility_missing"):
            yield Finding("caution", *_UNMEASURED[missing])
        return
    means = {name: _mean(values) for name, values in (utility.get("dice") or {}).items()}
    real, made, both = (means.get(name) for name in ("real", "synthetic", "real_and_synthetic"))
    if real is None or made is None:
        yield Finding("caution", "the use for training is not known: no validation scan shows a labelled class")
        return
    if real < _NOTHING:
        yield Finding(
            "caution",
            f"the segmenter that learned from real scans finds almost nothing (mean Dice {number(real, digits=2)}), so "
            "what it says of the synthetic scans means nothing",
            "Add labelled real scans before you judge the use for training",
        )
        return
    if made < _NOTHING:
        yield Finding(
            "poor",
            f"a segmenter that learned from synthetic scans alone finds almost nothing in real ones (mean Dice "
            f"{number(made, digits=2)}; from real scans {number(real, digits=2)})",
            "Look on the synthetic contact sheet whether the labels lie on what they name",
        )
        return
    text = (
        f"a segmenter trained on synthetic scans alone reaches a mean Dice of {number(made, digits=2)} on real scans; "
        f"trained on real scans it reaches {number(real, digits=2)}"
    )
    yield Finding("good", text if both is None else f"{text}, trained on both {number(both, digits=2)}")


def _mean(values: Any) -> float | None:
    known = [value for value in map(finite, values or []) if value is not None]
    return sum(known) / len(known) if known else None


def _doubts(report: dict[str, Any], rows: dict[str, Row]) -> Iterator[Finding]:
    """What takes from the weight of everything else."""
    real = report["real"]
    scored = [row for row in rows.values() if row.key in _TESTS]
    if scored and all(row.floor is None for row in scored):
        yield Finding("caution", "there is no real-versus-real floor, so the size of a distance cannot be judged")
    if not was_split(report):
        yield Finding(
            "caution",
            "the real scans were not split before training: a generator that has learned from all of them looks better "
            "than it is",
            "List real scans that the generator has not seen in val.txt, and compare with those",
        )
    floors = [row for row in scored if row.floor_p_value is not None and row.floor_p_value < _ALPHA]
    if floors:
        yield Finding(
            "caution",
            f"the two parts of the real scans differ too ({floors[0].words.title}, {p_equals(floors[0].floor_p_value)})"
            ": the floor is high, and a ratio to it flatters",
        )
    one_sided = [row for row in scored if row.p_is_too_small and (row.p_value or 0) < _ALPHA]
    if one_sided:
        titles = listed([row.words.title for row in one_sided])
        yield Finding("caution", f"the p-value of {titles} is too small: {one_sided[0].p_is_too_small}")
    frechet = rows.get("frechet")
    if frechet and min(frechet.n) < frechet.d:
        yield Finding(
            "good",
            f"with fewer scans ({min(frechet.n)}) than features ({frechet.d}) the {frechet.words.title} itself is "
            "mostly bias: read its ratio and its p-value",
        )
    if not report["synthetic"].get("marked_synthetic", True):
        yield Finding("caution", "the synthetic folder does not say that it is synthetic: are the folders swapped?")
    rejected = len(report.get("rejected") or [])
    if rejected > _MANY_REJECTED * (rejected + real["scans"] + report["synthetic"]["scans"]):
        yield Finding("caution", f"many scans were rejected ({rejected}), so the others may not stand for their sets")
