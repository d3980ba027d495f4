"""The README is true: its commands are accepted, its files exist, its Python runs."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import medgen
from medgen import cli

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


BENCHMARK = r"`python (benchmarks/\w+\.py)([^`]*)`"
COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
MEDGEN_LINES = [line for line in COMMANDS if line.startswith("medgen ")]


def test_the_two_commands_are_there_once_and_as_promised() -> None:
    assert [line for line in COMMANDS if line.startswith("python ")] == [
        "python -m pip install -e . && medgen synthesize --output out",
        'python -m pip install -e ".[test]" && pytest',
    ]


def test_every_subcommand_is_shown() -> None:
    assert {line.split()[1] for line in MEDGEN_LINES} == set(cli.COMMANDS)


@pytest.mark.parametrize("line", MEDGEN_LINES)
def test_command_is_accepted(line: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    _, name, *words = shlex.split(line)
    values = cli.parse(name, words)
    assert values["output"]


def test_every_option_named_in_the_text_exists() -> None:
    known = {key for name in cli.COMMANDS for key in cli._keys(cli._function(name))} | {"config", "help"}
    text = re.sub(BENCHMARK, "", README)
    assert set(re.findall(r"--([a-z_]+)", text)) <= known


def test_every_option_of_a_benchmark_exists(repository: Path) -> None:
    found = re.findall(BENCHMARK, README)
    assert len(found) >= 8
    for script, words in found:
        tree = ast.parse((repository / script).read_text(encoding="utf-8"))
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        known = {argument.arg for argument in (*main.args.args, *main.args.kwonlyargs)}
        assert set(re.findall(r"--([a-z_]+)", words)) <= known


def test_every_file_named_in_the_text_exists(repository: Path) -> None:
    named = re.findall(r"(?:configs|examples|benchmarks|medgen/pretrained)/[\w./-]*", README)
    missing = [path for path in named if not (repository / path).exists()]
    assert not missing


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), {"__name__": "readme"})
    assert "hippocamp" in capsys.readouterr().out.lower() or list(tmp_path.iterdir())


def test_python_blocks_use_public_names_only() -> None:
    imported = re.findall(r"^from medgen import (.*)$", README, flags=re.M)
    assert imported
    assert {name.strip() for line in imported for name in line.split(",")} <= set(medgen.__all__)
