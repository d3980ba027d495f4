"""The folder of a run: whose it is, what may be continued in it, and where its model lies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen.data.dataset import Dataset
from medgen.planning import Plan, check_plan, read_plan, write_plan
from medgen.provenance import write_text
from medgen.types import BadInputError

PLAN, RUN, REJECTED = "plan.yaml", "run.json", "rejected.jsonl"
# All that a run leaves behind before its first training step.
_BEFORE_TRAINING = {PLAN, REJECTED, "cache"}
# Settings that change pace or memory of a run, or what its model is used with, but not what is learned.
_FREE = {
    "gradient_checkpointing",
    "checkpoint_every",
    "validate_every",
    "fingerprint",
    "guidance_scale",
    "temperature",
}
# The number format that `precision` comes to on a machine counts instead of its name.
_FREE_OF_PLAN = _FREE | {"precision"}
# Settings that runs which began before they existed do not record, with what holds for those.
_LATER = {"elastic": 0.0}
_SHOWN = 3


def model_folder(folder: Path) -> Path:
    """Where a run keeps its model, apart from the scans in its cache: this alone is to be shared.

    Args:
        folder: Run folder.

    Returns:
        Its subfolder.
    """
    return folder / "model"


def check_output(folder: Path) -> None:
    """Make sure that a run folder is there or can be made, and belongs to a run or to nobody.

    Args:
        folder: Run folder.

    Raises:
        BadInputError: If there is a file of that name, or a folder with other things.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise BadInputError(f"{place}: expected a folder, got a file. Choose another --output.")
            break
    if not folder.exists() or (folder / RUN).is_file():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in _BEFORE_TRAINING and not _is_stale(path))
    if others:
        raise BadInputError(
            f"{folder}: expected an empty or new folder, or one that medgen trained in, got one with other files "
            f"({', '.join(others[:_SHOWN])}). Choose another --output."
        )


def earlier_plan(folder: Path, dataset: Dataset) -> Plan | None:
    """Plan that a run, or a look at one with `--dry_run`, left in its folder.

    Args:
        folder: Run folder.
        dataset: The scans that it is to be followed on.

    Returns:
        The plan, or None where there is none.

    Raises:
        BadInputError: If the plan does not fit the scans; the message names what differs.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    plan = read_plan(path)
    try:
        check_plan(plan, dataset)
    except BadInputError as error:
        raise BadInputError(
            f"{path}: expected the plan that lies in the output folder to fit {dataset.root}, got one of other data, "
            f"or an edited one ({str(error).partition('. ')[0]}). For other data choose another --output."
        ) from error
    return plan


def learned_settings(plan: Plan) -> dict[str, Any]:
    """What of a plan decides what is learned.

    Args:
        plan: The plan.

    Returns:
        Its settings, without those that may change during a run.
    """

    def strip(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: strip(value) if isinstance(value, Mapping) else value
            for key, value in values.items()
            if key not in _FREE_OF_PLAN
        }

    return strip(dataclasses.asdict(plan))


def show_plan(folder: Path, plan: Plan) -> None:
    """Write a plan for the user to look at and edit; a run that has begun keeps its own.

    Args:
        folder: Run folder, see :func:`check_output`.
        plan: The plan.
    """
    path = folder / PLAN
    if (folder / RUN).is_file():
        print(f"nothing is written: a run has begun in {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(plan, path)
    print(f"written to {path}: edit it there if you like, and run the same command without --dry_run")


def claim_folder(folder: Path, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Take a folder for a run, new or continued: refuse another run's, clear what a kill left, and write the plan.

    Args:
        folder: Run folder, see :func:`check_output`.
        plan: What is followed; a plan that differs in pace only replaces the one that lies there.
        identity: What decides what is learned, as far as it is known yet.

    Raises:
        BadInputError: If another run has begun here.
    """
    check_output(folder)
    check_identity(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    path = folder / PLAN
    if not path.is_file() or read_plan(path) != plan:
        write_plan(plan, path)


def record_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note what this run is, or make sure that it is the one that began here.

    Args:
        folder: Run folder.
        identity: Everything that decides what is learned.

    Raises:
        BadInputError: If another run has begun here.
    """
    if not check_identity(folder, identity):
        write_text(folder / RUN, json.dumps(identity, indent=2) + "\n")


def check_identity(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Compare with the run that began in a folder.

    Args:
        folder: Run folder.
        identity: What decides what is learned; keys that it leaves out are not compared.

    Returns:
        Whether a run has begun there.

    Raises:
        BadInputError: If it was another one; the message names what differs.
    """
    path = folder / RUN
    if not path.is_file():
        return False
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before = _flat({key: earlier[key] for key in identity})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{path}: expected the record of a run, got a damaged file ({error}). Choose another --output."
        ) from error
    now = _flat(json.loads(json.dumps(identity)))
    # A setting that was not free when the run began is so now.
    before = {key: value for key, value in before.items() if not _is_free(key)}
    changes = [
        _change(key, before, now)
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _LATER.get(key.rpartition(".")[2], ...)) != now.get(key, ...)
    ]
    if changes:
        raise BadInputError(
            f"{folder}: expected the run that began here ({path.name}), got another: {_some(changes)}. Choose another "
            "--output to start over with it, or put back what differs to go on here."
        )
    return True


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; of scans there are only digests, which say nothing to people."""
    if key.startswith("data."):
        part, case = key.removeprefix("data.").split(".", 1)
        state = "is new" if key not in before else "is gone" if key not in now else "has changed"
        return f"{part} {case} {state}"
    return f"{key} is {now.get(key, 'absent')}, was {before.get(key, 'absent')}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_free(key: str) -> bool:
    return key.startswith("plan.") and key.rpartition(".")[2] in _FREE_OF_PLAN


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _is_stale(path: Path) -> bool:
    """Whether it was being written when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")
