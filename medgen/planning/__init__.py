"""Planning: what a folder of scans and a machine are like, and from that every choice that `medgen train` follows."""

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
    network_arguments,
)
from medgen.planning.rules import make_plan
from medgen.planning.summary import check_plan, summarize_plan

__all__ = [
    "SPACING_FACTOR",
    "STAGES",
    "AutoencoderPlan",
    "DenoiserPlan",
    "DiffusionPlan",
    "LabelPlan",
    "Plan",
    "StageName",
    "check_plan",
    "make_plan",
    "network_arguments",
    "read_plan",
    "summarize_plan",
    "write_plan",
]
