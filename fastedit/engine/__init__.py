"""The engine: batches of edits on a frozen model, scored, timed and saved."""

from fastedit.engine.apply import applied
from fastedit.engine.engine import edit
from fastedit.engine.run import Run, Timing

__all__ = ["Run", "Timing", "applied", "edit"]
