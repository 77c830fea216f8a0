"""What every implementation returns, so that results can be compared and times put side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastedit.deltas import EditDelta
from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome


@dataclass(frozen=True)
class Fitted:
    """Edits made by one implementation.

    Args:
        deltas: one per edit, in order.
        outcomes: how each fit ended.
        seconds: wall-clock seconds by phase; phases do not overlap.
        scores: per edit, when it was evaluated.
    """

    deltas: Sequence[EditDelta]
    outcomes: Sequence[FitOutcome]
    seconds: Mapping[str, float]
    scores: Sequence[EditScores] = field(default_factory=list)
