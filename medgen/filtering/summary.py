"""What came of a filtered set: counts and reasons, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen.data.case import Case
from medgen.data.export import write_json
from medgen.filtering.gates import Gates
from medgen.filtering.picture import draw_gates
from medgen.provenance import MANIFEST, read_manifest, sha256_scan
from medgen.types import BadInputError

REPORT = "gates.json"
PICTURE = "gates.png"
_FEW = 0.1


def summarize(gates: Gates, lines: Sequence[Mapping[str, Any]], **further: Any) -> dict[str, Any]:
    """Count what was accepted, and why pairs were not.

    Args:
        gates: The fitted gates.
        lines: ``gates`` of each pair: its `reasons` and `scores`.
        **further: Further values.

    Returns:
        What ``gates.json`` holds.
    """
    reasons = Counter(reason for line in lines for reason in line["gates"]["reasons"])
    accepted = sum(not line["gates"]["reasons"] for line in lines)
    return {
        "pairs": len(lines),
        "accepted": accepted,
        "accept_rate": accepted / len(lines) if lines else None,
        "reasons": dict(reasons.most_common()),
        "only_reason": dict(
            Counter(line["gates"]["reasons"][0] for line in lines if len(line["gates"]["reasons"]) == 1).most_common()
        ),
        **further,
        "fitted": gates.describe(),
        "warnings": [*gates.reference.warnings, *gates.weak_spots()],
    }


def seen_cases(folder: Path, cases: Iterable[Case]) -> list[Case]:
    """Find real scans that the gates which judged a set were fitted on.

    Args:
        folder: Of accepted scans.
        cases: The real scans.

    Returns:
        Those of a name and a label file that the gates have seen; none where no gates judged.

    Raises:
        BadInputError: If ``gates.json`` is damaged, or lacking where the manifest says that gates judged.
    """
    path, manifest = folder / REPORT, folder / MANIFEST
    if not path.is_file():
        if manifest.is_file() and any(record.gates for record in read_manifest(manifest)):
            raise BadInputError(
                f"{path}: expected the report of the gates that judged these scans, which says what they have seen, "
                "got no such file. Copy it from where they were filtered, or filter again."
            )
        return []
    try:
        fitted = json.loads(path.read_text(encoding="utf-8"))["fitted"]
        names, labels = (set(fitted[key]) for key in ("reference_cases", "reference_labels"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInputError(
            f"{path}: expected the report that medgen filter and medgen synthesize --filter write, got a damaged file "
            f"({type(error).__name__}). Filter again."
        ) from error
    return [case for case in cases if case.case in names and case.label and sha256_scan(case.label) in labels]


def table(report: Mapping[str, Any]) -> str:
    """Accept rate and reasons in words.

    Args:
        report: From :func:`summarize`.

    Returns:
        Some lines of text.
    """
    count, fitted = report["pairs"], report["fitted"]
    head = f"accepted {report['accepted']} of {count} pairs"
    lines = [head + (f" ({report['accept_rate']:.0%})" if count else "")]
    if report["reasons"]:
        width = max(len(reason) for reason in report["reasons"])
        lines.append(f"  {'reason':<{width}}  pairs         no other reason")
        for reason, number in report["reasons"].items():
            alone = report["only_reason"].get(reason, 0)
            lines.append(f"  {reason:<{width}}  {number:>5} ({number / count:>4.0%})  {alone:>5}")
    if count and report["accepted"] <= _FEW * count:
        lines.append(
            f"Few are accepted: look at {PICTURE} and rejected; train the model longer, or give label maps like those "
            "of the reference."
        )
    lines.append(f"gates: {', '.join(fitted['gates'])}")
    lines.append(
        f"fitted on {fitted['reference_scans']} real scans of "
        f"{fitted['reference_patients']} patients, of which they reject {fitted['real_rejected_held_out']:.1%} (each "
        "judged without its patient)"
    )
    return "\n".join([*lines, *(f"note: {warning}" for warning in report["warnings"])])


def write_summary(folder: Path, gates: Gates, lines: Sequence[Mapping[str, Any]], **further: Any) -> dict[str, Any]:
    """Write ``gates.json`` and ``gates.png``, and print the table.

    Args:
        folder: Output folder.
        gates: The fitted gates.
        lines: As for :func:`summarize`.
        **further: As for :func:`summarize`.

    Returns:
        What ``gates.json`` holds.
    """
    report = summarize(gates, lines, **further)
    write_json(folder / REPORT, report)
    title = table(report).splitlines()[0]
    draw_gates(folder / PICTURE, gates, [line["gates"] for line in lines], report["reasons"], title)
    print(table(report))
    return report
