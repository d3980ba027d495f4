"""The features that differ most between real and synthetic scans, each as two boxes on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from medgen.report.feature_words import describe_feature
from medgen.report.numbers import finite, number
from medgen.report.tracks import linear

_SETS = (("real", "real", 4), ("synthetic", "synthetic", 24))  # key, color class, top in pixels
_HEIGHT = 14


def shift_chart(shifts: Sequence[dict[str, Any]]) -> Markup:
    """Quantiles of the strongest features in both sets.

    Args:
        shifts: ``radiomic_shift`` of a report.

    Returns:
        One row a feature: its meaning, a box for either set on the feature's own scale, and the difference.
    """
    return Markup('<div class="chart shift">{}</div>').format(Markup("").join(map(_feature, shifts)))


def _feature(shift: dict[str, Any]) -> Markup:
    words = describe_feature(shift["feature"])
    quantiles = {key: [finite(value) for value in shift.get(key) or []] for key, _, _ in _SETS}
    known = [value for values in quantiles.values() for value in values if value is not None]
    effect = finite(shift.get("effect"))
    way = "" if effect is None else "higher in synthetic" if effect > 0 else "lower in synthetic"
    size = "not defined" if effect is None else f"{'+' if effect > 0 else ''}{number(effect)} SD"
    spoken = f"{words.meaning}, {words.image}: {size}, {way}"
    boxes = Markup("")
    if known:
        scale = linear(min(known), max(known))
        for key, color, top in _SETS:
            boxes += _box([value for value in quantiles[key] if value is not None], scale, color, top, key)
    medians = [values[2] if len(values) == 5 else None for values in quantiles.values()]
    both = f"medians {number(medians[0], beside=medians)} → {number(medians[1], beside=medians)}"
    return Markup(
        '<div class="line"><div class="name">{}{}<small>{}</small></div>'
        '<svg class="track boxes" role="img" aria-label="{}">{}</svg>'
        '<div class="number">{}<small>{}</small><small>{}</small></div></div>'
    ).format(
        words.meaning,
        f", {words.image}" if words.image else "",
        ", ".join(filter(None, (words.feature, words.filter))),
        spoken,
        boxes,
        size,
        way,
        both,
    )


def _box(values: Sequence[float], scale: Any, color: str, top: int, name: str) -> Markup:
    if len(values) != 5:
        return Markup("")
    low, first, middle, third, high = map(scale, values)
    title = f"{name}: median {number(values[2])}, half of the scans from {number(values[1])} to {number(values[3])}, "
    title += f"nine tenths from {number(values[0])} to {number(values[4])}"
    return Markup(
        '<g class="box {}"><title>{}</title>'
        '<line x1="{:.2f}%" x2="{:.2f}%" y1="{y}" y2="{y}"/>'
        '<rect x="{:.2f}%" width="{:.2f}%" y="{}" height="{}" rx="2"/>'
        '<line class="median" x1="{m:.2f}%" x2="{m:.2f}%" y1="{}" y2="{}"/></g>'
    ).format(
        color,
        title,
        low,
        high,
        first,
        max(third - first, 0.4),
        top,
        _HEIGHT,
        top - 2,
        top + _HEIGHT + 2,
        y=top + _HEIGHT / 2,
        m=middle,
    )
