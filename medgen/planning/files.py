"""Plans as YAML files: written with a comment for each key, and read back."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import yaml

from medgen.messages import explain_parser_error
from medgen.planning.plan import Plan
from medgen.provenance import write_text
from medgen.types import BadInputError


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Args:
        path: YAML file whose key `plan` holds it: `plan.yaml` of a run, or a configuration of `medgen train`, of
            which everything else is passed over.

    Returns:
        The plan.

    Raises:
        BadInputError: If the file is missing or no YAML, or has a key or a value that a plan cannot have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"{path}: expected a YAML file with a training plan, got: {reason}. Correct it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("plan"), dict):
        raise BadInputError(
            f"{path}: expected the key `plan` with a training plan, got none. Write one with --dry_run."
        )
    for key, known in _unknown_keys(content["plan"], Plan):
        close = get_close_matches(key.rpartition(".")[2], known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known here: {', '.join(known)}."
        raise BadInputError(f"{path}: expected keys of a training plan, got the unknown key '{key}'. {hint}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan, "plan")
    try:
        # The same parser as for the command line, so that both read `1e-4` and `[1, 2]` alike.
        parsed = parser.parse_string(yaml.safe_dump({"plan": content["plan"]}))
        plan = parser.instantiate_classes(parsed).plan
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: {explain_parser_error(str(error))}. Correct it.") from error
    return plan


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys that the dataclass does not have, each with those that it has."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            yield f"{prefix}{key}", list(hints)
            continue
        inner = next((t for t in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(t)), None)
        if get_origin(hints[key]) is dict:  # its keys are the user's
            continue
        if inner is not None and isinstance(value, dict):
            yield from _unknown_keys(value, inner, f"{prefix}{key}.")  # type: ignore[arg-type]


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as a YAML file for people: each key has a comment.

    Args:
        plan: The plan.
        path: The file; its folder must be there. It appears whole or not at all.
    """
    lines = [
        "# What `medgen train` does, and how. Before the training, edit it here; once it has begun, pass an edited",
        "# copy to a new folder: medgen train --config COPY --data FOLDER --output NEW_FOLDER",
        "plan:",
        *_yaml_lines(plan, "  ", set()),
    ]
    write_text(Path(path), "\n".join(lines) + "\n")


def _yaml_lines(values: Any, indent: str, explained: set[type]) -> Iterator[str]:
    """Lines of a dataclass; each field's comment is its entry in the docstring, once per class."""
    comments: dict[str, str] = {}
    for kind in set(type(values).__mro__) - explained:
        parsed = docstring_parser.parse(kind.__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)
        # Among all entries: docstring-parser counts attributes as parameters, its fork does not.
        documented = [entry for entry in parsed.meta if hasattr(entry, "arg_name")]
        comments |= {entry.arg_name: _in_yaml_words(entry.description or "") for entry in documented}
    explained.update(type(values).__mro__)
    for entry in dataclasses.fields(values):
        value, comment = getattr(values, entry.name), comments.get(entry.name, "")
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and entry.name == "fingerprint"):
            yield from ("", *_comment(comment, indent)) if comment else ()
            yield f"{indent}{entry.name}:" + ("" if value else " {}")
            if isinstance(value, dict):
                text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
                yield from (f"{indent}  {line}" for line in text.splitlines() if value)
            else:
                yield from _yaml_lines(value, indent + "  ", explained)
            continue
        line = f"{indent}{entry.name}: {_scalar(value)}"
        if comment and len(f"{line:<44}") + len(comment) + 4 > 120:
            yield from _comment(comment, indent)
            comment = ""
        yield f"{line:<44}  # {comment}" if comment else line


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, 118, initial_indent=start, subsequent_indent=start)


def _in_yaml_words(text: str) -> str:
    for python, plain in (("None", "null"), ("False", "false"), ("True", "true")):
        text = re.sub(rf"\b{python}\b", plain, text)
    return " ".join(text.replace("``", "`").split())


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(value, dict):
        plain = {key: _plain(entry) if dataclasses.is_dataclass(entry) else entry for key, entry in value.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _plain(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, as YAML writes them."""
    own = {
        entry.name: getattr(value, entry.name)
        for entry in dataclasses.fields(value)
        if getattr(value, entry.name) != entry.default
    }
    return {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in own.items()}
