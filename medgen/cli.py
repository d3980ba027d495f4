"""The command line: every subcommand is the signature and docstring of one public function."""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin, get_type_hints

import medgen
from medgen.messages import explain_argument, explain_function, explain_parser_error, plain_usage

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """What the command line adds to a public function.

    Attributes:
        module: Where the function lives; imported only when the command runs.
        summary: One line for ``medgen --help``.
        examples: Command lines that end ``medgen COMMAND --help``.
        lower: Which setting to lower when memory runs out.
        resume: How to go on after an interruption.
        function: Name of the function, where the command's own is taken in Python.
    """

    module: str
    summary: str
    examples: str
    lower: str
    resume: str
    function: str = ""


COMMANDS = {
    "train": Command(
        module="medgen.training",
        summary="labelled scans in, a generator out",
        examples=(
            "  medgen train --data FOLDER --output runs/mine --dry_run\n"
            "  medgen train --data FOLDER --output runs/mine\n"
            "  medgen train --config configs/hippocampus_3d.yaml"
        ),
        lower="In the plan, lower batch_size or patch_size of the stage that ran, for another --output.",
        resume="Run the same command again: it continues from the last checkpoint.",
    ),
    "synthesize": Command(
        module="medgen.synthesis",
        summary="labelled synthetic scans out of a generator, as an nnU-Net data set",
        examples=(
            "  medgen synthesize --output out\n"
            "  medgen synthesize --model runs/mine --labels FOLDER --output synthetic --num_samples 200\n"
            "  medgen synthesize --model runs/mine --prompts prompts.txt --labels FOLDER --output synthetic\n"
            "  medgen synthesize --model runs/mine --conditions conditions.csv --output synthetic\n"
            "  medgen synthesize --model runs/mine --sources FOLDER/images --strength 0.4 --output variants\n"
            "  medgen synthesize --model runs/mine --sources FOLDER/images --source_labels FOLDER/labels "
            "--labels changed --output edited\n"
            "  medgen synthesize --replay out/manifest.jsonl --output again\n"
            "  medgen synthesize --replay synthetic/manifest.jsonl --model runs/mine --labels FOLDER"
        ),
        lower="Lower --batch_size, or give --max_memory_gb so that scans are decoded by tiles.",
        resume="Run the same command again: finished scans are kept.",
    ),
    "filter": Command(
        module="medgen.filtering",
        summary="labelled scans accepted, or rejected with reasons, by gates that are fitted on real scans",
        examples=(
            "  medgen filter --input synthetic --reference FOLDER --output accepted\n"
            "  medgen filter --input other --reference accepted_gates --output accepted_too"
        ),
        lower="Filter on the CPU (--device cpu), or fewer scans at a time.",
        resume="Run the same command again: trained segmenters and judged scans are kept.",
        function="filter_pairs",
    ),
    "evaluate": Command(
        module="medgen.evaluation",
        summary="how real the synthetic scans look, and how diverse they are",
        examples="  medgen evaluate --real FOLDER --synthetic synthetic --output report",
        lower="Lower --slices_per_plane, or evaluate fewer scans.",
        resume="Run the same command again: what was computed of each scan is kept.",
    ),
    "utility": Command(
        module="medgen.trial",
        summary="whether training on synthetic scans helps, with controls",
        examples=(
            "  medgen utility --real FOLDER --synthetic accepted --output utility\n"
            "  medgen utility --real FOLDER --output room"
        ),
        lower="Use fewer synthetic scans.",
        resume="Run the same command again: finished trainings are kept.",
    ),
    "predict": Command(
        module="medgen.test_time",
        summary="segment scans with generative test-time augmentation, and say how sure it is",
        examples=(
            "  medgen predict --model runs/mine --segmenter seg.ts --input scans --output predictions\n"
            "  medgen predict --model hippocampus-mr-3d --segmenter bundle --input scans --output predictions"
        ),
        lower="Lower --view_batch, or give --patch_size.",
        resume="Run the same command again: finished scans are kept.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``medgen`` command.

    Args:
        argv: Arguments after the program's name; None reads them from the command line.

    Returns:
        Exit code: 0 done, 1 out of memory or disk, 2 bad input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _root_parser().parse_args(arguments[:1]).command
    _calm_progress_bars()
    try:
        with _notes():
            return _run(name, arguments[1:])
    except KeyboardInterrupt:
        print(f"\nmedgen {name}: stopped. {COMMANDS[name].resume}", file=sys.stderr)
        return 130


def command_parser(name: str) -> ArgumentParser:
    """Parser of one command, built from the signature and docstring of its function.

    Args:
        name: Key of ``COMMANDS``.

    Returns:
        A parser that also reads ``--config FILE`` and knows no other keys than the function's arguments.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    function = _function(name)
    hints = get_type_hints(function)

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        # argparse names no public method to change how one argument is explained.
        def _get_help_string(self, action: argparse.Action) -> str:
            if action.dest not in hints:
                return str(super()._get_help_string(action))
            return explain_argument(action.help or "", hints[action.dest], action.default, required=action.required)

        def format_help(self) -> str:
            return plain_usage(super().format_help())

    parser = ArgumentParser(
        prog=f"medgen {name}",
        description=explain_function(function),
        epilog=f"examples:\n{COMMANDS[name].examples}",
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with values for the arguments below.")
    parser.add_function_arguments(function, as_group=False, sub_configs=True)
    return parser


def parse(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Turn the words of a command line into the keyword arguments of the command's function.

    Args:
        name: Key of ``COMMANDS``.
        arguments: Words after the command's name.

    Returns:
        Keyword arguments, nested dataclasses built.

    Raises:
        argparse.ArgumentError: If a key is unknown, missing or has a value that cannot be used.
        BadInputError: If a file that is named for a nested argument holds nothing of it.
    """
    parser = command_parser(name)
    function = _function(name)
    given = _join_lists(function, _leave_out(function, _open_files(function, arguments)))
    words = parser.parse_args(_spell_out_flags(function, given))
    try:
        values = parser.instantiate(words).as_dict()
    except ValueError as error:  # a dataclass that refuses its values
        raise argparse.ArgumentError(None, str(error)) from error
    values.pop("config", None)
    return values


def _root_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="medgen",
        usage="medgen COMMAND [--help] [arguments]",
        description=f"{(medgen.__doc__ or '').splitlines()[0]}\n\ncommands:\n{listing}",
        epilog="`medgen COMMAND --help` explains each argument. Start with: medgen synthesize --output out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medgen {medgen.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _run(name: str, arguments: Sequence[str]) -> int:
    from medgen.types import BadInputError

    command = COMMANDS[name]
    try:
        _function(name)(**parse(name, arguments))
    except argparse.ArgumentError as error:
        return _fail(name, _explain(name, arguments, str(error)), code=2)
    except BadInputError as error:
        return _fail(name, str(error), code=2)
    except (MemoryError, RuntimeError) as error:
        from medgen.precision import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        if type(error) is MemoryError and error.args:  # training says itself which stage it was and what to change
            return _fail(name, f"out of memory. {error}")
        return _fail(name, f"out of memory. {command.lower} ({str(error).splitlines()[0] if str(error) else 'CPU'})")
    except OSError as error:
        # Only what the machine is to blame for; any other OSError is a defect and keeps its traceback.
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}:
            raise
        return _fail(name, f"{error.filename or 'output'}: {error.strerror}. {command.resume}")
    return 0


def _calm_progress_bars() -> None:
    """Let bars that go to a file, where each step would be a line for good, report every half minute."""
    if not sys.stderr.isatty():
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):  # read by tqdm as it is imported
            os.environ.setdefault(name, "30")


