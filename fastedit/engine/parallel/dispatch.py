"""Shards are handed to whichever worker is free; those of a worker that dies are handed out again."""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from fastedit.engine.parallel.worker import Shard, ShardResult

#: How often an edit fails, alone in its shard, before it is set aside; how many workers in a row may die as they start.
MOST_FAILURES, MOST_STARTS = 3, 3


class Handle(Protocol):
    """A worker in a process of its own, seen from the run's process.

    A future of a worker that died has an error; what an edit raised is in the result.
    """

    def start(self) -> Future[int]:
        """Take up the task, and load the model where it is not there; the number of the process."""

    def make(self, shard: bytes) -> Future[bytes]:
        """See ``Worker.make``."""

    def close(self) -> None:
        """End it, whatever it does."""


@dataclass(frozen=True)
class Taken:
    """A shard that came back.

    Args:
        place: of the worker. result: what became of it. size: bytes that travelled.
        at: ``time.perf_counter`` when it was there. commit_s: seconds that it took to keep it.
    """

    place: int
    result: ShardResult
    size: int
    at: float
    commit_s: float


class Watcher(Protocol):
    """Is told how a run's workers get on."""

    def began(self, dispatch: Dispatch) -> None:
        """Workers are about to start."""

    def took(self, taken: Taken) -> None:
        """A shard came back and is kept."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Inside the block, in this context, the watcher is told of every run's workers."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class Lost(RuntimeError):
    """A worker's process is gone."""


class Dispatch:
    """Makes shards on several workers.

    Args:
        new_worker: starts the worker of a place, 0 to workers - 1. workers: how many at a time.
        is_lost: whether an error says that a worker's process is gone.
        waiting: entered while nothing is to be done but wait.
        take: gets what became of each shard, in any order.
        set_aside: gets the number of an edit that is given up, and why.
        handles: workers by place that are there already; those that are there at the end stay. None ends them.
    """

    def __init__(
        self,
        new_worker: Callable[[int], Handle],
        workers: int,
        is_lost: Callable[[BaseException], bool],
        waiting: Callable[[], AbstractContextManager[None]],
        take: Callable[[ShardResult], None],
        set_aside: Callable[[int, str], None],
        handles: dict[int, Handle] | None = None,
    ) -> None:
        self.new_worker, self.workers, self.is_lost = new_worker, workers, is_lost
        self.waiting, self.take, self.set_aside = waiting, take, set_aside
        #: Processes of the workers that are ready, by place; and how many were lost.
        self.processes: dict[int, int] = {}
        self.lost = 0
        self._handles: dict[int, Handle] = {} if handles is None else handles
        self._keeps = handles is not None
        self._starting: dict[Future[int], int] = {}
        self._running: dict[Future[bytes], tuple[int, Shard]] = {}
        self._failures: Counter[int] = Counter()
        self._failed_starts = 0

    def run(self, shards: Sequence[Shard]) -> None:
        """Make all of them.

        Raises:
            RuntimeError: workers die as they start. What loading the model or setting up the method raises.
        """
        self._waiting = deque(shards)
        watcher = _WATCHER.get()
        if watcher is not None:
            watcher.began(self)
        try:
            for place in range(min(self.workers, len(shards))):
                self._start(place)
            while self._waiting or self._running:
                self._feed()
                with self.waiting():
                    futures: list[Future[Any]] = [*self._starting, *self._running]
                    done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    (self._started if future in self._starting else self._ended)(future)
        finally:
            # What is still starting, or has a shard that nobody waits for, is of no use to the next task
            if not self._keeps or self._starting or self._running:
                while self._handles:
                    self._handles.popitem()[1].close()

    def _start(self, place: int) -> None:
        if place not in self._handles:
            self._handles[place] = self.new_worker(place)
        self._starting[self._handles[place].start()] = place

    def _started(self, future: Future[int]) -> None:
        place, error = self._starting.pop(future), future.exception()
        if error is None:
            self.processes[place], self._failed_starts = future.result(), 0
            return
        if not self.is_lost(error):
            raise error
        self._failed_starts += 1
        if self._failed_starts > MOST_STARTS:
            raise Lost(f"edit: workers live until they have loaded the model (got {error!s:.300})") from error
        self._replace(place)

    def _feed(self) -> None:
        """Hand what waits longest to the workers that are free."""
        busy = {place for place, _ in self._running.values()}
        for place in self.processes:
            if place not in busy and self._waiting:
                shard = self._waiting.popleft()
                self._running[self._handles[place].make(pickle.dumps(shard))] = place, shard

    def _ended(self, future: Future[bytes]) -> None:
        (place, shard), error = self._running.pop(future), future.exception()
        if error is None:
            result: ShardResult = pickle.loads(future.result())
            begin = time.perf_counter()
            self.take(result)
            watcher = _WATCHER.get()
            if watcher is not None:
                watcher.took(Taken(place, result, len(future.result()), begin, time.perf_counter() - begin))
            left = [number for number in shard.numbers if number not in result.made]
            self._again(shard.part(left), result.reason)
            return
        if not self.is_lost(error):
            raise error
        self._again(shard, "the worker's process died")
        self._replace(place)

    def _replace(self, place: int) -> None:
        """Start another worker where one died."""
        self.lost += 1
        self.processes.pop(place, None)
        self._handles.pop(place).close()
        self._start(place)

    def _again(self, shard: Shard, reason: str) -> None:
        """Let what is left of a shard wait again, each edit by itself: which of them is at fault shows then."""
        if len(shard.numbers) == 1:
            (number,) = shard.numbers
            self._failures[number] += 1
            if self._failures[number] >= MOST_FAILURES:
                self.set_aside(number, reason)
                return
        self._waiting += [shard.part([number]) for number in shard.numbers]
