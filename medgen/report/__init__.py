"""The report of an evaluation as people read it: one page that opens anywhere, and a table for a paper."""

from __future__ import annotations

from medgen.report.page import write_report

__all__ = ["write_report"]
