"""A progress line with the time left, for work that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 2.0


class ProgressLine:
    """Counts done items; the line appears on standard error once ``PATIENCE_S`` have passed.

    Args:
        label: what is being done.
        total: how many items.
        show: None shows it only on a terminal.
    """

    def __init__(self, label: str, total: int, show: bool | None = None) -> None:
        self.label, self.total = label, total
        self.show = sys.stderr.isatty() if show is None else show
        self.done = 0
        self._start = time.monotonic()
        self._bar: object | None = None
        self._task: object | None = None
        self._text = label

    def advance(self, count: int = 1) -> None:
        """``count`` more items are done."""
        self.done += count
        if self.show and self._bar is None and time.monotonic() - self._start > PATIENCE_S:
            self._open()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)  # type: ignore[attr-defined]

    def describe(self, text: str) -> None:
        """Say how it goes, behind the label."""
        self._text = f"{self.label} {text}"
        if self._bar is not None:
            self._bar.update(self._task, description=self._text)  # type: ignore[attr-defined]

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        self._task = bar.add_task(self._text, total=self.total)
        bar.start()
        self._bar = bar

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
            self._bar = None


@contextmanager
def progress(label: str, total: int, show: bool | None = None) -> Iterator[ProgressLine]:
    """A ProgressLine that is closed at the end of the block."""
    line = ProgressLine(label, total, show)
    try:
        yield line
    finally:
        line.close()
