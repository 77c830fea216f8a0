"""Fitted deltas leave their device beside its work, here one that copies when it is waited for and not before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest, RunInterrupted
from fastedit.backbone import EditableModel, Site
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.kinds import new_stack
from fastedit.engine import Run, run_state
from fastedit.engine.leaving import MOST_BYTES, Leaving
from fastedit.engine.memory.footprint import Sizes, delta_parameters, phase_parts
from fastedit.engine.memory.workload import measure_workload
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.run_state import EndedEdits
from fastedit.fitting.solver import FitOutcome
from fastedit.objectives import NLLObjective, Role
from tests.engine.conftest import assert_scored_alike, make_edits
from tests.engine.test_train import SMALL, train

SPEC = DeltaSpec("full", (Site(0, "down", "layers.0.down", 5, 3),))
OUTCOME = FitOutcome("max_steps", 3, 0.1, 0.2)
#: Bytes of a delta of that spec, in float32.
SIZE = 5 * 3 * 4


class LateEvent:
    """The end of a copy that is made when it is waited for, or when it is told to go on."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self.copy, self.is_over, self.waited = copy, False, 0

    def query(self) -> bool:
        return self.is_over

    def go_on(self) -> None:
        if not self.is_over:
            self.copy()
        self.is_over = True

    def synchronize(self) -> None:
        self.waited += 1
        self.go_on()


class LateCopies:
    """Copies that end late, to memory that has other values until then."""

    def __init__(self) -> None:
        self.events: list[LateEvent] = []

    def buffer(self, like: Tensor) -> Tensor:
        return torch.full(like.shape, 1 if like.dtype == torch.bool else 777, dtype=like.dtype)

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> LateEvent:
        def copy() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        self.events.append(LateEvent(copy))
        return self.events[-1]


class Kept:
    """What has arrived; of one edit it cannot be kept the first ``failures`` times."""

    def __init__(self, fails: int | None = None, failures: int = 1) -> None:
        self.edits: dict[int, tuple[EditDelta, FitOutcome]] = {}
        self.fails, self.failures = fails, failures

    def __call__(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        if number == self.fails and self.failures:
            self.failures -= 1
            raise OSError("the disk is full")
        self.edits[number] = delta, outcome


def leaving_to(kept: Kept, most_bytes: int = MOST_BYTES) -> tuple[Leaving, LateCopies]:
    copies = LateCopies()
    device = torch.device("cpu")
    return Leaving(device, kept, PhaseTimer(device), most_bytes=most_bytes, copies=copies), copies


def delta_of(number: int) -> EditDelta:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(number))
    return EditDelta(SPEC, {"0.down:delta": values}, request_id=f"edit-{number}")


def assert_equal(found: EditDelta, expected: EditDelta) -> None:
    assert found.id == expected.id
    assert found.request_id == expected.request_id


def test_nothing_is_read_before_its_copy_has_ended() -> None:
    kept = Kept()
    leaving, copies = leaving_to(kept)
    fitted = [leaving.send(number, delta_of(number), OUTCOME) for number in range(3)]
    leaving.poll()
    assert not kept.edits
    # The second is there, but the first is not
    copies.events[1].go_on()
    leaving.poll()
    assert not kept.edits
    copies.events[0].go_on()
    leaving.poll()
    assert list(kept.edits) == [0, 1]
    leaving.land()
    assert [event.waited for event in copies.events] == [1, 1, 1]
    assert list(kept.edits) == [0, 1, 2]
    for number, (delta, outcome) in kept.edits.items():
        assert_equal(delta, delta_of(number))
        assert outcome is OUTCOME
        assert fitted[number].in_memory is delta
        assert_equal(fitted[number].nearest, delta_of(number))


def test_slots_are_refilled_before_the_copy_has_ended() -> None:
    kept = Kept()
    leaving, _ = leaving_to(kept)
    stacked = new_stack(SPEC, 1)
    for number in range(3):
        stacked.set(0, delta_of(number).tensors)
        leaving.send(number, stacked.unstack(0, request_id=f"edit-{number}"), OUTCOME)
        stacked.restart([0])
    leaving.land()
    for number, (delta, _) in kept.edits.items():
        assert_equal(delta, delta_of(number))


