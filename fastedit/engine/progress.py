"""The progress line under its earlier name."""

from fastedit.progress import PATIENCE_S, ProgressLine, progress

__all__ = ["PATIENCE_S", "ProgressLine", "progress"]
