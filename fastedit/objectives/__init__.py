"""What an edit is fitted with: tensors in, per-edit values out, no model calls."""

from fastedit.objectives.base import ROLES, Direction, Losses, Objective, Role, TokenBatch, beside_roles, branch_of
from fastedit.objectives.config import DUALS, PENALTY_MODES, InvariantConfig
from fastedit.objectives.invariant import InvariantObjective
from fastedit.objectives.layout import BatchLayout
from fastedit.objectives.nll import KLObjective, NLLObjective, RetainingObjective
from fastedit.objectives.tripartite import EnvironmentTable, tripartite

__all__ = [
    "DUALS",
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
    "RetainingObjective",
    "Role",
    "TokenBatch",
    "beside_roles",
    "branch_of",
    "tripartite",
]
