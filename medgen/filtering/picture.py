"""One picture of a filtered set: why pairs were rejected, and every score beside those of real scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medgen.filtering.gates import COPY, Gates
from medgen.filtering.measure import KINDS
from medgen.provenance import atomic_path
from medgen.seeding import derive_seed

_GROUND, _INK, _FAINT, _BAND = (255, 255, 255), (25, 28, 33), (110, 116, 126), (226, 240, 231)
# Okabe and Ito's colors, which color-blind readers can tell apart.
_REAL, _PASSES, _FAILS = (120, 124, 130), (0, 114, 178), (213, 94, 0)
_WIDTH, _LEFT, _RIGHT, _MARGIN = 1500, 380, 130, 30
_BAR, _STRIP, _TEXT = 34, 62, 19
_MOST_STRIPS = 60
_MOST_BARS = 24
_UNITS = {
    "consistency": "Dice",
    "intensity_level": "median, of the scan's range",
    "intensity_spread": "of the scan's range",
    "intensity_contrast": "chance to be brighter than around",
    "intensity_source": "median, in the file's units",
    "share": "of all classes",
    "spacing": "mm",
    "outlier": "distance to the nearest real scan",
    COPY: "correlation",
}


def draw_gates(
    path: Path, gates: Gates, rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, int], title: str
) -> Path:
    """Draw bars of the reasons, and below them each score with its tolerance.

    Args:
        path: PNG to write.
        gates: The fitted gates.
        rows: ``reasons`` and ``scores`` of each pair.
        reasons: How many pairs each reason concerns, the most frequent first.
        title: First line.

    Returns:
        The path.
    """
    bars = list(reasons.items())[:_MOST_BARS]
    codes = sorted([*gates.tails, *([COPY] if COPY in gates.chosen else [])], key=lambda code: -reasons.get(code, 0))
    strips = sorted(codes[:_MOST_STRIPS], key=[*gates.tails, COPY].index)
    height = 4 * _MARGIN + 3 * _TEXT + max(len(bars), 1) * _BAR + 60 + len(strips) * _STRIP
    picture = Image.new("RGB", (_WIDTH, height), _GROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(24))
    top = _MARGIN + 50
    if not bars:
        draw.text((_MARGIN, top), "No pair was rejected.", fill=_FAINT, font=_font())
    longest = max((count for _, count in bars), default=1)
    for row, (code, count) in enumerate(bars):
        y = top + row * _BAR
        width = (_WIDTH - _LEFT - _RIGHT - _MARGIN) * count / longest
        draw.text((_LEFT - 14, y + _BAR / 2), code, fill=_INK, font=_font(), anchor="rm")
        draw.rectangle((_LEFT, y + 5, _LEFT + max(width, 2), y + _BAR - 5), fill=_FAILS)
        share = f"{count} ({count / max(len(rows), 1):.0%})"
        draw.text((_LEFT + max(width, 2) + 8, y + _BAR / 2), share, fill=_INK, font=_font(), anchor="lm")
    top += max(len(bars), 1) * _BAR + 30
    words = [("real, above", _REAL), ("passes, below", _PASSES), ("fails, below", _FAILS)]
    across = float(_LEFT)
    for word, color in words:
        draw.ellipse((across, top + 5, across + 12, top + 17), fill=color)
        draw.text((across + 18, top), word, fill=_INK, font=_font())
        across += 50 + _font().getlength(word)
    draw.rectangle((across, top + 3, across + 22, top + 19), fill=_BAND, outline=_FAINT)
    draw.text((across + 30, top), "tolerance", fill=_INK, font=_font())
    top += 44
    for row, code in enumerate(strips):
        _strip(draw, code, gates, rows, top + row * _STRIP)
    hidden = len(codes) - len(strips)
    if hidden:
        draw.text((_LEFT, top + len(strips) * _STRIP), f"and {hidden} more scores", fill=_FAINT, font=_font())
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


def _font(size: int = _TEXT) -> Any:
    return ImageFont.load_default(size)


def _strip(draw: ImageDraw.ImageDraw, code: str, gates: Gates, rows: Sequence[Mapping[str, Any]], y: float) -> None:
    """One score: real scans above the line, pairs below it, what is within tolerance shaded."""
    kind = KINDS.get(code.partition(":")[0])

    def scaled(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        return array if kind is None else kind.forward(array)

    if code == COPY:
        real = gates.reference.similarity.numpy()
    elif code == "outlier":
        real = scaled(gates.real_distances)
    else:
        real = scaled([scan.scores[code] for scan in gates.reference.scans if code in scan.scores])
    shown = [row for row in rows if code in row["scores"]]
    made = scaled([row["scores"][code] for row in shown])
    ends = gates.bounds(code)
    low, high = (float(scaled([end])[0]) if math.isfinite(end) else end for end in ends)
    points = [*real.tolist(), *(end for end in (low, high) if math.isfinite(end))]
    first, last = min(points), max(points)
    wide = max(last - first, 1e-9)
    # Pairs far outside are drawn at the edge.
    first, last = (
        max(first - 0.35 * wide, min([first, *made.tolist()]) - 0.02 * wide) - 0.02 * wide,
        min(last + 0.35 * wide, max([last, *made.tolist()]) + 0.02 * wide) + 0.02 * wide,
    )
    right = _WIDTH - _RIGHT - _MARGIN

    def place(value: float) -> float:
        return _LEFT + (right - _LEFT) * min(max((value - first) / (last - first), 0), 1)

    middle = y + _STRIP / 2 - 4
    inside = (place(low) if math.isfinite(low) else _LEFT, place(high) if math.isfinite(high) else right)
    draw.rectangle((_LEFT, y + 6, right, y + _STRIP - 14), fill=(247, 240, 236))
    draw.rectangle((inside[0], y + 6, inside[1], y + _STRIP - 14), fill=_BAND)
    draw.line((_LEFT, middle, right, middle), fill=(200, 204, 210))
    draw.text((_LEFT - 14, middle - 8), code, fill=_INK, font=_font(), anchor="rm")
    draw.text((_LEFT - 14, middle + 12), unit_of(code, gates), fill=_FAINT, font=_font(14), anchor="rm")
    for end, value in zip(ends, (low, high), strict=True):
        if math.isfinite(value):
            draw.line((place(value), y + 6, place(value), y + _STRIP - 14), fill=_INK, width=2)
            draw.text((place(value), y + _STRIP - 13), _number(end), fill=_FAINT, font=_font(14), anchor="mt")
    for index, value in enumerate(real):
        _dot(draw, place(float(value)), middle - 4 - _jitter(code, index), _REAL, 2)
    for index, (row, value) in enumerate(zip(shown, made, strict=True)):
        failed = code in row["reasons"]
        _dot(draw, place(float(value)), middle + 4 + _jitter(code, index), _FAILS if failed else _PASSES, 3)
    out = sum(code in row["reasons"] for row in shown)
    color = _FAILS if out else _FAINT
    draw.text((right + 12, middle), f"{out} of {len(shown)}", fill=color, font=_font(), anchor="lm")


def unit_of(code: str, gates: Gates) -> str:
    """What the numbers of a score are.

    Args:
        code: Of the score, such as ``volume:anterior``.
        gates: The fitted gates.

    Returns:
        A unit, or a few words.
    """
    name = code.partition(":")[0]
    if name in _UNITS:
        return _UNITS[name]
    if not any(score.startswith("spacing:") for scan in gates.reference.scans for score in scan.scores):
        return "voxels"
    return f"mm^{gates.reference.spatial_dims}" if name == "volume" else "mm"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _jitter(code: str, index: int) -> float:
    return derive_seed(code, index) % 1000 / 1000 * 14


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, color: tuple[int, int, int], radius: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
