"""Seconds and memory of single calls, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

OURS = "fastedit"
#: Name of an implementation -> what must be entered while it runs.
Contexts = Mapping[str, Callable[[], AbstractContextManager[None]]]


#: Clock cycles, about a millisecond, that a GPU is kept busy before a timed call.
AHEAD = 2_000_000


class Clock:
    """Seconds of one call: wall clock, or on a GPU the time between two events.

    Before, the GPU overwrites its L2 cache and then waits for a moment, in which Python launches what follows: as in a
    loop of many steps, only launches that take longer than the work show in the time.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device == "cuda"
        #: Calls before any is timed: compiled once, buffers in place, a GPU's clocks up.
        self.warm_up = 3 if self.cuda else 1
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(4 * cache, dtype=torch.int8, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Callable[[], object]) -> float:
        """Return the seconds of a call."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = self._events
        self._scratch.zero_()
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def runs_of(case: Mapping[str, Any], contexts: Contexts) -> dict[str, Callable[[], object]]:
    """Return all implementations of a case: the op, the op served by others, the baselines."""
    return {OURS: case["run"], **dict.fromkeys(contexts, case["run"]), **case["baselines"]}


def time_case(
    case: Mapping[str, Any],
    seconds: float,
    least: int,
    clock: Clock | None = None,
    contexts: Contexts | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[float]]:
    """Return the seconds of every call, by implementation, taken in turns until each had its share of ``seconds``.

    Slow baselines take part in every round until their share is used up, but ``least`` times at least. A baseline that
    cannot run here, for want of memory say, is left out and named.
    """
    clock, contexts = clock or Clock(), contexts or {}
    runs = runs_of(case, contexts)
    for name in list(runs):
        try:
            with contexts.get(name, nullcontext)():
                for _ in range(clock.warm_up):
                    runs[name]()
        except (RuntimeError, MemoryError) as error:
            if name == OURS:
                raise
            say(f"{case['name']}: {name} is left out: {_first_line(error)}")
            del runs[name]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    share = seconds / len(runs)
    while True:
        left = [name for name, spent in taken.items() if len(spent) < least or sum(spent) < share]
        if not left:
            return taken
        # the op takes part in every round: a baseline is compared with calls made around its own
        for name in dict.fromkeys([OURS, *left]):
            with contexts.get(name, nullcontext)():
                taken[name].append(clock(runs[name]))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def extra_on_device(run: Callable[[], object]) -> float:
    """Return the MiB of GPU memory that one call takes on top of its inputs and of what earlier calls keep."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
