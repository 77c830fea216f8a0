"""What is being done and how long it will take: on one line of standard error, and for machines in a file of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

#: Seconds between lines where the output is no terminal, or one that cannot take a line back.
EVERY_S = 30.0
#: Seconds between entries of a log, and seconds that a speed "now" looks back.
LOG_EVERY_S, NOW_S = 1.0, 20.0
#: What of an entry is a curve on a TensorBoard, over the number of items that are done.
BOARD = ("elapsed_s", "left_s", "per_s", "per_s_now", "failed", "memory_mib")


class ProgressLine:
    """Counts done items. The line is there at once, and tells the time left by what was done since the start.

    On a terminal it is animated and goes away in the end; elsewhere it is a plain line at the start and every
    ``EVERY_S``, without control characters.

    Args:
        label: what is being done.
        total: how many items; 0 where they are not counted.
        show: None shows it only on a terminal.
        done: items that were done before, by a run that was broken off; they say nothing about speed.
        unit: of the items, where their speed is told: "edits".
    """

    def __init__(self, label: str, total: int, show: bool | None = None, *, done: int = 0, unit: str = "") -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.show = (sys.stderr is not None and sys.stderr.isatty()) if show is None else show
        self._before, self._underway = done, 0.0
        self._start = time.monotonic()
        self._told = self._start
        #: When so many were done, of the last seconds.
        self._recent = deque([(self._start, done)])
        self._failed, self._memory_mib = 0, 0.0
        self._logged = -LOG_EVERY_S
        self._text = label
        self._bar: Any = None
        self._plain = False
        if self.show:
            self.reveal()
        self._log("start")

    def advance(self, count: int = 1) -> None:
        """``count`` more items are done."""
        self.done += count
        self._underway = max(0.0, self._underway - count)
        self._remember()
        self._tell()

    def note(self, *, failed: int, memory_mib: float) -> None:
        """How many items have failed so far, and the most memory that was used; told with the next item."""
        self._failed, self._memory_mib = failed, memory_mib

    def skip(self, count: int) -> None:
        """``count`` items were done before, by a run that was broken off; they say nothing about speed."""
        self.done += count
        self._before += count
        self._recent = deque((when, done + count) for when, done in self._recent)
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

    def per_s(self) -> float | None:
        """Items per second since the start; None before the first."""
        spent = time.monotonic() - self._start
        return (self.done - self._before) / spent if self.done > self._before and spent > 0 else None

    def per_s_now(self) -> float | None:
        """Items per second of the last ``NOW_S`` seconds; None where nothing was done in them."""
        now = time.monotonic()
        first = next(((when, done) for when, done in self._recent if now - when <= NOW_S), None)
        if first is None or self.done == first[1] or now <= first[0]:
            return None
        return (self.done - first[1]) / (now - first[0])

    def status(self) -> str:
        """``12/100, 0:34, about 4:09 left``; with a unit and notes also how fast, how many failed, and the memory."""
        parts = [f"{self.done}/{self.total}"] if self.total else []
        parts.append(duration(time.monotonic() - self._start))
        mean, now = self.per_s(), self.per_s_now()
        if self.unit and mean is not None:
            parts += (
                [f"{mean:.3g} {self.unit}/s"]
                if now is None
                else [f"{now:.3g} {self.unit}/s now", f"{mean:.3g} on average"]
            )
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._memory_mib:
            planned = _planned_mib.get()
            parts.append(f"{self._memory_mib:,.0f}{'' if planned is None else f' of {planned:,.0f}'} MiB")
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

    def finish(self) -> None:
        """Take the line away for good."""
        self.close()
        self._log("end")

    def _remember(self) -> None:
        now = time.monotonic()
        while len(self._recent) > 1 and now - self._recent[1][0] > NOW_S:
            self._recent.popleft()
        if now - self._recent[-1][0] >= NOW_S / 100:
            self._recent.append((now, self.done))

    def _log(self, event: str) -> None:
        """An entry in the log of the context, where there is one; those between start and end are not too many."""
        log, board, now = _log_file.get(), _board.get(), time.monotonic()
        if (log is None and board is None) or (event == "progress" and now - self._logged < LOG_EVERY_S):
            return
        self._logged = now
        entry: dict[str, Any] = {
            "event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "label": self._text,
            "done": self.done, "total": self.total or None, "elapsed_s": now - self._start, "left_s": self.left_s(),
            "per_s": self.per_s(), "per_s_now": self.per_s_now(), "failed": self._failed,
            "memory_mib": self._memory_mib or None, "planned_mib": _planned_mib.get(),
        }  # fmt: skip
        if log is not None:
            log.write(json.dumps(entry) + "\n")
            log.flush()
        if board is not None:
            for name in BOARD:
                if entry[name] is not None:
                    board.add_scalar(f"{self.label}/{name}", entry[name], self.done)

    def _tell(self) -> None:
        self._log("progress")
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
            return Text(line.status(), no_wrap=True, overflow="ellipsis")

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
_log_file: ContextVar[TextIO | None] = ContextVar("log of progress", default=None)
_board: ContextVar[Any] = ContextVar("TensorBoard of progress", default=None)
_planned_mib: ContextVar[float | None] = ContextVar("memory that was planned for", default=None)


@contextmanager
def log_progress(path: Path) -> Iterator[None]:
    """Inside the block, in this context, progress is also appended to a file, an entry a line as JSON.

    An entry has event ("start", "progress" or "end" of what is being done), time (ISO 8601, UTC), label, done, total,
    elapsed_s, left_s, per_s, per_s_now (items per second, of the last 20 s), failed, memory_mib, planned_mib; what is
    not known is null.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--log-json: a file that can be written (got {str(path)!r}: {error.strerror})") from error
    with file:
        token = _log_file.set(file)
        try:
            yield
        finally:
            _log_file.reset(token)


@contextmanager
def show_on_board(folder: Path) -> Iterator[None]:
    """Inside the block, in this context, progress is also written for TensorBoard: curves over what is done.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        ValueError: the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    try:
        writer: Any = SummaryWriter(str(folder))
    except OSError as error:
        raise ValueError(
            f"--tensorboard: a folder that can be written (got {str(folder)!r}: {error.strerror})"
        ) from error
    token = _board.set(writer)
    try:
        yield
    finally:
        _board.reset(token)
        writer.close()


@contextmanager
def planning_memory() -> Iterator[None]:
    """What is planned for inside the block is forgotten behind it."""
    token = _planned_mib.set(None)
    try:
        yield
    finally:
        _planned_mib.reset(token)


def expect_memory(mib: float | None) -> None:
    """From now on, in this context, lines say what was planned for beside the memory that is used."""
    _planned_mib.set(mib)


@contextmanager
def progress(
    label: str, total: int, show: bool | None = None, *, done: int = 0, unit: str = ""
) -> Iterator[ProgressLine]:
    """A ProgressLine that is closed at the end of the block; one around it is not shown meanwhile."""
    around = _current.get()
    if around is not None:
        around.close()
    line = ProgressLine(label, total, show, done=done, unit=unit)
    token = _current.set(line)
    try:
        yield line
    finally:
        _current.reset(token)
        line.finish()
        if around is not None:
            around.reveal()
