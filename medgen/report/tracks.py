"""Parts of charts: scales, round marks on axes, and rows of HTML with one SVG track each.

Positions are in percent of the track, so that a chart fits any screen while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

_EDGE = 3.0  # percent of the track kept free at either end, so that marks are not cut
GRID = Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>')
_TRACK = Markup('<svg class="track" role="img" aria-label="{}">{}</svg>')
Scale = Callable[[float], float]


def linear(low: float, high: float) -> Scale:
    """Scale from values to percent of a track.

    Args:
        low: Value at the left end.
        high: Value at the right end.

    Returns:
        The scale; values beyond the ends are put on them.
    """
    width = high - low or 1.0
    return lambda value: _EDGE + (100 - 2 * _EDGE) * min(max((value - low) / width, 0.0), 1.0)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, about five.

    Args:
        low: Lower end.
        high: Upper end, above `low`.

    Returns:
        Ascending values.
    """
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line(name: str, spoken: str, marks: Sequence[Markup], value: str, under: str) -> Markup:
    """One row of a chart.

    Args:
        name: What the row is about, to the left.
        spoken: What a screen reader says of the track.
        marks: What is drawn on the track, back to front.
        value: Its number, to the right.
        under: Small print below the number.

    Returns:
        The row.
    """
    return Markup(
        '<div class="line"><div class="name">{}</div>{}<div class="number">{}<small>{}</small></div></div>'
    ).format(name, _TRACK.format(spoken, Markup("").join(marks)), value, under)


def axis(scale: Scale, marks: Sequence[float], unit: str) -> Markup:
    """The row of labels below the tracks of one scale.

    Args:
        scale: From values to percent of the track.
        marks: Values to label.
        unit: Their unit.

    Returns:
        The row.
    """
    texts = [
        Markup('<text x="{:.2f}%" y="12">{}</text>').format(scale(mark), "0" if not mark else f"{mark:.6g}")
        for mark in marks
    ]
    return Markup(
        '<div class="line axis" aria-hidden="true"><div class="name"></div><svg class="ticks">{}</svg>'
        '<div class="number"><small>{}</small></div></div>'
    ).format(Markup("").join(texts), unit)


def bar(left: float, right: float, top: float, height: float, kind: str, title: str) -> Markup:
    """A bar or a shaded range.

    Args:
        left: Its ends, in percent of the track.
        right: Likewise.
        top: In pixels.
        height: In pixels.
        kind: CSS classes.
        title: What is shown where the pointer rests.

    Returns:
        The mark.
    """
    return Markup(
        '<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{:g}" height="{:g}" rx="2"><title>{}</title></rect>'
    ).format(kind, left, max(right - left, 0.4), top, height, title)


def whisker(left: float, right: float, kind: str, title: str) -> Markup:
    """A line from one end of an interval to the other.

    Args:
        left: Its ends, in percent of the track.
        right: Likewise.
        kind: CSS class.
        title: What is shown where the pointer rests.

    Returns:
        The mark.
    """
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="15" y2="15"><title>{}</title></line>').format(
        kind, left, right, title
    )


def dot(x: float, kind: str, title: str) -> Markup:
    """A value.

    Args:
        x: Its place, in percent of the track.
        kind: CSS class.
        title: What is shown where the pointer rests.

    Returns:
        The mark.
    """
    return Markup('<circle class="{}" cx="{:.2f}%" cy="15" r="6"><title>{}</title></circle>').format(kind, x, title)
