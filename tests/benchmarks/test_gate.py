"""The gate lets sound implementations through and refuses broken ones, whatever is broken in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import gate, harness, implementations
from benchmarks.cases import Case
from benchmarks.gate import GateError
from benchmarks.outcome import Fitted
from fastedit.backbone import EditableModel, load
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting import solver
from fastedit.requests import EditRequest


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return load("random:qwen2vl-tiny")


def with_engine(monkeypatch: pytest.MonkeyPatch, change: Callable[[Fitted], Fitted]) -> None:
    """Let the engine's results be changed on their way out."""

    def broken(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
        return change(implementations.engine(model, edits, case))

    table: Mapping[str, Any] = {**implementations.IMPLEMENTATIONS, "engine": broken}
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", table)


def test_sound_implementations_pass(tiny: Case, model: EditableModel) -> None:
    case = replace(tiny, method="lora")
    report = gate.check_exact(case)
    assert 0 <= report.largest["engine"] < 1e-10
    assert report.model == case.model
    assert gate.check_scores(case, model).keys() == {"plain_loop", "engine"}


def test_without_a_baseline_there_is_nothing_to_check(tiny: Case, model: EditableModel) -> None:
    alone = replace(tiny, baselines=())
    assert gate.check_exact(alone).largest == {}
    assert gate.check_scores(alone, model) == {}


def test_an_optimiser_that_steps_too_far_is_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def further(step: Callable[..., Any], rate: int) -> Callable[..., Any]:
        # One part in a million more
        return lambda *args, **options: step(*args[:rate], args[rate] * (1 + 1e-6), *args[rate + 1 :], **options)

    for name, rate in (("adam_step_", 5), ("adam_step_outer_", 7)):
        monkeypatch.setattr(solver, name, further(getattr(solver, name), rate))
    with pytest.raises(GateError, match="engine and plain_loop do not fit the same delta in float64: edit 0, part"):
        gate.check_exact(tiny)


def test_edits_that_leak_into_each_other_are_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(fitted: Fitted) -> Fitted:
        return replace(fitted, deltas=fitted.deltas[::-1])

    with_engine(monkeypatch, swapped)
    with pytest.raises(GateError, match="do not fit the same delta"):
        gate.check_exact(tiny)


def test_nan_is_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(fitted: Fitted) -> Fitted:
        for tensor in fitted.deltas[1].tensors.values():
            tensor.view(-1)[0] = float("nan")
        return fitted

    with_engine(monkeypatch, spoiled)
    with pytest.raises(GateError, match="edit 1"):
        gate.check_exact(tiny)


def test_a_fit_that_ends_otherwise_is_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(fitted: Fitted) -> Fitted:
        return replace(fitted, outcomes=[replace(end, steps=end.steps - 1) for end in fitted.outcomes])

    with_engine(monkeypatch, shorter)
    with pytest.raises(GateError, match="end edit 0 differently: max_steps after 2 steps"):
        gate.check_exact(tiny)


def test_a_missing_edit_is_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, lambda fitted: replace(fitted, deltas=fitted.deltas[:1]))
    with pytest.raises(GateError, match="engine made 1 edits, plain_loop 2"):
        gate.check_exact(tiny)


def test_other_scores_are_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "EDITS", 1)

    def flattered(fitted: Fitted) -> Fitted:
        scores = [replace(s, strict={**s.strict, "text_locality": 0.5}) for s in fitted.scores]
        return replace(fitted, scores=scores)

    with_engine(monkeypatch, flattered)
    with pytest.raises(GateError, match=r"score edit 0 differently: strict text_locality is 0\.5"):
        gate.check_exact(replace(tiny, evaluate=True))


def test_idle_implementations_are_refused(tiny: Case) -> None:
    with pytest.raises(GateError, match="plain_loop changed nothing"):
        gate.check_exact(replace(tiny, steps=0))


def test_lost_accuracy_is_refused(tiny: Case, model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(tiny, steps=30)
    assert gate.check_scores(case, model)["engine"] == 1.0

    def undone(fitted: Fitted) -> Fitted:
        for delta in fitted.deltas:
            for tensor in delta.tensors.values():
                tensor.zero_()
        return fitted

    with_engine(monkeypatch, undone)
    with pytest.raises(GateError, match="do not score alike in float32: edit 0 has 0 of"):
        gate.check_scores(case, model)


def test_large_models_are_checked_on_a_small_relative(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def loaded(name: str, **options: Any) -> EditableModel:
        asked.append(f"{name} {options['dtype']} {options['quantize']}")
        return load(name, **options)

    monkeypatch.setattr(gate.fastedit, "load", loaded)
    case = replace(tiny, model="random:llava-1.5-7b", dtype="bfloat16", quantize="nf4")
    assert gate.check_exact(case).model == "random:llava-tiny"
    assert asked == ["random:llava-tiny float64 none"]


def test_nothing_is_timed_when_the_gate_is_shut(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(harness, "_run_once", lambda *args: timed.append(args[3]))
    with_engine(monkeypatch, lambda fitted: replace(fitted, deltas=fitted.deltas[:1]))
    with pytest.raises(GateError):
        harness.run_case(tiny, with_memory=False)
    assert timed == []


def test_phases_do_not_nest() -> None:
    # Sums over phases are shares of the whole only then.
    timer = PhaseTimer()
    with timer.phase("a"):
        torch.zeros(1)
    assert set(timer.seconds) == {"a"}
