"""What goes wrong on the command line: one sentence and an exit status, never a stack of frames unless asked for."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

#: Exit statuses: of a refused input, of a fault in this program, of a signal.
REFUSED, BROKEN, STOPPED = 2, 1, 130
#: Set in the environment, errors are shown with their frames.
DEBUG = "FASTEDIT_DEBUG"
_TYPED: ContextVar[tuple[str, ...]] = ContextVar("fastedit_typed", default=())
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


class Ended(Exception):
    """A command ended early, and says what was kept.

    Args:
        message: one sentence. status: of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Commands(TyperGroup):
    """Commands that a signal ends with a sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what was typed, to say how to go on."""
        _TYPED.set(tuple(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Ended(f"{error}" or "stopped; nothing was kept", STOPPED) from error


def command_line() -> str:
    """The command that runs, as it was typed."""
    return shlex.join(["fastedit", *_TYPED.get()])


def is_expected(error: BaseException) -> bool:
    """Whether an error says what is wrong with what was asked for, and not with this program."""
    from fastedit.engine.memory.oom import is_out_of_memory

    # Our own TypeErrors say what they got; others come from a line that was not meant to see such a value
    says_got = isinstance(error, TypeError) and "(got " in str(error)
    return says_got or isinstance(error, _EXPECTED) or is_out_of_memory(error)


def status_of(error: BaseException) -> int:
    """The exit status that says how a command ended."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return REFUSED if is_expected(reason(error)) else BROKEN


def reason(error: BaseException) -> BaseException:
    """What ended a run, where an error carries what was finished of it; else the error itself."""
    from fastedit.engine import RunInterrupted

    return error.__cause__ or error if isinstance(error, RunInterrupted) else error


def sentence(error: BaseException) -> str:
    """What an error says, without the names of Python; of a fault of ours, its kind and how to see more."""
    from fastedit.engine.memory.oom import is_out_of_memory

    if not is_expected(error):
        detail = f"{type(error).__name__}: {str(error).strip():.300}".rstrip(": ")
        return f"a fault in fastedit, {detail}; {DEBUG}=1 shows the traceback"
    if isinstance(error, OSError) and error.strerror and type(error).__str__ is OSError.__str__:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    text = str(error).strip()
    if is_out_of_memory(error):
        return f"memory ran out; try a smaller --batch-size, auto, or --quantize nf4 (got {text[:200]!r})"
    return text or type(error).__name__


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the block a request to terminate is what Ctrl-C is."""

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(app: typer.Typer) -> int:
    """Run a command line; what was wrong is one message on standard error. Returns the exit status."""
    make_printable()
    warnings.formatwarning = _plain_warning
    try:
        with stopped_by_signals():
            app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else BROKEN if ended.code else 0
    except KeyboardInterrupt:
        return _say("stopped; nothing was kept", STOPPED)
    except Ended as ended:
        return _say(str(ended), ended.status, ended)
    except Exception as error:
        return _say(sentence(error), status_of(error), error)
    return 0


def make_printable() -> None:
    """Let no character end a command: what the terminal has no sign for is shown by its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _say(message: str, status: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    try:
        Console(stderr=True).print(f"fastedit: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    except OSError:
        # Nobody listens
        return status
    return status


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours as sentences; those of libraries with their kind."""
    text = str(message)
    ours = text.partition(":")[0] in ("edit", "train", "load")
    return f"fastedit: {text}\n" if ours else f"{category.__name__}: {text}\n"