def test_no_more_than_so_many_bytes_are_on_the_device() -> None:
    kept = Kept()
    leaving, copies = leaving_to(kept, most_bytes=2 * SIZE)
    waiting = []
    for number in range(4):
        waiting.append(leaving.send(number, delta_of(number), OUTCOME))
        assert leaving.device_bytes == SIZE * min(number + 1, 2)
    # The later ones left at once, as those before them wait to be scored
    assert [fitted.on_device is None for fitted in waiting] == [False, False, True, True]
    assert list(kept.edits) == [0, 1, 2, 3]
    for number, fitted in enumerate(waiting):
        assert_equal(fitted.nearest, delta_of(number))
    del waiting[0], fitted
    assert leaving.device_bytes == SIZE
    waiting.append(leaving.send(4, delta_of(4), OUTCOME))
    assert copies.events[-1].waited == 0
    assert leaving.device_bytes == 2 * SIZE
    leaving.release()
    assert leaving.device_bytes == 0
    for number, fitted in enumerate(waiting, start=1):
        assert_equal(fitted.nearest, delta_of(number))


def test_one_that_has_no_room_waits_for_those_before_it_alone() -> None:
    kept = Kept(fails=0)
    leaving, copies = leaving_to(kept, most_bytes=SIZE)
    leaving.send(0, delta_of(0), OUTCOME)
    # Nobody has a use for the first any more: there is room once it has arrived
    with pytest.raises(OSError, match="the disk is full"):
        leaving.send(1, delta_of(1), OUTCOME)
    leaving.land()
    # The one that was not sent is not kept: it is fitted again
    assert not kept.edits
    assert leaving.send(2, delta_of(2), OUTCOME).on_device is not None
    assert [event.waited for event in copies.events] == [1, 0]


def test_values_that_are_not_finite_become_none_where_they_are_and_are_told_with_the_copy() -> None:
    kept = Kept()
    leaving, _ = leaving_to(kept)
    for number, value in enumerate((math.inf, 1.0, math.nan)):
        delta = delta_of(number)
        delta.tensors["0.down:delta"][1, 2] = value
        fitted = leaving.send(number, delta, OUTCOME)
        assert bool(fitted.nearest.tensors["0.down:delta"].isfinite().all())
    leaving.land()
    assert [outcome.status for _, outcome in kept.edits.values()] == ["diverged", "max_steps", "diverged"]
    assert [bool(delta.tensors["0.down:delta"].any()) for delta, _ in kept.edits.values()] == [False, True, False]


def test_one_that_cannot_be_kept_is_dropped_and_holds_up_no_other() -> None:
    kept = Kept(fails=1)
    leaving, _ = leaving_to(kept)
    for number in range(3):
        leaving.send(number, delta_of(number), OUTCOME)
    with pytest.raises(OSError, match="the disk is full"):
        leaving.land()
    assert list(kept.edits) == [0, 2]
    leaving.land()
    # As it is fitted again, it must not arrive twice
    assert list(kept.edits) == [0, 2]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """In the test all runs leave late."""
    copies = LateCopies()
    monkeypatch.setattr(run_state, "Leaving", partial(Leaving, copies=copies))
    return copies


def run(model: EditableModel, edits: Sequence[EditRequest], method: str, **settings: Any) -> Run:
    of_method: dict[str, Any] = {"layers": 2, "steps": 4}
    if method in ("grace", "tpatcher"):
        of_method = {"pool": make_edits(7)[5:], "steps": 4}
    if method == "mend":
        of_method = {**SMALL, "artifact": train(model)}
    settings = {**of_method, "batch_size": 2, "show_progress": False, **settings}
    return fastedit.edit(model, edits, method, **settings)


@pytest.fixture(scope="module")
def at_once(exact_model: EditableModel, edits: list[EditRequest]) -> Callable[..., Run]:
    """Runs whose deltas leave at once."""
    runs: dict[tuple[str, str], Run] = {}

    def made(method: str, mode: str) -> Run:
        if (method, mode) not in runs:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(run_state, "Leaving", Leaving)
                runs[method, mode] = run(exact_model, edits, method, mode=mode)
        return runs[method, mode]

    return made


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("method", ["ft", "lora", "grace", "tpatcher", "mend"])
def test_runs_are_equal_to_the_bit(
    exact_model: EditableModel,
    edits: list[EditRequest],
    at_once: Callable[..., Run],
    late: LateCopies,
    method: str,
    mode: str,
) -> None:
    expected = at_once(method, mode)
    found = run(exact_model, edits, method, mode=mode)
    assert len(late.events) == len(edits)
    assert [delta.id for delta in found.deltas] == [delta.id for delta in expected.deltas]
    assert [delta.fitted_on for delta in found.deltas] == [delta.fitted_on for delta in expected.deltas]
    assert found.outcomes == expected.outcomes
    assert found.edit_scores == expected.edit_scores


