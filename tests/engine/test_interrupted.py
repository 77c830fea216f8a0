"""Runs that something ends early, or nearly: memory that runs out once changes nothing; what is done is carried out."""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest, RunInterrupted, RunStopped
from fastedit.backbone import EditableModel
from fastedit.backbone.generation import Reader
from fastedit.engine import Run, fit_problem, schedule
from fastedit.engine.run_state import EndedEdits
from fastedit.ledger.segments import Segments
from tests.engine.test_editing import largest_difference
from tests.test_conformance import run

#: What torch on a CPU, on a GPU, C++ and the system say.
ERRORS: list[Callable[[], BaseException]] = [
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: MemoryError("std::bad_alloc"),
    lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
]
#: Parts of the work in which memory may run out.
PLACES: dict[str, tuple[Any, str]] = {
    "encode": (EditableModel, "encode"),
    "head": (EditableModel, "head"),
    "tail": (fit_problem, "packed_tail"),
    "read": (Reader, "read"),
    "extend": (Reader, "extend"),
    "decode": (Reader, "decode"),
    "stack": (schedule, "stack"),
    "keep": (EndedEdits, "keep"),
}
CASES = [(place, "lora") for place in PLACES]
CASES += [(place, name) for name in ("ft", "grace", "mend", "serac", "odedit+lora") for place in ("encode", "keep")]
#: Trained networks compute in float32, and another batch adds up in another order.
TOLERANCE = {"mend": 1e-4, "serac": 1e-6}


