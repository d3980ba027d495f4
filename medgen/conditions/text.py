"""Texts that steer a sample: filled from the columns of a data set, or read from the command line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from medgen.types import BadInputError

_OPTIONAL = re.compile(r"(\[[^\[\]]*\])")
_COLUMN = re.compile(r"\{([^{}]+)\}")
_PROMPT_COLUMNS = ("text", "prompt")


def fill_template(template: str, row: Mapping[str, str], *, columns: Collection[str] | None = None) -> str:
    """Text of one scan from the columns of its metadata.

    ``{view}`` stands for the value of the column ``view``. Square brackets mark a clause that is left out where one of
    its columns is empty: ``Chest X-ray[, {view} view].[ Finding: {finding}.]`` gives ``Chest X-ray, AP view.`` for a
    scan without a finding. Brackets do not nest. Runs of white space become one space.

    Args:
        template: The text with its columns.
        row: Values of one scan by column.
        columns: Columns of the whole data set, of which ``row`` may lack those that are empty; None for those of
            ``row``.

    Returns:
        The text; empty where every clause is left out, which means that this scan has no text.

    Raises:
        BadInputError: If the brackets do not match, a column is unknown, or one outside of brackets is empty.
    """
    known = set(row) | set(columns or ())
    text = ""
    for part in _OPTIONAL.split(template):
        optional = _OPTIONAL.fullmatch(part) is not None
        clause = part[1:-1] if optional else part
        stray = re.search(r"[\[\]{}]", _COLUMN.sub("", clause))
        if stray:
            raise BadInputError(
                f"template {template!r}: expected {{column}} and [optional clause], got a lone {stray[0]!r}. Close "
                "every bracket, and put none inside another."
            )
        names = _COLUMN.findall(clause)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise BadInputError(
                f"template {template!r}: expected columns among {', '.join(sorted(known)) or 'none'}, got "
                f"{', '.join(unknown)}. Correct the name."
            )
        empty = [name for name in names if not (row.get(name) or "").strip()]
        if empty and not optional:
            raise BadInputError(
                f"template {template!r}: expected a value in column {empty[0]}, got none. Put what is to be left out "
                "without it in square brackets."
            )
        if not empty:
            text += _COLUMN.sub(lambda match: row[match[1]], clause)
    return " ".join(text.split())


def read_prompts(value: str) -> list[str]:
    """Prompts from the command line.

    Args:
        value: A ``.txt`` file with one prompt a line, a ``.csv`` file with a column ``text`` or ``prompt``, both in
            UTF-8, or else the prompt itself.

    Returns:
        At least one prompt, without white space at its ends.

    Raises:
        BadInputError: If the file is missing, empty or of another kind, or a prompt is empty.
    """
    ending = Path(value).suffix.lower()
    if ending not in (".txt", ".csv"):
        if os.path.exists(value):
            raise BadInputError(
                f"{value}: expected a .txt or .csv file, or the prompt itself, got the name of another "
                f"{'folder' if os.path.isdir(value) else 'file'}. Put the prompts in a .txt file, one a line."
            )
        return [_checked(value, "prompts")]
    path = Path(value)
    if not path.is_file():
        raise BadInputError(f"{path}: expected a file of prompts, got none there. Check the path.")
    try:
        rows = _lines(path) if ending == ".txt" else _cells(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: expected text in UTF-8, got an error: {error}. Save it again.") from error
    if not rows:
        raise BadInputError(f"{path}: expected at least one prompt, got none. Leave it out for scans without text.")
    return [_checked(text, f"{path}, line {line}") for line, text in rows]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of each line, without empty ones at the end."""
    text = path.read_text(encoding="utf-8-sig").rstrip()
    return list(enumerate(text.split("\n"), start=1)) if text else []


def _cells(path: Path) -> list[tuple[int, str]]:
    """Line number and prompt of each row."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        header = list(reader.fieldnames or [])
        found = [name for name in _PROMPT_COLUMNS if name in header]
        if len(found) != 1:
            raise BadInputError(
                f"{path}: expected one column named {' or '.join(_PROMPT_COLUMNS)}, got "
                f"{', '.join(header) or 'an empty file'}. Name the column of the prompts so."
            )
        rows = []
        for row in reader:
            if None in row:
                raise BadInputError(
                    f"{path}, line {reader.line_num}: expected {len(header)} columns as in the header, got more. Quote "
                    "prompts that contain commas."
                )
            rows.append((reader.line_num, row[found[0]] or ""))
        return rows


def _checked(text: str, where: str) -> str:
    """The prompt, unless nothing is in it."""
    if not text.strip():
        raise BadInputError(f"{where}: expected a prompt, got an empty one. Leave prompts out for scans without text.")
    return text.strip()
