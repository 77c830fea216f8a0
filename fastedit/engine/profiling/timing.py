"""Seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Events of a GPU that are kept before they are added up.
MOST_EVENTS = 4096


class PhaseTimer:
    """Adds up seconds per named phase; phases do not nest.

    On a GPU a phase is what its stream does between two events: the host runs ahead and is waited for by nobody until
    the seconds are read. Phases of a step that a CUDA graph records are not timed, its replays are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._cuda = torch.device(device).type == "cuda"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""
        if self._events:
            self._resolve()
        return self._seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under ``name``."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        if self._cuda:
            with self._recorded(name):
                yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def _recorded(self, name: str) -> Iterator[None]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))
            if len(self._events) >= MOST_EVENTS:
                self._resolve()

    def _resolve(self) -> None:
        """Wait for the last event and add all up."""
        self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        self._events.clear()

    def total(self, *, without: tuple[str, ...] = ()) -> float:
        """Sum over the phases that are not excluded."""
        return sum(value for name, value in self.seconds.items() if name not in without)
