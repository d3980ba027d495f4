"""The verdict of a report: what its numbers carry, and no more.

Three levels. ``poor``: synthetic scans are clearly off, or there are more copies than chance explains. ``caution``: a
difference or a doubt that a reader has to weigh. ``good``: nothing was found by anything that was looked for. A fourth,
``unknown``, where the scans are too few to tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medgen.report.findings import Level, findings

_ORDER: tuple[Level, ...] = ("good", "unknown", "caution", "poor")


@dataclass(frozen=True)
class Verdict:
    """What a reader sees first.

    Attributes:
        level: The worst of what was found.
        headline: One line.
        sentences: What else has to be known before the line is believed.
        next_step: What to look at next.
    """

    level: Level
    headline: str
    sentences: tuple[str, ...]
    next_step: str


def verdict(report: dict[str, Any]) -> Verdict:
    """Judge a report.

    Args:
        report: Content of ``report.json``.

    Returns:
        The verdict.
    """
    by_kind = findings(report)
    found = [finding for kind in by_kind.values() for finding in kind]
    worst = max(found, key=lambda finding: _ORDER.index(finding.level)).level
    headline = "; ".join(finding.text for finding in found if finding.headline)
    # Copies first: a scan that gives a patient away is worse than one that does not look real.
    steps = sorted(
        (finding for finding in [*by_kind["copies"], *found] if finding.next_step),
        key=lambda finding: -_ORDER.index(finding.level),
    )
    return Verdict(
        level=worst,
        headline=f"{headline[:1].upper()}{headline[1:]}.",
        sentences=tuple(f"{finding.text}." for finding in found if not finding.headline),
        next_step=steps[0].next_step if steps else "",
    )
