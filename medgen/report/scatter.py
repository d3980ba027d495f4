"""Every scan as a point in the plane in which the features vary most."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from medgen.report.numbers import finite, percent

_EDGE = 4.0  # percent
_KINDS = {"real train": "train", "synthetic": "synthetic"}
# Shapes differ as well as colors, for those who cannot tell the colors apart.
_SYMBOLS = Markup(
    '<svg class="symbols" aria-hidden="true"><defs>'
    '<symbol id="mark-train" overflow="visible"><circle class="point train" r="3.5"/></symbol>'
    '<symbol id="mark-real" overflow="visible"><rect class="point real" x="-4" y="-4" width="8" height="8"/></symbol>'
    '<symbol id="mark-synthetic" overflow="visible"><path class="point synthetic" d="M0-5.5 5.2 4-5.2 4z"/></symbol>'
    "</defs></svg>"
)


def scatter(embedding: dict[str, Any]) -> Markup:
    """Points of the sets; a point shows its case when the pointer rests on it.

    Args:
        embedding: ``embedding`` of a report.

    Returns:
        Legend and plot.
    """
    points = {name: [_pair(point) for point in rows] for name, rows in embedding["points"].items()}
    known = [point for rows in points.values() for point in rows if point]
    if not known:
        return Markup("")
    scales = [_scale([point[axis] for point in known]) for axis in (0, 1)]
    legend, marks = [], []
    for name, rows in points.items():
        kind = _KINDS.get(name, "real")
        cases = (embedding.get("cases") or {}).get(name) or []
        legend.append(
            Markup(
                '<li><svg class="key" aria-hidden="true"><use href="#mark-{}" x="9" y="9"/></svg>{} ({})</li>'
            ).format(kind, name, len(rows))
        )
        for index, point in enumerate(rows):
            if point:
                case = cases[index] if index < len(cases) else f"scan {index + 1}"
                # SVG counts from the top.
                x, y = scales[0](point[0]), 100 - scales[1](point[1])
                marks.append(
                    Markup('<use href="#mark-{}" x="{:.1f}%" y="{:.1f}%"><title>{}: {}</title></use>').format(
                        kind, x, y, name, case
                    )
                )
    shares = [f" ({percent(share)} of the variation)" for share in embedding.get("explained") or ()] or ["", ""]
    spoken = "Scatter of " + ", ".join(f"{len(rows)} {name} scans" for name, rows in points.items())
    return Markup(
        '{}<ul class="legend">{}</ul><div class="scatter"><svg role="img" aria-label="{}">{}</svg>'
        '<small class="x-axis">axis 1{} →</small><small class="y-axis">axis 2{} →</small></div>'
    ).format(_SYMBOLS, Markup("").join(legend), spoken, Markup("").join(marks), shares[0], shares[1])


def _pair(point: Any) -> tuple[float, float] | None:
    x, y = finite(point[0]), finite(point[1])
    return None if x is None or y is None else (x, y)


def _scale(values: list[float]) -> Any:
    low, width = min(values), (max(values) - min(values)) or 1.0
    return lambda value: _EDGE + (100 - 2 * _EDGE) * (value - low) / width
