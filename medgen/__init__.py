"""Labelled synthetic medical scans in 2D and 3D.

Importing this package is cheap: a public name loads its module, and torch with it, when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medgen.data.dataset import Case, Dataset, load_case, load_cases, read_dataset
    from medgen.evaluation import evaluate
    from medgen.filtering import filter_pairs
    from medgen.generator import Generator
    from medgen.planning import Plan
    from medgen.synthesis import synthesize
    from medgen.test_time import GenerativeTTA, predict
    from medgen.training import train
    from medgen.trial import utility
    from medgen.types import BadInputError, Grid, Sample

__version__ = "0.1.0"

_HOME = {
    "BadInputError": "medgen.types",
    "Case": "medgen.data.dataset",
    "Dataset": "medgen.data.dataset",
    "GenerativeTTA": "medgen.test_time",
    "Generator": "medgen.generator",
    "Grid": "medgen.types",
    "Plan": "medgen.planning",
    "Sample": "medgen.types",
    "evaluate": "medgen.evaluation",
    "filter_pairs": "medgen.filtering",
    "load_case": "medgen.data.dataset",
    "load_cases": "medgen.data.dataset",
    "predict": "medgen.test_time",
    "read_dataset": "medgen.data.dataset",
    "synthesize": "medgen.synthesis",
    "train": "medgen.training",
    "utility": "medgen.trial",
}

__all__ = [
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


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'medgen' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
