"""Labelled synthetic scans out of a generator: lazily in Python, or as an nnU-Net data set on disk."""

from medgen.synthesis.plan import LabelFile, SampleSpec, SamplingSettings, find_labels, plan_samples
from medgen.synthesis.run import synthesize
from medgen.synthesis.sampling import SyntheticSample, iter_samples

__all__ = [
    "LabelFile",
    "SampleSpec",
    "SamplingSettings",
    "SyntheticSample",
    "find_labels",
    "iter_samples",
    "plan_samples",
    "synthesize",
]
