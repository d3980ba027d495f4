"""The errors of jsonargparse in medgen's words."""

from __future__ import annotations

import re

# What the parser tried on the way, and whole values, which may be long.
_NOISE = re.compile(
    r"^[ -]*(Does not validate against any of the Union subtypes|Subtypes:|Errors:|Problem with given class_path|"
    r"Expected a <class 'NoneType'>|Given value type:|Given value:).*$|"
    r"^[ -]*Expected a path but .*\s* either not accessible or invalid",
    flags=re.MULTILINE,
)
_KEY = re.compile(r"(?:Parser|Configuration) key \"([^\"]+)\":")
# Longer values are whole sections.
_LONGEST_VALUE = 80


def explain_parser_error(message: str) -> str:
    """One line out of an error of several: the dotted key, what was expected there, and what it got.

    Args:
        message: The error's text.

    Returns:
        As `plan.denoiser.steps: expected int, got many`, without a full stop.
    """
    text = _NOISE.sub("", message)
    key = ".".join(_KEY.findall(text))
    reason = " ".join(_KEY.sub("", text).split()).lstrip("- ").rstrip(".")
    reason = re.sub(r"Expected (?:an? )?(.*?)\. Got value: ", r"expected \1, got ", plain_types(reason))
    reason = re.sub(r"Expected a dot import path string: ", "expected a YAML file or values, got ", reason)
    reason = re.sub(r"^Expected an? ", "expected ", reason)
    given = re.search(r"^\s*Given value: (.*)$", message, flags=re.MULTILINE)
    if reason.startswith("expected ") and "got" not in reason and given and len(given[1]) <= _LONGEST_VALUE:
        reason = f"{reason}, got {given[1]}"
    return f"{key}: {reason}" if key else reason


def plain_types(text: str) -> str:
    """A text of jsonargparse with types as people write them.

    Args:
        text: The text.

    Returns:
        It with `int` for `<class 'int'>` and `one of [...]` for a `Literal`.
    """
    return re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
