"""Tables of metadata, CSV or JSON lines: the list of cases, or what is known of cases that are listed elsewhere."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medgen.data.case import Case, stem
from medgen.types import BadInputError

_ID_COLUMNS = ("id", "case", "case_id")
_IMAGE_COLUMNS = ("image", "file_name", "images", "path")
_LABEL_COLUMNS = ("label", "mask", "segmentation")
TEXT_COLUMNS = ("text", "caption", "report")
_GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id")


def find_metadata(root: Path) -> Path | None:
    """The table of metadata in a folder.

    Args:
        root: The folder.

    Returns:
        ``metadata.csv`` or ``metadata.jsonl``; None where it has neither.

    Raises:
        BadInputError: If it has both.
    """
    found = [root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()]
    if len(found) > 1:
        raise BadInputError(f"{root}: expected metadata.csv or metadata.jsonl, got both. Remove one of them.")
    return found[0] if found else None


def read_metadata(path: Path) -> list[Case]:
    """The cases that a table lists.

    Args:
        path: The table; images and label maps are named relative to its folder.

    Returns:
        One case a row.

    Raises:
        BadInputError: If it cannot be read, has no rows, or does not name the image of each.
    """
    root = path.parent
    cases = []
    for line, row in _rows(path):
        values = _filled(row)
        image_key = _first(row, _IMAGE_COLUMNS)
        if image_key is None:
            raise BadInputError(
                f"{path}: expected a column named {' or '.join(_IMAGE_COLUMNS)}, got {', '.join(map(str, row))}. "
                "Rename the column that names the image file."
            )
        image = values.get(image_key)
        if image is None:
            raise BadInputError(f"{path}, line {line}: expected a file in {image_key}, got nothing. Fill it in.")
        images = image if isinstance(image, list) else str(image).split(";")
        label_key, id_key = _first(values, _LABEL_COLUMNS), _first(values, _ID_COLUMNS)
        name = "_".join(part for part in Path(stem(str(images[0]))).parts if part not in ("/", ".", ".."))
        case = Case(
            case=str(values[id_key]) if id_key else name.removeprefix("images_"),
            images=tuple(root / str(part).strip() for part in images),
            label=root / str(values[label_key]) if label_key else None,
        )
        cases.append(_with_facts(case, row))
    if not cases:
        raise BadInputError(f"{path}: expected at least one row, got none. List the scans in it.")
    return _with_all_columns(cases)


def with_metadata(cases: Sequence[Case], path: Path) -> list[Case]:
    """Cases with the texts, groups, splits and further columns that a table has for them.

    Args:
        cases: Cases that are listed elsewhere, which says where their files are.
        path: A table with a column of their identifiers. Cases may be missing in it.

    Returns:
        The cases, in their order; a split that they have already stays.

    Raises:
        BadInputError: If it cannot be read, has no such column, or names a case twice or one that is not there.
    """
    known = {case.case: case for case in cases}
    told: dict[str, Case] = {}
    for line, row in _rows(path):
        key = _first(row, _ID_COLUMNS)
        if key is None:
            raise BadInputError(
                f"{path}: expected a column named {' or '.join(_ID_COLUMNS)} with the cases of dataset.json beside it, "
                f"got {', '.join(map(str, row))}. Rename the column, or the file if it is about something else."
            )
        name = str(row[key]).strip()
        if name not in known or name in told:
            raise BadInputError(
                f"{path}, line {line}: expected a case of dataset.json beside it in {key}, such as {cases[0].case}, "
                f"each at most once, got {name!r}{' again' if name in told else ''}. Correct or remove the row."
            )
        told[name] = _with_facts(known[name], row)
    return _with_all_columns([told.get(case.case, case) for case in cases])


def text_columns(cases: Iterable[Case]) -> dict[str, int]:
    """Which columns of a table the texts of cases come from: of each case the first that is filled.

    Args:
        cases: Of one data set.

    Returns:
        Number of cases by column.
    """
    found = Counter(_first(_filled(case.meta), TEXT_COLUMNS) for case in cases if case.text)
    return {column: found[column] for column in TEXT_COLUMNS if found[column]}


def _with_facts(case: Case, row: Mapping[str, Any]) -> Case:
    """A case with what a row says of it besides its files."""
    values = _filled(row)
    text_key, group_key, split = _first(values, TEXT_COLUMNS), _first(values, _GROUP_COLUMNS), values.get("split")
    taken = {*(_first(row, names) for names in (_IMAGE_COLUMNS, _LABEL_COLUMNS, _ID_COLUMNS)), "split"}
    return replace(
        case,
        split=case.split or (str(split).strip().lower() if split else None),
        group=str(values[group_key]) if group_key else None,
        text=str(values[text_key]) if text_key else None,
        meta={str(key): str(values.get(key, "")) for key in row if key not in taken},
    )


def _with_all_columns(cases: list[Case]) -> list[Case]:
    """The same columns for every case: a line of JSON may leave one out, and a case may have no row."""
    for name in {name for case in cases for name in case.meta}:
        for case in cases:
            case.meta.setdefault(name, "")
    return cases


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value not in (None, "", [])}


def _first(columns: Iterable[str], wanted: Sequence[str]) -> str | None:
    present = set(columns)
    return next((name for name in wanted if name in present), None)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row of a CSV or JSON lines file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    if None in row or None in row.values():
                        raise BadInputError(
                            f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns as in "
                            "the header, got another number. Quote values that contain commas."
                        )
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise BadInputError(
                            f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}. Fix it."
                        )
                    yield number, record
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = "CSV" if path.suffix == ".csv" else "one JSON object per line"
        raise BadInputError(f"{path}: expected {kind} in UTF-8, got an error: {error}. Correct the file.") from error
