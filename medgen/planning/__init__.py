"""Planning: what a folder of scans and a machine are like, and from that every choice that `medgen train` follows."""

from medgen.planning.conditions import SMALL_ENCODER, ConditionsPlan, TextPlan, choose_conditions, facts_of
from medgen.planning.files import read_plan, write_plan
from medgen.planning.plan import (
    SPACING_FACTOR,
    STAGES,
    AutoencoderPlan,
    DenoiserPlan,
    DiffusionPlan,
    LabelPlan,
    Plan,
    StageName,
    TuningPlan,
    network_arguments,
)
from medgen.planning.rules import cap_steps, make_plan
from medgen.planning.summary import check_plan, learned_from, summarize_plan, without_labels

__all__ = [
    "SMALL_ENCODER",
    "SPACING_FACTOR",
    "STAGES",
    "AutoencoderPlan",
    "ConditionsPlan",
    "DenoiserPlan",
    "DiffusionPlan",
    "LabelPlan",
    "Plan",
    "StageName",
    "TextPlan",
    "TuningPlan",
    "cap_steps",
    "check_plan",
    "choose_conditions",
    "facts_of",
    "learned_from",
    "make_plan",
    "network_arguments",
    "read_plan",
    "summarize_plan",
    "without_labels",
    "write_plan",
]