@contextmanager
def _notes() -> Iterator[None]:
    """Print medgen's own warnings as plain lines, without the place in the code that Python names with each."""
    package, show_warning = Path(medgen.__file__).parent, warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category is not UserWarning or not Path(filename).is_relative_to(package):
            show_warning(message, category, filename, lineno, file, line)
            return
        from tqdm import tqdm

        tqdm.write(f"note: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _function(name: str) -> Any:
    command = COMMANDS[name]
    return getattr(import_module(command.module), command.function or name)


def _spell_out_flags(function: Any, arguments: Sequence[str]) -> list[str]:
    """Let ``--dry_run`` stand for ``--dry_run=true``."""
    flags = {f"--{key}" for key, value in inspect.signature(function).parameters.items() if value.default is False}
    following = [*arguments[1:], "--"][: len(arguments)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _join_lists(function: Any, arguments: Sequence[str]) -> list[str]:
    """Let ``--stages denoiser,label`` and ``--stages denoiser label`` stand for ``--stages [denoiser,label]``."""
    lists = {f"--{key}" for key, hint in _arguments(function) if _is_list(hint)}
    words: list[str] = []
    pending = [part for word in arguments for part in (word.split("=", 1) if word.split("=")[0] in lists else [word])]
    while pending:
        words.append(pending.pop(0))
        if words[-1] not in lists:
            continue
        items = []
        while pending and not pending[0].startswith("--"):
            items.append(pending.pop(0))
        if len(items) > 1 or (items and items[0][:1] != "[" and items[0].lower() not in ("null", "true", "false")):
            items = [f"[{','.join(part for item in items for part in item.split(',') if part)}]"]
        words += items
    return words


def _is_list(hint: Any) -> bool:
    """Whether a value is a list, or may be one."""
    return any(get_origin(kind) in (list, tuple, Sequence) for kind in (hint, *get_args(hint)))


def _open_files(function: Any, arguments: Sequence[str]) -> list[str]:
    """Let ``--plan FILE`` name a file that holds the plan under its own key, as `plan.yaml` and configurations do.

    A file that holds the values at its top is left to the parser, and so is one that it cannot read.
    """
    nested = {f"--{key}": kind for key, hint in get_type_hints(function).items() for kind in _dataclasses(hint)}
    words = [part for word in arguments for part in (word.split("=", 1) if word.split("=")[0] in nested else [word])]
    for index, (option, value) in enumerate(pairwise(words), start=1):
        if option in nested and value.endswith((".yaml", ".yml")) and Path(value).is_file():
            words[index] = _values_in(Path(value), option[2:], nested[option])
    return words


def _leave_out(function: Any, arguments: Sequence[str]) -> list[str]:
    """Let ``--plan.denoiser.conditions.edge null``, and any such key, leave out what a file gives.

    The parser knows no null so deep on a line, but does in a file.
    """
    optional = {f"--{key}" for key, hint in _arguments(function) if "." in key and type(None) in get_args(hint)}
    words = [part for word in arguments for part in (word.split("=", 1) if word.split("=")[0] in optional else [word])]
    for index, (option, value) in enumerate(pairwise(words), start=1):
        if option in optional and value.lower() == "null":
            left_out: Any = None
            for key in reversed(option[2:].split(".")):
                left_out = {key: left_out}
            words[index - 1 : index + 1] = ["--config", json.dumps(left_out)]
    return words


def _values_in(file: Path, key: str, kind: type) -> str:
    import yaml

    from medgen.types import BadInputError

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        return str(file)
    if isinstance(content, dict) and isinstance(content.get(key), dict):
        return str(yaml.safe_dump(content[key], default_flow_style=True, width=10**9))
    if not isinstance(content, dict) or not {field.name for field in fields(kind)} & set(content):
        raise BadInputError(f"{file}: expected the key `{key}` with values below it, got none. Give another file.")
    return str(file)


def _dataclasses(hint: Any) -> list[type]:
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]


def _explain(name: str, arguments: Sequence[str], message: str) -> str:
    """One line out of the parser's message, with the file it came from and the key that may have been meant."""
    words = [part for word in arguments for part in word.split("=", 1)]
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            return f"{file}: expected a YAML file, got no such file. See `medgen {name} --help`."
    unknown = re.search(r"[Oo]ption '([^']+)' is not accepted|accept option '([^']+)'|arguments: --([\w.-]+)", message)
    wrong = re.search(r'key "(\w+)', message)
    given = dict(zip(words, [*words[1:], ""][: len(words)], strict=True))
    from_line = "arguments: " in message or (wrong and any(word.startswith(f"--{wrong[1]}.") for word in words))
    value = given.get(f"--{wrong[1]}" if wrong else "", "".join(files[-1:]))
    source = f"{value}: " if value in files and not from_line else ""
    if unknown:
        key = next(filter(None, unknown.groups()))
        close = get_close_matches(key.rpartition(".")[2].replace("-", "_"), _keys(_function(name)), n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"See `medgen {name} --help`."
        return f"{source}unknown key '{key}'. {hint}"
    return f"{source}{explain_parser_error(message)}. See `medgen {name} --help`."


def _keys(function: Any) -> list[str]:
    """Names of the function's arguments, and of the fields of every dataclass below them."""
    return [key.rpartition(".")[2] for key, _ in _arguments(function)]


def _arguments(function: Any) -> list[tuple[str, Any]]:
    """Arguments of the function and fields of every dataclass below them, by dotted key, each with its type."""
    found, pending = [], [(key, hint) for key, hint in get_type_hints(function).items() if key != "return"]
    while pending:
        key, hint = pending.pop()
        found.append((key, hint))
        for kind in _dataclasses(hint):
            pending += [(f"{key}.{inner}", type_) for inner, type_ in get_type_hints(kind).items()]
    return found


def _fail(name: str, message: str, code: int = 1) -> int:
    print(f"medgen {name}: {' '.join(message.split())}", file=sys.stderr)
    return code
