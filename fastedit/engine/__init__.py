"""The engine: batches of edits on a frozen model, scored, timed and saved."""

from fastedit.engine.acting import applied
from fastedit.engine.editing import edit
from fastedit.engine.interrupted import RunInterrupted, RunStopped
from fastedit.engine.run import Run, Timing

__all__ = ["Run", "RunInterrupted", "RunStopped", "Timing", "applied", "edit"]
