"""Small changes beside a frozen model, stacked over many edits."""

from fastedit.deltas.base import DeltaSpec, EditDelta, StackedDelta
from fastedit.deltas.company import company
from fastedit.deltas.full import FullDelta
from fastedit.deltas.install import RowsHolder, installed, split_point
from fastedit.deltas.kinds import accumulate, stack
from fastedit.deltas.live import LiveDeltas
from fastedit.deltas.low_rank import LowRankDelta
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.deltas.storage import load_deltas, save_deltas
from fastedit.deltas.stored import StoredDeltas

__all__ = [
    "DeltaSpec",
    "EditDelta",
    "FullDelta",
    "LiveDeltas",
    "LowRankDelta",
    "Rows",
    "RowsHolder",
    "StackedDelta",
    "StoredDeltas",
    "TokenSpans",
    "accumulate",
    "company",
    "installed",
    "load_deltas",
    "save_deltas",
    "split_point",
    "stack",
]
