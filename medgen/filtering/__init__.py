"""Gates: labelled scans are accepted, or rejected with reasons, by tolerances that are fitted on real scans."""

from medgen.filtering.gates import GATES, Gate, Gates, Verdict, fit_gates
from medgen.filtering.measure import Instruments, Measured, measure_all
from medgen.filtering.reference import Reference
from medgen.filtering.run import filter_pairs
from medgen.filtering.source import ReferenceSource, find_reference
from medgen.filtering.storage import load_reference
from medgen.filtering.summary import seen_cases
from medgen.filtering.survey import measure_reference

__all__ = [
    "GATES",
    "Gate",
    "Gates",
    "Instruments",
    "Measured",
    "Reference",
    "ReferenceSource",
    "Verdict",
    "filter_pairs",
    "find_reference",
    "fit_gates",
    "load_reference",
    "measure_all",
    "measure_reference",
    "seen_cases",
]
