"""The command line, in process where it can be, in a process of its own where exit codes and streams matter."""

from __future__ import annotations

import argparse
import errno
import inspect
import re
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from medgen import cli
from medgen.types import BadInputError


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        batch_size: Scans a step.
    """

    batch_size: int = 4


@dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        size: Voxels per axis.
        denoiser: A stage.
    """

    size: tuple[int, ...] = (32, 32)
    denoiser: Stage = field(default_factory=Stage)

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size: expected at least 1 voxel per axis, got {self.size}.")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Gives `medgen train` a small function in place of training; the list fills with what it was called with.

    A value in `calls` beforehand is an error that the function raises.
    """
    received: list[dict[str, object]] = []

    def train(
        data: Path,
        output: Path,
        *,
        plan: Plan | None = None,
        dry_run: bool = False,
        stages: tuple[Literal["autoencoder", "denoiser"], ...] = ("autoencoder", "denoiser"),
        device: Literal["auto", "cpu"] = "auto",
        seed: int = 0,
        scale: float | dict[str, float] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        kind: Literal["a", "b"] | None = None,
    ) -> None:
        """Learn from a folder.

        Args:
            data: Folder of labelled scans.
            output: Folder of the run.
            plan: What to follow.
            dry_run: Only show the plan.
            stages: What to train.
            device: Where.
            seed: Root of all random draws.
            scale: For all, or by name.
            interval: From and to.
            kind: Which.
        """
        if received and "raise" in received[0]:
            raise received.pop()["raise"]
        received.append(
            {"data": data, "output": output, "plan": plan, "dry_run": dry_run, "stages": stages, "seed": seed}
        )

    module = types.ModuleType("stand_in")
    module.train = train
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(module="stand_in"))
    return received


REQUIRED = ["train", "--data", "scans", "--output", "run"]


def test_arguments_reach_the_function_with_their_types(calls: list[dict[str, object]]) -> None:
    assert cli.main([*REQUIRED, "--stages", "[denoiser]", "--seed", "3", "--plan.denoiser.batch_size", "2"]) == 0
    assert calls == [
        {
            "data": Path("scans"),
            "output": Path("run"),
            "plan": Plan(denoiser=Stage(batch_size=2)),
            "dry_run": False,
            "stages": ("denoiser",),
            "seed": 3,
        }
    ]


@pytest.mark.parametrize(
    "words", [["--dry_run"], ["--dry_run", "--seed", "1"], ["--dry_run", "true"], ["--dry_run=true"]]
)
def test_a_switch_needs_no_value(words: list[str], calls: list[dict[str, object]]) -> None:
    assert cli.main([*REQUIRED, *words]) == 0
    assert calls[0]["dry_run"] is True


def test_a_config_file_fills_the_arguments_and_the_line_overrides_it(
    calls: list[dict[str, object]], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: a\noutput: b\nseed: 5\nplan: {size: [8, 8, 8], denoiser: {batch_size: 1}}\n")
    assert cli.main(["train", "--config", str(config), "--output", "c"]) == 0
    assert (calls[0]["data"], calls[0]["output"], calls[0]["seed"]) == (Path("a"), Path("c"), 5)
    assert calls[0]["plan"] == Plan(size=(8, 8, 8), denoiser=Stage(batch_size=1))


@pytest.mark.parametrize("text", ["size: [8, 8]\n", "plan: {size: [8, 8]}\n", "data: a\nplan:\n  size: [8, 8]\n"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_plan_is_read_from_a_file_and_the_line_overrides_it(
    text: str, joined: bool, calls: list[dict[str, object]], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    words = [f"--plan={plan}"] if joined else ["--plan", str(plan)]
    assert cli.main([*REQUIRED, *words, "--plan.denoiser.batch_size", "2"]) == 0
    assert calls[0]["plan"] == Plan(size=(8, 8), denoiser=Stage(batch_size=2))
    assert calls[0]["data"] == Path("scans")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("plan: {denoiser: {batch_size: many}}\n", "plan.denoiser.batch_size: expected a whole number, got many. See"),
        ("plan: {denoiser: {batchsize: 2}}\n", "unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("plan: {size: [0, 8]}\n", "size: expected at least 1 voxel per axis, got (0, 8)."),
        ("other: {0: 1}\n", "expected the key `plan` with values below it, got none."),
        ("[1, 2]\n", "expected the key `plan` with values below it, got none."),
        ("plan: [\n", "plan: Invalid content in sub-config file"),
    ],
)
def test_a_bad_plan_file_is_one_line_that_names_file_and_key(
    text: str, complaint: str, calls: list[dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    assert cli.main([*REQUIRED, "--plan", str(plan)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"medgen train: {plan}: {complaint}")
    assert message.count("\n") == 1
    assert len(message) < 500
    assert not calls


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dta: a\n", "unknown key 'dta'. Did you mean 'data'?"),
        ("plan: {denoiser: {batchsize: 2}}\n", "unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("seed: many\n", "seed: expected a whole number, got many."),
        ("plan: {denoiser: {batch_size: many}}\n", "plan.denoiser.batch_size: expected a whole number, got many. See"),
        ("plan: [\n", "Problems parsing config"),
        ("plan: {size: [0, 8]}\n", "size: expected at least 1 voxel per axis, got (0, 8)."),
    ],
)
def test_a_bad_config_file_is_one_line_that_names_file_and_key(
    text: str, complaint: str, calls: list[dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert cli.main([*REQUIRED, "--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"medgen train: {config}: ")
    assert complaint in message
    assert message.count("\n") == 1
    assert not calls


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--outptu", "x"], "medgen train: unknown key 'outptu'. Did you mean 'output'?"),
        (["--dry-run"], "medgen train: unknown key 'dry-run'. Did you mean 'dry_run'?"),
        (["--plan.denoiser.batchsize", "1"], "Did you mean 'batch_size'?"),
        (["--device", "gpu"], "device: expected one of ['auto', 'cpu'], got gpu."),
        (["--scale", "big"], "scale: expected a number or values by name such as {name: value}, got big. See"),
        (["--scale", "{mask: big}"], "scale: expected a number, got big. See"),
        (["--interval", "[1]"], "interval: expected 2 values, got [1]. See"),
        (["--interval", "[0, b]"], "interval: expected a number, got b. See"),
        (["--kind", "c"], "kind: expected one of ['a', 'b'], got c. See"),
        (["--config", "absent.yaml"], "absent.yaml: expected a YAML file, got no such file."),
        (["--plan", "3"], "medgen train: plan: expected a YAML file or values, got 3."),
        (["--plan", "absent.yaml"], "absent.yaml: expected a YAML file, got no such file."),
        (["stray"], "unrecognized arguments: stray. See `medgen train --help`."),
    ],
)
def test_a_bad_line_is_one_line_that_says_what_was_meant(
    words: list[str], complaint: str, calls: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*REQUIRED, *words]) == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1
    assert not calls


def test_a_plan_that_is_not_whole_says_what_it_lacks_and_where_one_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", "scans", "--output", "x"]
    assert cli.main([*command, "--plan.denoiser.steps", "60"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("medgen train: plan: expected a whole plan, got one without name, spatial_dims, ")
    assert "give it with --plan FILE or --config FILE; --dry_run writes one." in message
    (tmp_path / "plan.yaml").write_text("name: mine\nspatial_dims: 2\nchannel_names: {0: a}\nsize: [8, 8]\n")
    assert cli.main([*command, "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert "plan: expected a whole plan, got one without class_names. " in capsys.readouterr().err


def test_a_missing_argument_is_named(calls: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "scans"]) == 2
    assert "the following arguments are required: output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            BadInputError("a.nii: expected 1 channel, got 2.\nGive one."),
            2,
            "a.nii: expected 1 channel, got 2. Give one.",
        ),
        (KeyboardInterrupt(), 130, "stopped. Run the same command again: it continues from the last checkpoint."),
        (MemoryError(), 1, "out of memory. In the plan, lower batch_size"),
        (
            MemoryError("stage x: expected more. Lower y."),
            1,
            "medgen train: out of memory. stage x: expected more. Lower y.",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "lower batch_size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "lower batch_size"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/model.safetensors"),
            1,
            "run/model.safetensors: No space",
        ),
    ],
    ids=["bad input", "interrupt", "memory", "memory in a stage", "memory on the CPU", "memory on a GPU", "full disk"],
)
def test_a_foreseen_failure_is_one_line_with_its_exit_code(
    error: BaseException,
    code: int,
    line: str,
    calls: list[dict[str, object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls.append({"raise": error})
    assert cli.main(REQUIRED) == code
    message = capsys.readouterr().err
    assert line in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone"), TypeError("x")]
)
def test_a_defect_keeps_its_traceback(error: Exception, calls: list[dict[str, object]]) -> None:
    calls.append({"raise": error})
    with pytest.raises(type(error)):
        cli.main(REQUIRED)


def test_a_warning_of_medgen_is_a_plain_line_and_others_keep_their_place(
    calls: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(data: Path, output: Path) -> None:
        """Learn."""
        for file, kind in ((cli.__file__, UserWarning), (cli.__file__, RuntimeWarning), (__file__, UserWarning)):
            warnings.warn_explicit("some scans\n  are odd", kind, file, 7)

    monkeypatch.setattr(sys.modules["stand_in"], "train", train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert cli.main(REQUIRED) == 0
        assert warnings.showwarning is before
    assert capsys.readouterr().err == "note: some scans are odd\n"
    assert [(each.category, each.filename) for each in caught] == [
        (RuntimeWarning, cli.__file__),
        (UserWarning, __file__),
    ]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_argument_in_the_words_of_the_docstring(name: str) -> None:
    function = cli._function(name)
    text = " ".join(cli.command_parser(name).format_help().split())
    for argument in inspect.signature(function).parameters:
        described = re.search(rf"^ +{argument}: (\S+ \S+)", (function.__doc__ or "").replace("`", ""), flags=re.M)
        assert described, f"{name}: the docstring does not explain {argument}"
        shown = re.search(rf"--{argument}[ ,](?:(?! --\w+ ).)*?{re.escape(described[1])}", text)
        assert shown, f"medgen {name} --help: {argument}"
    assert " ".join(cli.COMMANDS[name].examples.split()) in text
    assert " ".join(function.__doc__.replace("`", "").partition("Args:")[0].split()) in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_in_words_and_holds_no_python(name: str) -> None:
    text = cli.command_parser(name).format_help()
    found = re.findall(
        r"%%|`|\bnull\b|Optional|Literal|Sequence|\bPath\b|\bbool\b|\bint\b|type:|\{true|ITEM|--\w+\+", text
    )
    assert not found


def test_help_says_what_may_be_given(calls: list[dict[str, object]]) -> None:
    text = " ".join(cli.command_parser("train").format_help().split())
    assert "--data DATA Folder of labelled scans. (required)" in text
    assert "--plan PLAN What to follow. (a YAML file)" in text
    assert "--dry_run Only show the plan. --stages" in text
    stages = "(some of autoencoder, denoiser; default: autoencoder, denoiser)"
    assert f"--stages STAGES What to train. {stages} --device DEVICE Where. (one of auto, cpu; default: auto)" in text
    assert "--seed SEED Root of all random draws. (a whole number; default: 0)" in text


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["--stages", "denoiser"], ("denoiser",)),
        (["--stages=denoiser"], ("denoiser",)),
        (["--stages", "denoiser,autoencoder"], ("denoiser", "autoencoder")),
        (["--stages=denoiser,autoencoder"], ("denoiser", "autoencoder")),
        (["--stages", "denoiser", "autoencoder"], ("denoiser", "autoencoder")),
        (["--stages", "denoiser,", "autoencoder"], ("denoiser", "autoencoder")),
        (["--stages", "[denoiser, autoencoder]"], ("denoiser", "autoencoder")),
    ],
)
def test_a_list_needs_no_brackets(words: list[str], stages: tuple[str, ...], calls: list[dict[str, object]]) -> None:
    assert cli.main([*REQUIRED, *words, "--seed", "3"]) == 0
    assert (calls[0]["stages"], calls[0]["seed"]) == (stages, 3)


@pytest.mark.parametrize("words", [["--plan.size", "8", "9"], ["--plan.size=8,9"]])
def test_a_list_inside_of_a_plan_needs_no_brackets(words: list[str], calls: list[dict[str, object]]) -> None:
    assert cli.main([*REQUIRED, *words]) == 0
    assert calls[0]["plan"] == Plan(size=(8, 9))


def test_protocols_of_an_evaluation_are_given_by_name() -> None:
    folders = ["--real", "a", "--synthetic", "b", "--output", "c"]
    assert cli.parse("evaluate", [*folders, "--protocols", "frd-v1"])["protocols"] == ["frd-v1"]
    assert cli.parse("evaluate", [*folders, "--protocols", "frd-v1", "frd-v0"])["protocols"] == ["frd-v1", "frd-v0"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_in_the_help_are_accepted(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for line in cli.COMMANDS[name].examples.splitlines():
        program, command, *words = line.split()
        assert (program, command) == ("medgen", name)
        cli.parse(name, words)


def test_an_unknown_key_of_the_real_functions_is_refused() -> None:
    for name in cli.COMMANDS:
        with pytest.raises(argparse.ArgumentError, match="--no_such_key"):
            cli.parse(name, ["--no_such_key", "1"])


@pytest.mark.parametrize(
    ("words", "code", "stream", "text"),
    [
        (["--help"], 0, "stdout", "synthesize  labelled synthetic scans"),
        (["--version"], 0, "stdout", "medgen 0."),
        ([], 2, "stderr", "required: COMMAND"),
        (["trian"], 2, "stderr", "invalid choice: 'trian'"),
    ],
)
def test_the_program_answers_without_a_command(words: list[str], code: int, stream: str, text: str) -> None:
    done = subprocess.run([sys.executable, "-m", "medgen", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert text in getattr(done, stream)


def test_a_hint_names_an_argument_and_nothing_of_what_the_command_returns(capsys):
    assert cli.main(["synthesize", "--output", "x", "--label", "y"]) == 2
    assert "unknown key 'label'. Did you mean 'labels'?" in capsys.readouterr().err


def test_a_command_without_its_arguments_says_which_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate"]) == 2
    assert "real" in capsys.readouterr().err
