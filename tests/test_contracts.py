"""The house rules that a machine can check: style, types, docstrings, layers, public names, cheap import."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import medgen

PUBLIC_NAMES = [
    "BadInputError",
    "Case",
    "Dataset",
    "GenerativeTTA",
    "Generator",
    "Grid",
    "Plan",
    "Sample",
    "__version__",
    "evaluate",
    "filter_pairs",
    "load_case",
    "load_cases",
    "predict",
    "read_dataset",
    "synthesize",
    "train",
    "utility",
]

# Users' scripts and YAML files call these arguments by name: taking one away breaks them.
ARGUMENTS = {
    "train": "data output plan conditions base lora_rank dry_run skip_bad stages max_steps device seed",
    "synthesize": (
        "output model labels label_source num_samples batch_size seed sampler sampler_spacing num_inference_steps "
        "guidance_scale temperature precision device max_memory_gb skip_bad overwrite replay prompts edges edge_maps "
        "attributes conditions guidance_interval guidance_rescale truncate_prompts controls sources strength regions "
        "source_labels edge_control label_sampling minority_scale label_outlines"
    ),
    "evaluate": "real synthetic output extractor seed skip_bad",
    "filter_pairs": "input reference output gates real_rejected steps seed device overwrite",
    "utility": "real output synthetic ratios target num_cases num_seeds steps device seed overwrite",
    "predict": (
        "model segmenter input output intensities orientation patch_size segmenter_output num_views mask strength "
        "randomness detail num_inference_steps method condition_on_prediction guidance_scale geometric "
        "intensity_views combination weighting outlier_dice patience max_evaluations max_seconds check_familiarity "
        "view_batch window slice_axis max_memory_gb scaled_window precision device seed overwrite"
    ),
    "read_dataset": "folder",
    "load_case": "case dataset",
    "load_cases": "dataset cases skip_bad",
}

TOOLS = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["pydoclint", "medgen"],
    ["lint-imports", "--no-cache"],
]


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_the_tree_passes(command: list[str], repository: Path) -> None:
    program = shutil.which(command[0], path=sysconfig.get_path("scripts")) or shutil.which(command[0])
    if program is None:
        pytest.fail(f'{command[0]} is not installed: python -m pip install -e ".[test]"')
    done = subprocess.run([program, *command[1:]], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def test_importing_medgen_and_its_command_line_imports_no_heavy_package() -> None:
    program = (
        "import json, sys, medgen, medgen.cli; medgen.cli._root_parser(); "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "monai", "diffusers", "accelerate", "numpy", "scipy", "matplotlib", "huggingface_hub"}
    assert heavy.isdisjoint(json.loads(done.stdout))


def test_what_is_imported_is_installed_with_medgen(repository: Path) -> None:
    """Developers have the packages of the tests too, which hide that a user lacks one."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=~!\[ ]", line)[0].lower() for line in project["dependencies"]}
    # Optional, and said so where they are missing; markupsafe comes with jinja2.
    spared = {"transformers", "peft", "radiomics", "SimpleITK", "markupsafe", "medgen"}
    imported = set()
    for file in (repository / "medgen").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    homes = packages_distributions()
    missing = {
        name
        for name in imported - set(sys.stdlib_module_names) - spared
        if not {home.lower().replace("_", "-") for home in homes.get(name, [])} & needed
    }
    assert not missing


def test_public_names_are_these() -> None:
    assert medgen.__all__ == PUBLIC_NAMES
    assert set(medgen._HOME) | {"__version__"} == set(PUBLIC_NAMES)


@pytest.mark.parametrize("name", [name for name in PUBLIC_NAMES if not name.startswith("_")])
def test_public_name_is_found_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(medgen, name))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_public_function_keeps_its_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(medgen, name)).parameters
    expected = ARGUMENTS[name].split()
    positional = [key for key, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    assert positional == expected[: len(positional)]
    assert set(expected) <= set(parameters)


def test_an_unknown_name_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'synthesise'; public names: BadInputError, .*synthesize"):
        medgen.synthesise  # noqa: B018
