"""What is being done and how long it will take, on one line of standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

#: Seconds between lines where the output is no terminal, or one that cannot take a line back.
EVERY_S = 30.0


class ProgressLine:
    """Counts done items. The line is there at once, and tells the time left by what was done since the start.

    On a terminal it is animated and goes away in the end; elsewhere it is a plain line at the start and every
    ``EVERY_S``, without control characters.

    Args:
        label: what is being done.
        total: how many items; 0 where they are not counted.
        show: None shows it only on a terminal.
        done: items that were done before, by a run that was broken off; they say nothing about speed.
    """

    def __init__(self, label: str, total: int, show: bool | None = None, *, done: int = 0) -> None:
        self.label, self.total, self.done = label, total, done
        self.show = (sys.stderr is not None and sys.stderr.isatty()) if show is None else show
        self._before, self._underway = done, 0.0
        self._start = time.monotonic()
        self._told = self._start
        self._text = label
        self._bar: Any = None
        self._plain = False
        if self.show:
            self.reveal()

    def advance(self, count: int = 1) -> None:
        """``count`` more items are done."""
        self.done += count
        self._underway = max(0.0, self._underway - count)
        self._tell()

    def underway(self, items: float) -> None:
        """So much of the items that follow is done: 0.5 is half of one, or a tenth each of five."""
        self._underway = items
        self._tell()

    def describe(self, text: str) -> None:
        """Say how it goes, behind the label."""
        self._text = f"{self.label} {text}"
        self._tell()

    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, (self.done + self._underway) / self.total) if self.total else 0.0

    def left_s(self) -> float | None:
        """Seconds to the end at the speed since the start; None where nothing says so yet."""
        worked = self.done + self._underway - self._before
        if not self.total or worked <= 0:
            return None
        return (time.monotonic() - self._start) * max(0.0, self.total - self.done - self._underway) / worked

    def status(self) -> str:
        """``12/100, 0:34, about 4:09 left``."""
        parts = [f"{self.done}/{self.total}"] if self.total else []
        parts.append(duration(time.monotonic() - self._start))
        left = self.left_s()
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def reveal(self) -> None:
        """Show the line, after ``close`` again."""
        if not self.show or self._bar is not None:
            return
        from rich.console import Console

        console = Console(stderr=True)
        self._plain = not console.is_terminal or console.is_dumb_terminal
        if self._plain:
            self._write()
        else:
            self._bar = _animated(self, console)
            self._bar.start()

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tell(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.fraction(), description=self._text)
        elif self._plain and time.monotonic() - self._told >= EVERY_S:
            self._write()

    def _write(self) -> None:
        self._told = time.monotonic()
        sys.stderr.write(f"{self._text}: {self.status()}\n")
        sys.stderr.flush()


def _animated(line: ProgressLine, console: Any) -> Any:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Status(ProgressColumn):
        """Read when it is drawn, so that time goes on between items."""

        def render(self, task: Task) -> Text:
            return Text(line.status())

    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(20), Status(), console=console, transient=True
    )
    bar.update(bar.add_task(line.label, total=1.0 if line.total else None), completed=line.fraction())
    return bar


def duration(seconds: float) -> str:
    """``0:34``, ``12:05`` or ``3:00:01``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


_current: ContextVar[ProgressLine | None] = ContextVar("current progress line", default=None)


@contextmanager
def progress(label: str, total: int, show: bool | None = None, *, done: int = 0) -> Iterator[ProgressLine]:
    """A ProgressLine that is closed at the end of the block; one around it is not shown meanwhile."""
    around = _current.get()
    if around is not None:
        around.close()
    line = ProgressLine(label, total, show, done=done)
    token = _current.set(line)
    try:
        yield line
    finally:
        _current.reset(token)
        line.close()
        if around is not None:
            around.reveal()
