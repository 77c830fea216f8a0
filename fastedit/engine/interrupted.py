"""A run that ends before its last edit: what is done by then leaves in the exception that says why."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastedit.engine.memory.oom import is_out_of_memory, release_memory
from fastedit.engine.run_state import RunState

if TYPE_CHECKING:
    from fastedit.engine.run import Run


class _Carrier(BaseException):
    """What is done of a run.

    Args:
        message: why it ended, how much is done and where it lies.
        run: of the finished edits; None only where none was given.
        numbers: of the finished edits among all edits, in the order of ``run.deltas``.
    """

    def __init__(self, message: str, run: Run | None = None, numbers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.run = run
        self.numbers = tuple(numbers)


class RunInterrupted(_Carrier, RuntimeError):
    """A run ended by an error after some edits were finished: ``run`` holds those, ``numbers`` says which they are.

    The error itself is the ``__cause__``. What was not scored yet has no scores; ``run.save`` and ``applied`` work as
    on a whole run.
    """


class RunStopped(_Carrier, KeyboardInterrupt):
    """The same, ended by a signal (Ctrl-C): no ``except Exception`` catches it."""


@contextmanager
def carrying(state: RunState, finished: Callable[[Sequence[int]], Run]) -> Iterator[None]:
    """Inside the block edits are made; what ends it early carries those that are done.

    Args:
        state: of the run. finished: the run of the edits with these numbers.
    Raises:
        RunInterrupted, RunStopped: from what ended the block, once an edit is finished. Before that, it goes on itself.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if is_out_of_memory(error):
            # The frames hold the tensors that there was no room for; they are of no more use
            traceback.clear_frames(error.__traceback__)
            release_memory(state.job.model)
        numbers = sorted(state.ended.outcomes)
        if not numbers:
            raise
        run = finished(numbers)
        kept = f"{len(numbers)} of {len(state.job.edits)} edits are finished and in this error's 'run'"
        if state.ended.store is not None:
            kept += f"; they are committed in the ledger {str(state.ended.store.folder)!r}, from which the next goes on"
        message = f"edit: the run ended early; {kept} (got {_told(error)})"
        if isinstance(error, KeyboardInterrupt):
            raise RunStopped(message, run, numbers) from error
        raise RunInterrupted(message, run, numbers) from error


def _told(error: BaseException) -> str:
    text = f"{error}".strip()
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
