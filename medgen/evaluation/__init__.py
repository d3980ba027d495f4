"""How real synthetic scans look, how much they vary, what they copy, and whether they help: one report."""

from __future__ import annotations

from medgen.evaluation.run import evaluate

__all__ = ["evaluate"]
