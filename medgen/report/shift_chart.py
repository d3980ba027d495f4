"""The features that differ most between real and synthetic scans: mean and standard deviation of both on one scale."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from medgen.report.feature_words import describe_feature
from medgen.report.numbers import count, number, p_equals
from medgen.report.tracks import Scale, linear

_SETS = (("real", 11), ("synthetic", 33))  # key and color class, height in pixels


def shift_in_words(shift: dict[str, Any]) -> str:
    """Whether any feature differs by more than chance.

    Args:
        shift: ``radiomic_shift`` of a report.

    Returns:
        One sentence.
    """
    tested, beyond = shift["features"], shift["beyond_chance"]
    smallest = p_equals(min(feature["p_value"] for feature in shift["largest"]))
    if not beyond:
        return f"None of {count(tested, 'feature')} differs by more than chance (smallest {smallest})."
    verb = "differs" if beyond == 1 else "differ"
    return f"{beyond} of {count(tested, 'feature')} {verb} by more than chance (smallest {smallest})."


def shift_chart(shift: dict[str, Any]) -> Markup:
    """Means of the features that differ most in both sets.

    Args:
        shift: ``radiomic_shift`` of a report.

    Returns:
        One row a feature: its meaning, both means with a standard deviation on the feature's own scale, and the
        difference.
    """
    return Markup('<div class="chart shift">{}</div>').format(Markup("").join(map(_feature, shift["largest"])))


def _feature(shift: dict[str, Any]) -> Markup:
    words = describe_feature(shift["feature"])
    means = [shift[name]["mean"] for name, _ in _SETS]
    reach = [shift[name]["mean"] + sign * shift[name]["std"] for name, _ in _SETS for sign in (-1, 1)]
    scale = linear(min(reach), max(reach))
    way = "higher in synthetic" if shift["effect"] > 0 else "lower in synthetic"
    size = f"{'+' if shift['effect'] > 0 else ''}{number(shift['effect'])} SD"
    chance = p_equals(shift["p_value"])
    both = f"means {number(means[0], beside=means)} → {number(means[1], beside=means)}"
    spoken = f"{words.meaning}, {words.image}: {size}, {way}, {chance}, {both}"
    marks = Markup("").join(_mark(name, top, **shift[name], scale=scale) for name, top in _SETS)
    return Markup(
        '<div class="line"><div class="name">{}{}<small>{}</small></div>'
        '<svg class="track boxes" role="img" aria-label="{}">{}</svg>'
        '<div class="number">{}<small>{}</small><small>{}</small><small>{}</small></div></div>'
    ).format(
        words.meaning,
        f", {words.image}" if words.image else "",
        ", ".join(filter(None, (words.feature, words.filter))),
        spoken,
        marks,
        size,
        way,
        chance,
        both,
    )


def _mark(name: str, top: int, mean: float, std: float, scale: Scale) -> Markup:
    return Markup(
        '<g class="mean {0}"><title>{0}: mean {1}, standard deviation {2}</title>'
        '<line x1="{3:.2f}%" x2="{4:.2f}%" y1="{6}" y2="{6}"/><circle cx="{5:.2f}%" cy="{6}" r="6"/></g>'
    ).format(name, number(mean), number(std), scale(mean - std), scale(mean + std), scale(mean), top)
