"""What an edit is fitted with: tensors in, per-edit values out, no model calls."""

from fastedit.objectives.base import ROLES, Direction, Losses, Objective, Role, TokenBatch, beside_roles, branch_of
from fastedit.objectives.invariant import InvariantConfig, InvariantObjective
from fastedit.objectives.layout import BatchLayout
from fastedit.objectives.nll import KLObjective, NLLObjective
from fastedit.objectives.tripartite import PENALTY_MODES, EnvironmentTable, tripartite

__all__ = [
    "PENALTY_MODES",
    "ROLES",
    "BatchLayout",
    "Direction",
    "EnvironmentTable",
    "InvariantConfig",
    "InvariantObjective",
    "KLObjective",
    "Losses",
    "NLLObjective",
    "Objective",
    "Role",
    "TokenBatch",
    "beside_roles",
    "branch_of",
    "tripartite",
]