class Failing:
    """Calls of one function fail, from number ``first`` on, as many as ``count``."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        place: str,
        first: int,
        error: Callable[[], BaseException] = ERRORS[0],
        count: int = 1,
    ) -> None:
        owner, name = PLACES[place]
        real = getattr(owner, name)
        self.calls = self.failed = 0

        def call(*args: Any, **named: Any) -> Any:
            self.calls += 1
            if first <= self.calls < first + count:
                self.failed += 1
                raise error()
            return real(*args, **named)

        monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def exact() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


_undisturbed: dict[tuple[str, str, int], Run] = {}


def undisturbed(model: EditableModel, edits: list[EditRequest], name: str, mode: str) -> Run:
    key = name, mode, len(edits)
    if key not in _undisturbed:
        _undisturbed[key] = run(model, edits, name, mode=mode, evaluate=True)
    return _undisturbed[key]


def assert_same(found: Run, expected: Run, tolerance: float = 1e-8) -> None:
    assert [outcome.status for outcome in found.outcomes] == [outcome.status for outcome in expected.outcomes]
    assert largest_difference(list(found.deltas), list(expected.deltas)) < tolerance
    for one, other in zip(found.edit_scores, expected.edit_scores, strict=True):
        assert one.answers == other.answers
        assert dict(one.legacy) == pytest.approx(dict(other.legacy), abs=tolerance)
        assert dict(one.strict) == pytest.approx(dict(other.strict), abs=tolerance)


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize(("place", "name"), CASES)
def test_memory_that_runs_out_once_changes_nothing(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, name: str, mode: str, place: str
) -> None:
    expected = undisturbed(exact, edits[:2], name, mode)
    for number, first in enumerate((1, 3)):
        exact.forget()
        with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failing = Failing(patched, place, first, ERRORS[(number + len(place)) % 4])
            found = run(exact, edits[:2], name, mode=mode, evaluate=True)
        assert_same(found, expected, TOLERANCE.get(name, 1e-8))
        if not failing.failed:
            break
        assert any("memory ran out" in str(each.message) for each in caught)


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize(
    ("place", "name"),
    [("encode", "serac"), ("encode", "lora"), ("tail", "lora"), ("tail", "grace"), ("read", "grace"), ("keep", "lora")],
)
def test_memory_that_stays_short_leaves_what_is_done(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, name: str, mode: str, place: str
) -> None:
    expected = undisturbed(exact, edits[:3], name, mode)
    exact.forget()
    with monkeypatch.context() as patched:
        first = {"encode": 3, "tail": 8, "read": 2, "keep": 2}[place]
        failing = Failing(patched, place, first, count=10**6)
        message = pytest.warns(RuntimeWarning, match="trying once more")
        with message, pytest.raises((RunInterrupted, RuntimeError)) as caught:
            run(exact, edits[:3], name, mode=mode, evaluate=True, batch_size=1)
    assert failing.failed
    if not isinstance(caught.value, RunInterrupted):
        assert mode == "sequential" or place == "encode", "nothing was finished"
        return
    kept = caught.value.run
    assert kept is not None
    assert len(kept.deltas) == len(caught.value.numbers) == len(kept.outcomes) >= 1
    assert kept.provenance["finished"] == {"edits": list(caught.value.numbers), "of": 3}
    wanted = [list(expected.deltas)[number] for number in caught.value.numbers]
    assert largest_difference(list(kept.deltas), wanted) < TOLERANCE.get(name, 1e-8)


def test_the_error_says_what_ended_it_and_where_the_edits_are(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = r"2 of 4 edits are finished and in this error's 'run'; they are committed in the ledger '.*edits', from"
    ledger = fastedit.open_ledger(tmp_path / "edits", exact)
    with monkeypatch.context() as patched:
        Failing(patched, "keep", 3, count=10**6)
        with pytest.warns(RuntimeWarning), pytest.raises(RunInterrupted, match=message) as caught:
            run(exact, edits[:4], "lora", batch_size=1, ledger=ledger)
    error = caught.value
    assert "can't allocate memory" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    assert error.numbers == (0, 1)
    assert len(ledger) == 2
    assert pickle.loads(pickle.dumps(RunInterrupted("why", None, (1,)))).numbers == (1,)

    # They act and are saved as those of any run
    assert error.run is not None
    with fastedit.applied(exact, error.run.deltas[0]):
        exact.answer(edits[0].image, edits[0].prompt)
    again = Run.load(error.run.save(tmp_path / "saved"))
    assert [delta.request_id for delta in again.deltas] == [edit.id for edit in edits[:2]]
    whole = run(exact, edits[:4], "lora", batch_size=1)
    assert largest_difference(list(again.deltas), list(whole.deltas)[:2]) == 0


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("place", ["keep", "encode", "head", "read"])
def test_a_signal_leaves_what_is_done(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, mode: str, place: str
) -> None:
    exact.forget()
    expected = undisturbed(exact, edits[:3], "lora", mode)
    exact.forget()
    with monkeypatch.context() as patched:
        Failing(patched, place, {"keep": 3, "encode": 3, "head": 6, "read": 2}[place], KeyboardInterrupt)
        with pytest.raises(RunStopped, match=r"the run ended early; . of 3 edits are finished") as caught:
            run(exact, edits[:3], "lora", mode=mode, evaluate=True, batch_size=1)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception), "except Exception is not to catch Ctrl-C"
    kept = caught.value.run
    assert kept is not None
    assert len(kept.deltas) >= 1
    wanted = [list(expected.deltas)[number] for number in caught.value.numbers]
    assert largest_difference(list(kept.deltas), wanted) < 1e-8
    # What was scored keeps its scores, what was not has none
    for number, scores in zip(caught.value.numbers, kept.edit_scores, strict=False):
        assert not scores.strict or scores.strict == pytest.approx(dict(expected.edit_scores[number].strict), abs=1e-8)


def test_before_the_first_edit_is_done_the_error_itself_leaves(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kind in ((KeyboardInterrupt, KeyboardInterrupt), (lambda: ValueError("bad"), ValueError)):
        with monkeypatch.context() as patched:
            Failing(patched, "tail", 1, error)
            with pytest.raises(kind) as caught:
                run(exact, edits[:3], "lora")
        assert type(caught.value) is kind


def test_an_error_of_any_kind_loses_no_edit(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, "keep", 3, lambda: OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunInterrupted, match=r"2 of 3 edits are finished .*No space left on device") as caught:
        run(exact, edits[:3], "lora", mode="sequential")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.run is not None
    assert len(caught.value.run.deltas) == 2


def test_an_edit_that_no_file_takes_is_not_finished(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ledger = fastedit.open_ledger(tmp_path / "edits", exact)
    real, calls = Segments.write, []

    def write(self: Segments, *args: Any) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Segments, "write", write)
        with pytest.raises(RunInterrupted, match="No space left on device") as caught:
            run(exact, edits[:3], "lora", batch_size=1, ledger=ledger)
    assert caught.value.run is not None
    assert [delta.request_id for delta in caught.value.run.deltas] == [edit.id for edit in edits[:2]]
    again = run(exact, edits[:3], "lora", batch_size=1, ledger=ledger)
    assert largest_difference(list(again.deltas), list(run(exact, edits[:3], "lora", batch_size=1).deltas)) == 0


def test_a_sequence_keeps_the_scores_of_its_checkpoints(
    exact: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(exact, edits[:3], "lora", mode="sequential", evaluate=True, score_at=(1, 2))
    with monkeypatch.context() as patched:
        Failing(patched, "keep", 3, KeyboardInterrupt)
        with pytest.raises(RunStopped) as caught:
            run(exact, edits[:3], "lora", mode="sequential", evaluate=True, score_at=(1, 2))
    assert caught.value.run is not None
    assert caught.value.run.checkpoints == {count: whole.checkpoints[count] for count in (1, 2)}
