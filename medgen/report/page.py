"""The page of a report: one HTML file that needs nothing else, and the score table in LaTeX beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup
from PIL import Image

from medgen.provenance import write_text
from medgen.report import numbers
from medgen.report.charts import dice_charts, floor_chart, similarity_chart
from medgen.report.feature_words import describe_feature
from medgen.report.findings import MORE_ALIKE
from medgen.report.images import data_uri, mark
from medgen.report.latex import score_table
from medgen.report.methods import methods_paragraph
from medgen.report.rows import all_warnings, score_rows, was_split
from medgen.report.scatter import scatter
from medgen.report.shift_chart import shift_chart, shift_in_words
from medgen.report.verdict import verdict

_LEVELS = {
    "good": ("✓", "No problem found"),
    "unknown": ("?", "Not decided"),
    "caution": ("!", "With reservations"),
    "poor": ("✕", "Problems found"),
}
_WIDE = 4  # times as wide as high
_ARROWS = {"lower": "↓", "higher": "↑", "best": "↔"}


def write_report(report: Mapping[str, Any], pictures: Mapping[str, Image.Image], output: Path) -> Path:
    """Write ``index.html`` and ``report.tex``.

    Args:
        report: Content of ``report.json``, format ``medgen-report/3``.
        pictures: Contact sheets ``"real"`` and ``"synthetic"``, and ``"pair 0"`` and so on for the closest pairs:
            synthetic scan, real scan aligned with it, difference. Any of them may be absent.
        output: Folder; made where there is none.

    Returns:
        Path of the page.
    """
    content = dict(report)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "report.tex", score_table(content))
    page = output / "index.html"
    write_text(page, _template().render(_context(content, pictures)))
    return page


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": numbers.number,
        "interval": numbers.interval,
        "p_value": numbers.p_value,
        "percent": numbers.percent,
        "value": _value,
    }
    environment.globals |= {
        "count": numbers.count,
        "describe": describe_feature,
        "grouped": _grouped,
        "shares_top": lambda shares: max(*shares.values(), 1e-12),
        "arrows": _ARROWS,
        "margin": MORE_ALIKE,
    }
    return environment.from_string(_read("page.html"))


def _read(name: str) -> str:
    return (files(__package__ or "") / name).read_text(encoding="utf-8")


def _context(report: dict[str, Any], pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
    rows = score_rows(report)
    found = verdict(report)
    icon, label = _LEVELS[found.level]
    rejected = report.get("rejected") or []
    radiomic = {row.key: row for row in rows if row.key in (report.get("frd") or {})}
    memorization, utility = report.get("memorization"), report.get("utility")
    shift = report["radiomic_shift"] if (report.get("radiomic_shift") or {}).get("largest") else None
    return {
        "style": Markup(_read("page.css")),  # our own file, which holds no tag
        "report": report,
        "verdict": found,
        "icon": icon,
        "label": label,
        "rows": rows,
        "sheets": {kind: data_uri(mark(pictures[kind], kind)) for kind in ("real", "synthetic") if kind in pictures},
        "floor_chart": floor_chart(rows),
        "scatter": scatter(report["embedding"]) if report.get("embedding") else Markup(""),
        "similarity": similarity_chart(report["ms_ssim"]) if report.get("ms_ssim") else Markup(""),
        "radiomic": radiomic,
        "shift": shift_chart(shift) if shift else Markup(""),
        "shift_in_words": shift_in_words(shift) if shift else "",
        "memorization": memorization,
        "pairs": _pairs(memorization, pictures),
        "utility": utility,
        "dice": dice_charts(utility) if utility else [],
        "warnings": all_warnings(report),
        "rejected": rejected,
        "reasons": Counter(f"{item['set']}: {item['reason']}" for item in rejected).most_common(),
        "methods": methods_paragraph(report),
        "was_split": was_split(report),
        "views": (report.get("extractor") or {}).get("views") or [],
    }


def _pairs(memorization: dict[str, Any] | None, pictures: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """The closest pairs, each with its picture where there is one."""
    found = (memorization or {}).get("pairs") or []
    shown = []
    for index, pair in enumerate(found):
        picture = pictures.get(f"pair {index}")
        # The three planes of a volume side by side need the whole width.
        wide = picture is not None and picture.width > _WIDE * picture.height
        shown.append({**pair, "picture": data_uri(picture) if picture else None, "wide": wide})
    return shown


def _grouped(reasons: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Names by the reason that they share."""
    groups: dict[str, list[str]] = {}
    for name, reason in (reasons or {}).items():
        groups.setdefault(reason, []).append(name)
    return groups


def _value(item: Any) -> str:
    """Any recorded value in a cell."""
    if isinstance(item, float):
        return numbers.number(item)
    if isinstance(item, Mapping):
        return "; ".join(f"{str(key).replace('_', ' ')}: {_value(value)}" for key, value in item.items())
    if isinstance(item, (list, tuple)):
        return ", ".join(map(_value, item))
    return numbers.NOT_DEFINED if item is None else str(item)
