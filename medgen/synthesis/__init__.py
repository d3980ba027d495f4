"""Labelled synthetic scans out of a generator: lazily in Python, or as an nnU-Net data set on disk."""

from medgen.synthesis.editing import Edited, edit, replace_label, translate, translate_batch
from medgen.synthesis.inputs import find_edges
from medgen.synthesis.label_files import find_labels
from medgen.synthesis.plan import (
    EdgeSource,
    LabelFile,
    SampleSpec,
    SamplingSettings,
    ScanSource,
    SourceFile,
    plan_samples,
)
from medgen.synthesis.run import synthesize
from medgen.synthesis.sampling import SyntheticSample, iter_samples

__all__ = [
    "EdgeSource",
    "Edited",
    "LabelFile",
    "SampleSpec",
    "SamplingSettings",
    "ScanSource",
    "SourceFile",
    "SyntheticSample",
    "edit",
    "find_edges",
    "find_labels",
    "iter_samples",
    "plan_samples",
    "replace_label",
    "synthesize",
    "translate",
    "translate_batch",
]
