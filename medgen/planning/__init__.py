"""Planning: what a folder of scans and a machine are like, and from that every choice that `medgen train` follows."""

from medgen.planning.files import read_plan, write_plan
from medgen.planning.plan import STAGES, AutoencoderPlan, DenoiserPlan, Plan, StageName, network_arguments
from medgen.planning.rules import make_plan
from medgen.planning.summary import check_plan, summarize_plan

__all__ = [
    "STAGES",
    "AutoencoderPlan",
    "DenoiserPlan",
    "Plan",
    "StageName",
    "check_plan",
    "make_plan",
    "network_arguments",
    "read_plan",
    "summarize_plan",
    "write_plan",
]
