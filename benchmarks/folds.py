"""Draws of patients that are measured apart, at other times or on other machines, and compared together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, measured_by


@dataclass(frozen=True)
class Fold:
    """What the gates found; and unless they left nothing to learn from, the comparison, scores and test patients.

    By whom it was measured is known of a draw that was read.
    """

    gates: dict[str, Any]
    result: dict[str, Any] | None = None
    scores: dict[str, torch.Tensor] | None = None
    groups: list[str] | None = None
    measured_by: dict[str, Any] | None = None


def to_tensor(rows: Any) -> torch.Tensor:
    """Scores of JSON, where None is a class that a scan does not show."""

    def fill(value: Any) -> Any:
        return [fill(item) for item in value] if isinstance(value, list) else float("nan") if value is None else value

    return torch.tensor(fill(rows))


def fold_file(name: str, fold: int) -> Path:
    """Where one draw of a measurement is kept."""
    return ROOT / "benchmarks" / "results" / f"{name}_draw_{fold}.json"


def write_fold(path: Path, fold: Fold, settings: dict[str, Any]) -> None:
    """Keep one draw: scores of each training and test scan, and all that decides them."""

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, list) else None if value != value else value

    scores = fold.scores and {arm: plain(values.tolist()) for arm, values in fold.scores.items()}
    content = {**measured_by(), "settings": settings, "gates": fold.gates, "result": fold.result, "scores": scores}
    path.write_text(json.dumps({**content, "groups": fold.groups}) + "\n")
    print(f"\nkept in {path.relative_to(ROOT)}")


def read_fold(path: Path, settings: dict[str, Any]) -> Fold | None:
    """One draw that was kept; ends the program where it was measured with other settings."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{path}: expected a draw with {settings}, got {content['settings']}. Remove the file.")
    print(f"read from {path.relative_to(ROOT)}")
    scores = content["scores"] and {arm: to_tensor(rows) for arm, rows in content["scores"].items()}
    by = {key: content[key] for key in measured_by()}
    return Fold(content["gates"], content["result"], scores, content["groups"], by)


def require_one_kind(folds: dict[int, Fold], recipe: dict[str, Any]) -> None:
    """End the program where draws were tested on other scans than the first, or trained otherwise than the room.

    Patches fit the training scans, and so may differ.
    """

    def plain(found: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in found.items() if key != "patch"}))
        return kept

    first = next(iter(folds.values()))
    for number, fold in folds.items():
        if fold.groups != first.groups:
            raise SystemExit(
                f"draw {number}: expected the test patients of the first draw, got others. Remove its file."
            )
        found, expected = plain((fold.result or {})["recipe"]), plain(recipe)
        if found != expected:
            raise SystemExit(f"draw {number}: expected segmenters trained by {expected}, got {found}. Remove its file.")
