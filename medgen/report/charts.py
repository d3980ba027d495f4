"""Charts of scores: each beside its floor, how alike scans are, and Dice by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from medgen.report.findings import MORE_ALIKE
from medgen.report.numbers import finite, finite_pair, interval, number
from medgen.report.rows import Row
from medgen.report.tracks import GRID, Scale, axis, bar, dot, line, linear, ticks, whisker

_LOGARITHMIC_FROM = 6.0  # times the floor
_CHART = Markup('<div class="chart"><h4 class="chart-title">{}</h4>{}</div>')


def floor_chart(rows: Sequence[Row]) -> Markup:
    """Each score beside the range of its floor.

    Args:
        rows: Scores; those without value or floor are left out.

    Returns:
        Up to three groups of tracks: distances and shares in units of their floor, others in their own units.
    """
    shown = [row for row in rows if row.at_floor_n is not None and row.floor is not None]
    in_floors = [row for row in shown if row.ratio is not None]
    higher_is_worse = [row for row in in_floors if row.words.direction.startswith("lower")]
    others = [row for row in in_floors if row not in higher_is_worse]
    parts = []
    if higher_is_worse:
        parts.append(_group("Distances, in units of their floor: further right is worse", higher_is_worse))
    if others:
        parts.append(
            _group("Likeness and variety, in units of their floor: 1 is as in real scans, further left is less", others)
        )
    own = [row for row in shown if row.ratio is None]
    if own:
        lines = Markup("").join(map(_own_units, own))
        parts.append(_CHART.format("In their own units: further right is worse", lines))
    return Markup("").join(parts)


def _group(title: str, rows: Sequence[Row]) -> Markup:
    """Rows on one axis, 1 being the floor."""
    reach = [1.0]
    for row in rows:
        reach += [edge / row.floor for edge in _edges(row) if row.floor]
    high = max(*reach, 1.5) * 1.03
    if high > _LOGARITHMIC_FROM:
        low = min([0.5, *(edge for edge in reach if edge > 0)])
        marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if low <= mark <= high]
        scale, unit = _logarithmic(low, high), "times the floor, logarithmic"
    else:
        marks = ticks(0, high)
        scale, unit = linear(0, high), "times the floor"
    lines = [_row(row, _in_floors(scale, row), map(scale, marks)) for row in rows]
    return _CHART.format(title, Markup("").join([*lines, axis(scale, marks, unit)]))


def _logarithmic(low: float, high: float) -> Scale:
    base = linear(math.log(low), math.log(high))
    return lambda value: base(math.log(max(value, low)))


def _in_floors(scale: Scale, row: Row) -> Scale:
    return lambda value: scale(value / (row.floor or 1))


def _own_units(row: Row) -> Markup:
    edges = [0.0, *_edges(row)]
    low, high = min(edges), max(edges)
    if high == low:
        high = low + 1
    scale, marks = linear(low, high), ticks(low, high)
    return _row(row, scale, map(scale, marks)) + axis(scale, marks, "")


def _edges(row: Row) -> Iterator[float]:
    """What has to be seen of a row, in its own units."""
    yield from (value for value in (row.at_floor_n, row.floor) if value is not None)
    yield from row.floor_interval or ()
    yield from row.interval_at_floor_n or ()


def _row(row: Row, scale: Scale, grid: Iterable[float]) -> Markup:
    if row.at_floor_n is None or row.floor is None:
        return Markup("")
    marks = [GRID.format(x) for x in grid]
    if row.floor_interval:
        left, right = row.floor_interval
        marks.append(
            bar(scale(left), scale(right), 5, 20, "floor-range", f"range of the floor: {interval(row.floor_interval)}")
        )
    marks.append(
        Markup('<line class="floor-mark" x1="{0:.2f}%" x2="{0:.2f}%" y1="3" y2="27"><title>{1}</title></line>').format(
            scale(row.floor), f"floor: {number(row.floor)}"
        )
    )
    if ends := row.interval_at_floor_n:
        marks.append(whisker(scale(ends[0]), scale(ends[1]), "synthetic-line", f"interval: {interval(ends)}"))
    title = f"synthetic against real: {number(row.at_floor_n)}"
    marks.append(dot(scale(row.at_floor_n), "synthetic-dot", title))
    text = f"{number(row.ratio)} ×" if row.ratio is not None else number(row.at_floor_n, beside=(row.floor,))
    against = "" if row.ratio is not None else f"floor {number(row.floor, beside=(row.at_floor_n,))}"
    spoken = f"{row.words.title}: {title}, floor {number(row.floor)}, its range {interval(row.floor_interval)}"
    return line(row.words.title, spoken, marks, text, against)


def bars(
    series: Sequence[tuple[str, str, Any, Any]], *, high: float = 1.0, band: Any = None, spread: bool = False
) -> Markup:
    """Bars with an interval each, on one axis.

    Args:
        series: Label, color class (``real``, ``synthetic`` or ``both``), value and interval, which may be None.
        high: Value at the right end; bars begin at 0.
        band: Range to shade behind all bars, or None.
        spread: Whether the interval is a spread around the value, and is written so.

    Returns:
        The chart.
    """
    scale, marks = linear(0, high), ticks(0, high)
    shaded, lines = finite_pair(band), []
    beside = [value for _, _, value, _ in series]
    for label, color, value, ends in series:
        parts = [GRID.format(scale(mark)) for mark in marks]
        if shaded:
            parts.append(bar(scale(shaded[0]), scale(shaded[1]), 0, 30, "floor-range", interval(shaded)))
        known, known_ends = finite(value), finite_pair(ends)
        if known is not None:
            parts.append(bar(scale(0), scale(known), 6, 18, f"bar {color}", f"{label}: {number(known)}"))
        if known_ends:
            parts.append(whisker(scale(known_ends[0]), scale(known_ends[1]), "ink-line", interval(known_ends)))
        text, under = number(value, beside=beside), interval(known_ends, beside=beside) if known_ends else ""
        if spread and known_ends and known is not None:
            under = f"± {number(known_ends[1] - known, beside=beside)}"
        lines.append(line(label, f"{label}: {text} {under}", parts, text, under))
    return Markup('<div class="chart">{}{}</div>').format(Markup("").join(lines), axis(scale, marks, ""))


def similarity_chart(similarity: dict[str, Any]) -> Markup:
    """MS-SSIM of random pairs within the real and within the synthetic scans.

    Args:
        similarity: ``ms_ssim`` of a report.

    Returns:
        The chart, with a band of what counts as equal to the real scans.
    """
    series = []
    for name, label in (
        ("real", "real scans"),
        ("synthetic", "synthetic scans"),
        ("synthetic_one_label", "synthetic scans of one label map"),
    ):
        found = similarity.get(name)
        if found:
            mean, deviation = float(found["mean"]), float(found["std"])
            series.append((label, name.split("_")[0], mean, (mean - deviation, mean + deviation)))
    real = float(similarity["real"]["mean"])
    high = min(1.0, 1.1 * max(real + MORE_ALIKE, *(ends[1] for *_, ends in series)))
    return bars(series, high=high, band=(real - MORE_ALIKE, real + MORE_ALIKE), spread=True)


def dice_charts(utility: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Dice scores of each class, by what the segmenter was trained on, and of the labels of the synthetic scans.

    Args:
        utility: ``utility`` of a report.

    Returns:
        Name of each class and its chart.
    """
    dice, intervals = utility.get("dice") or {}, utility.get("intervals") or {}
    kinds = [
        ("real", "trained on real", "real"),
        ("synthetic", "trained on synthetic", "synthetic"),
        ("real_and_synthetic", "trained on both", "both"),
    ]
    charts = []
    for index, name in enumerate(utility["classes"]):
        series = [
            (label, color, _entry(dice[key], index), _entry(intervals.get(key), index))
            for key, label, color in kinds
            if key in dice
        ]
        if utility.get("adherence"):
            ends = _entry(intervals.get("adherence"), index)
            series.append(("labels of synthetic scans", "plain", _entry(utility["adherence"], index), ends))
        charts.append((str(name), bars(series)))
    return charts


def _entry(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, (list, tuple)) and index < len(values) else None