def assert_scored_once_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EndedEdits.keep_scores

    def seen(self: EndedEdits, state: str, scores: dict[int, Any]) -> None:
        assert set(scores) <= set(self.outcomes)
        plain(self, state, scores)

    monkeypatch.setattr(EndedEdits, "keep_scores", seen)


def test_a_ledger_has_what_left_late_and_scores_only_of_what_it_has(
    exact_model: EditableModel,
    edits: list[EditRequest],
    at_once: Callable[..., Run],
    late: LateCopies,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = at_once("lora", "single")
    assert_scored_once_kept(monkeypatch)
    with fastedit.open_ledger(tmp_path / "edits", exact_model) as ledger:
        found = run(exact_model, edits, "lora", ledger=ledger)
        assert [delta.id for delta in found.deltas] == [delta.id for delta in expected.deltas]
        assert found.edit_scores == expected.edit_scores
    assert len(late.events) == len(edits)


def test_an_error_loses_no_edit_that_was_on_its_way(
    exact_model: EditableModel, late: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = make_edits(4)
    plain = NLLObjective.__call__

    def failing(self: NLLObjective, tokens: Any, steps: Tensor) -> Any:
        # The first two have ended, the next two are at work
        if len(late.events) == 2 and int(steps.max()) == 2:
            raise ArithmeticError("of a test")
        return plain(self, tokens, steps)

    monkeypatch.setattr(NLLObjective, "__call__", failing)
    with pytest.raises(RunInterrupted, match="2 of 4 edits are finished") as caught:
        run(exact_model, edits, "lora", evaluate=False)
    assert caught.value.numbers == (0, 1)
    monkeypatch.undo()
    expected = run(exact_model, edits[:2], "lora", evaluate=False)
    assert [delta.id for delta in caught.value.run.deltas] == [delta.id for delta in expected.deltas]


@pytest.mark.parametrize("fails", [(1,), (1, 3), (0, 1)])
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_memory_that_runs_out_when_one_arrives_changes_nothing(
    exact_model: EditableModel,
    edits: list[EditRequest],
    at_once: Callable[..., Run],
    late: LateCopies,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    fails: tuple[int, ...],
) -> None:
    expected = at_once("lora", mode)
    plain, calls = EndedEdits.keep, []

    def failing(self: EndedEdits, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        calls.append(number)
        if number in fails and calls.count(number) == 1:
            raise MemoryError("std::bad_alloc")
        plain(self, number, delta, outcome)

    monkeypatch.setattr(EndedEdits, "keep", failing)
    assert_scored_once_kept(monkeypatch)
    with pytest.warns(RuntimeWarning, match="memory ran out"):
        found = run(exact_model, edits, "lora", mode=mode)
    # It is fitted again, now beside others
    assert set(calls) == {0, 1, 2, 3, 4}
    assert len(calls) == 5 + len(fails)
    for delta, wanted in zip(found.deltas, expected.deltas, strict=True):
        for part, values in wanted.tensors.items():
            torch.testing.assert_close(delta.tensors[part], values, rtol=1e-5, atol=1e-7)
    assert_scored_alike(found.edit_scores, expected.edit_scores, rel=1e-9, abs=1e-12)


def test_the_plan_of_a_gpu_counts_what_has_not_left(model: EditableModel, edits: list[EditRequest]) -> None:
    sites = tuple(model.sites(range(model.n_layers - 1, model.n_layers), ["down"]))
    spec = DeltaSpec("full", sites)
    work = measure_workload(model, (Role.EDIT,), edits, evaluate=False, tokens_per_row=None)

    def fit(parameters: int, *, on_cpu: bool) -> dict[str, int]:
        sizes = Sizes.of(model, spec)
        return phase_parts(
            model, sizes, work, batch_size=3, parameters=parameters, evaluate=False, locality=0, on_cpu=on_cpu
        )["fit"]

    parameters = delta_parameters(spec)
    assert fit(parameters, on_cpu=False)["fitted deltas on the device"] == 3 * 4 * parameters
    assert fit(1 << 30, on_cpu=False)["fitted deltas on the device"] == MOST_BYTES
    assert "fitted deltas on the device" not in fit(parameters, on_cpu=True)
