"""Shards are handed out, and handed out again, without any process."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext

import pytest

from fastedit.engine.parallel.dispatch import MOST_FAILURES, MOST_STARTS, Dispatch, Lost
from fastedit.engine.parallel.worker import Shard, ShardResult
from fastedit.fitting.solver import FitOutcome

OUTCOME = FitOutcome("converged", 1, 0.0, 0.0)


class Died(RuntimeError):
    """What a fake worker's futures raise once it is gone."""


class Fake:
    """A worker that does at once what it is told, or dies of it."""

    def __init__(self, starts: Callable[[], bool], make: Callable[[Shard], ShardResult]) -> None:
        self.starts, self.make_shard, self.closed = starts, make, False

    def start(self) -> Future[int]:
        return _settled(1) if self.starts() else _settled(error=Died("gone"))

    def make(self, shard: bytes) -> Future[bytes]:
        assert not self.closed
        try:
            return _settled(pickle.dumps(self.make_shard(pickle.loads(shard))))
        except Exception as error:
            return _settled(error=error)

    def close(self) -> None:
        self.closed = True


def _settled(value: object = None, error: Exception | None = None) -> Future:  # type: ignore[type-arg]
    future: Future[object] = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


def dispatched(
    make: Callable[[Shard], ShardResult], listed: list[list[int]], starts: Callable[[], bool] = lambda: True
) -> tuple[list[int], dict[int, str], Dispatch]:
    taken: list[int] = []
    aside: dict[int, str] = {}
    work = Dispatch(
        lambda _place: Fake(starts, make), 2, lambda error: isinstance(error, Died), nullcontext,
        lambda result: taken.extend(result.made), aside.__setitem__,
    )  # fmt: skip
    work.run([Shard(numbers) for numbers in listed])
    return taken, aside, work


def made(numbers: list[int], reason: str = "") -> ShardResult:
    return ShardResult(dict.fromkeys(numbers, (None, OUTCOME, None)), reason)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_nothing_is_taken_twice_whenever_workers_die(seed: int) -> None:
    rng = random.Random(seed)
    kills = iter([True] * 7)

    def make(shard: Shard) -> ShardResult:
        # Single edits are spared: that one is hit three times is what sets it aside
        if len(shard.numbers) > 1 and rng.random() < 0.5 and next(kills, False):
            raise Died("gone")
        return made(list(shard.numbers))

    taken, aside, work = dispatched(make, [list(range(n, n + 5)) for n in range(0, 60, 5)])
    assert sorted(taken) == list(range(60))
    assert aside == {}
    assert work.lost == 7 - sum(kills)


@pytest.mark.parametrize("dies", [False, True])
def test_an_edit_that_always_fails_is_set_aside_alone(dies: bool) -> None:
    alone = 0

    def make(shard: Shard) -> ShardResult:
        nonlocal alone
        if 4 not in shard.numbers:
            return made(list(shard.numbers))
        alone += list(shard.numbers) == [4]
        if dies:
            raise Died("gone")
        # What was finished before it is given back
        return made([number for number in shard.numbers if number < 4], "ValueError: of this one")

    taken, aside, _ = dispatched(make, [[0, 1, 2], [3, 4, 5, 6]])
    assert sorted(taken) == [0, 1, 2, 3, 5, 6]
    assert aside == {4: "the worker's process died" if dies else "ValueError: of this one"}
    assert alone == MOST_FAILURES


def test_workers_that_die_as_they_start_end_the_run() -> None:
    starts = 0

    def start() -> bool:
        nonlocal starts
        starts += 1
        return False

    with pytest.raises(Lost, match="workers live until they have loaded the model"):
        dispatched(lambda shard: made(list(shard.numbers)), [[0], [1]], start)
    assert starts <= 2 + MOST_STARTS


def test_what_is_no_edits_fault_ends_the_run() -> None:
    def make(_shard: Shard) -> ShardResult:
        raise ValueError("the method's setup")

    with pytest.raises(ValueError, match="the method's setup"):
        dispatched(make, [[0], [1]])
