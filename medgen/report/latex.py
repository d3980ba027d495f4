"""The score table for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from medgen.report.numbers import finite_pair, interval, number, p_value
from medgen.report.rows import Row, score_rows

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "×": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
}
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def escape(text: str) -> str:
    """Text as LaTeX shows it, letter by letter.

    Args:
        text: Any text; control characters become spaces.

    Returns:
        LaTeX source.
    """
    plain = "".join(letter if letter.isprintable() or letter in _ESCAPES else " " for letter in text)
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in plain)
    return re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"$^{{{found[0].translate(_SUPERSCRIPTS)}}}$", escaped)


def score_table(report: dict[str, Any]) -> str:
    """The scores as a LaTeX table.

    Args:
        report: Content of ``report.json``.

    Returns:
        Source of a ``table`` environment, which needs the package booktabs.
    """
    rows = score_rows(report)
    lines = [
        "% Needs \\usepackage{booktabs}, and \\usepackage[utf8]{inputenc} before LaTeX of 2018.",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_caption(report, rows)}}}",
        r"  \label{tab:synthetic-scans}",
        r"  \begin{tabular}{lrrrrrr}",
        r"    \toprule",
        r"    Score & $n$ & Value & 95\,\% interval & Floor & Ratio & $p$ \\",
        r"    \midrule",
        *(f"    {_line(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    beside = (row.value, row.floor, *(row.interval or ()))
    arrow = {"lower": r" $\downarrow$", "higher": r" $\uparrow$"}.get(row.words.direction.split()[0], "")
    cells = [
        f"{row.n[0]} / {row.n[1]}",
        *(
            "--" if missing else escape(text)
            for missing, text in (
                (row.value is None, number(row.value, beside=beside)),
                (row.interval is None, interval(finite_pair(row.interval), beside=beside)),
                (row.floor is None, number(row.floor, beside=beside)),
                (row.ratio is None, number(row.ratio)),
                (row.p_value is None, p_value(row.p_value)),
            )
        ),
    ]
    return " & ".join([escape(row.words.title) + arrow, *cells])


def _caption(report: dict[str, Any], rows: Sequence[Row]) -> str:
    extractor = report["extractor"]
    text = (
        f"{report['synthetic']['scans']} synthetic scans ({report['synthetic']['folder']}) against "
        f"{report['real']['val']} real validation scans ({report['real']['folder']}; {report['real']['split']}). "
        f"Features: {extractor['name']}, weights {extractor['weights_sha256'][:8]}. Floor: the same score between real "
        "scans; ratio: value over floor at equal n; n: real / synthetic scans; p: permutation test."
    )
    sizes = {row.floor_n for row in rows if row.floor_n and row.floor_n != row.n}
    if sizes:
        text += f" The floor rests on {', '.join(f'{a} / {b}' for a, b in sorted(sizes))} scans."
    return escape(text)
