"""The errors and the help of jsonargparse in medgen's words."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

# What the parser tried on the way, and whole values, which may be long.
_NOISE = re.compile(
    r"^[ -]*(Does not validate against any of the Union subtypes|Subtypes:|Errors:|Problem with given class_path|"
    r"Expected a <class 'NoneType'>|Given value type:|Given value:).*$|"
    r"^[ -]*Expected a path but .*\s* either not accessible or invalid",
    flags=re.MULTILINE,
)
_KEY = re.compile(r"(?:Parser|Configuration) key \"([^\"]+)\":")
_EXPECTED = re.compile(r"Expected (.*?)(?:\. Got value: (.*?))?(?:$| - (?=Expected ))")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "values by name such as {name: value}",
}
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
    reason = reason.replace("Expected a dot import path string: ", "Expected a YAML file or values. Got value: ")
    # Of a value that may be of several types there is one for each; a part that is wrong has its own value.
    found = _EXPECTED.findall(_plain_types(reason))
    if reason.startswith("Expected ") and found:
        given = re.search(r"^\s*Given value: (.*)$", message, flags=re.MULTILINE)
        got = next((value for _, value in found if value), given[1] if given else "")
        reason = "expected " + " or ".join(dict.fromkeys(kind for kind, _ in found))
        reason += f", got {got}" if 0 < len(got) <= _LONGEST_VALUE else ""
    if key and reason.startswith("the following arguments are required: "):
        reason = (
            f"expected a whole {key}, got one without {reason.partition(': ')[2]}. Values on the command line only "
            f"change single ones of a file: give it with --{key} FILE or --config FILE; --dry_run writes one"
        )
    return f"{key}: {reason}" if key else reason


def _plain_types(text: str) -> str:
    """It with `a number` for `a <class 'float'>`, `2 values` for a tuple and `one of [...]` for a `Literal`."""
    text = re.sub(r"(?:an? )?<class\s+'(?:\w+\.)*(\w+)'>", lambda found: _TYPES.get(found[1], found[1]), text)
    return re.sub(r"a tuple with (\d+) elements", r"\1 values", text).replace("a typing.Literal", "one of ")


def explain_function(function: Any) -> str:
    """What a command does, for the head of its help.

    Args:
        function: The function, with a docstring in Google style.

    Returns:
        The paragraphs of the docstring before its arguments, wrapped.
    """
    body = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
    paragraphs = [_without_quotes(paragraph) for paragraph in body.split("\n\n")]
    return "\n\n".join(textwrap.fill(paragraph, 78) for paragraph in paragraphs)


def explain_argument(text: str, hint: Any, default: Any, *, required: bool) -> str:
    """Help of one argument.

    Args:
        text: Its entry in the docstring.
        hint: Its type.
        default: Its value if it is not given.
        required: Whether it must be given.

    Returns:
        The text, and in brackets what may be given and what is taken otherwise, in words.
    """
    shown = default if isinstance(default, str) or not isinstance(default, Sequence) else ", ".join(map(str, default))
    notes = ["required"] if required else []
    notes += [words] if (words := _words(hint)) else []
    notes += [f"default: {shown}"] if not required and default is not None and default is not False else []
    return f"{_without_quotes(text)} ({'; '.join(notes)})" if notes else _without_quotes(text)


def plain_usage(text: str) -> str:
    """Help without what only a programmer needs: switches without a value, lists without brackets.

    Args:
        text: A whole help.

    Returns:
        It with `--dry_run` for `--dry_run {true,false}`, `--stages STAGES` for `--stages [ITEM,...]`, and likewise for
        choices, which the text lists.
    """
    text = re.sub(r", --\w+\+ \S+", "", text.replace(" {true,false}", ""))
    return re.sub(r"--(\w+) (\{[^ }]*\}|\[ITEM,\.\.\.\])", lambda found: f"--{found[1]} {found[1].upper()}", text)


def _words(hint: Any) -> str:
    """A type in words; nothing where the text says it all."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(_words, get_args(hint))), "")
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (list, tuple, Sequence):
        inner = _words(get_args(hint)[0])
        return f"some of {inner.removeprefix('one of ')}" if inner.startswith("one of ") else "several values"
    if is_dataclass(hint):
        return "a YAML file"
    return {int: "a whole number", float: "a number"}.get(hint, "")


def _without_quotes(text: str) -> str:
    return " ".join(text.replace("`", "").split())
