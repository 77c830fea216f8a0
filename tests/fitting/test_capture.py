"""Steps that are replayed give the same deltas; what is replayed asks and sends nothing, and is recorded when it must.

There is no GPU here. The recorder of these tests keeps the ops of a step with the tensors that they read and write, and
replays them without any of the code between, as a CUDA graph does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastedit
from fastedit.backbone import EditableModel
from fastedit.engine import Run, fit_problem
from fastedit.engine.profiling.dispatches import Dispatches
from fastedit.fitting import capture
from fastedit.fitting.capture import WARM_UP, Step, StepCapture
from fastedit.fitting.solver import SolverConfig, fit, no_phase
from tests.engine.conftest import make_edits
from tests.fitting.test_solver import Regression


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The ops inside its block, each with what it was given and what it returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Compute the same again, into the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                inside = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
                again = func(*args, **kwargs)
                for tensor, value in zip(tensors(out), tensors(again), strict=True):
                    # Views, and what was written in place, are there already
                    if tensor.untyped_storage().data_ptr() not in inside:
                        tensor.detach().copy_(value)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Replays:
    """Records on the CPU by the rules of a GPU, and counts."""

    def __init__(self) -> None:
        self.eager_steps = self.recordings = self.replays = self.forgotten = 0

    def eager(self, step: Step) -> Tensor:
        self.eager_steps += 1
        return step()

    def record(self, step: Step) -> tuple[Tensor, Callable[[], object]]:
        tape = Tape()
        with Dispatches() as counted, tape:
            out = step()
        against = [*counted.waits.get("", ()), *counted.uploads.get("", ())]
        if against:
            raise RuntimeError(f"a recorded step asks and sends nothing (got {against})")
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return out, replay

    def forget(self) -> None:
        self.forgotten += 1


@contextmanager
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Replays, Counter[Hashable]]]:
    """Inside the block fits replay their steps; yields what counts them, and the steps by arrangement and branch."""
    recorder, keys = Replays(), Counter[Hashable]()
    plain = fit_problem.FitProblem.next_step

    def next_step(self: fit_problem.FitProblem) -> tuple[int, Hashable]:
        key = plain(self)
        keys[id(self), *key] += 1
        return key

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(capture, "recorder_for", lambda _device: recorder)
        patched.setattr(fit_problem.FitProblem, "next_step", next_step)
        yield recorder, keys


def same(one: Run, two: Run) -> None:
    assert [repr(outcome) for outcome in two.outcomes] == [repr(outcome) for outcome in one.outcomes]
    for delta, other in zip(one.deltas, two.deltas, strict=True):
        assert delta.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(delta.tensors[name], other.tensors[name]) for name in delta.tensors)


METHODS: dict[str, dict[str, Any]] = {
    "ft": {"steps": 16, "lr": 3e-3, "stop_loss": 1.0},
    "lora": {"steps": 16, "lr": 1e-2, "stop_loss": 1.0},
    "kl+lora": {"steps": 16, "lr": 1e-2, "stop_loss": 1.0},
    "odedit+lora": {"steps": 16, "lr": 1e-2, "stop_loss": 1.0, "warmup": 0.4},
    "odedit+ft": {"steps": 16, "lr": 3e-3, "stop_loss": 1.0, "warmup": 0.4},
    "grace": {"steps": 16, "stop_loss": 1.0},
    "wise": {"steps": 16, "stop_loss": 1.0},
}


@pytest.fixture(scope="module")
def small() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_give_the_same_bits(
    method: str, every: int, small: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**METHODS[method], "batch_size": 2, "evaluate": False, "check_every": every}
    edits = make_edits(5)
    plain = fastedit.edit(small, edits, method, **settings)
    with replayed(monkeypatch) as (recorder, keys):
        other = fastedit.edit(small, edits, method, capture=True, **settings)
    same(plain, other)
    # More than two arrangements: edits took over slots
    assert len({arrangement for _, arrangement, _ in keys}) > 2
    assert recorder.recordings == sum(steps > WARM_UP for steps in keys.values()) > 1
    assert recorder.replays == sum(max(0, steps - WARM_UP - 1) for steps in keys.values()) > recorder.recordings
    assert recorder.eager_steps == sum(min(steps, WARM_UP) for steps in keys.values())


def test_a_penalty_that_is_switched_on_is_recorded_anew(small: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 16, "stop_loss": None, "batch_size": 2, "evaluate": False, "warmup": 0.5}
    with replayed(monkeypatch) as (recorder, keys):
        fastedit.edit(small, make_edits(2), "odedit+lora", capture=True, check_every=4, **settings)
    # Steps 0 to 7 before it, 8 is the one at which it starts, 9 to 15
    assert sorted(keys.values()) == [1, 7, 8]
    assert (recorder.recordings, recorder.replays) == (2, 16 - 2 * (WARM_UP + 1) - 1)


def by_hand(recorder: capture.Recorder) -> tuple[StepCapture, Tensor, Step]:
    state = torch.zeros(2)

    def step() -> Tensor:
        state.add_(1.0)
        return state * 2

    return StepCapture(recorder, no_phase), state, step


def test_another_arrangement_makes_recordings_void_and_another_branch_does_not() -> None:
    recorder = Replays()
    captured, state, step = by_hand(recorder)
    order = [*[(0, "a")] * 4, *[(0, "b")] * 4, (0, "a"), *[(1, "a")] * 3, (0, "a")]
    for count, key in enumerate(order, 1):
        assert captured.run(step, *key).tolist() == [2.0 * count] * 2
    assert state.tolist() == [float(len(order))] * 2
    # (0, a) and (0, b), then (1, a)
    assert recorder.recordings == 3
    assert recorder.replays == 3
    assert recorder.forgotten == 3


@pytest.mark.parametrize("breaks", ["asks", "sends"])
def test_a_step_that_asks_or_sends_is_refused(breaks: str) -> None:
    recorder = Replays()
    captured, state, plain = by_hand(recorder)

    def step() -> Tensor:
        if breaks == "asks":
            return plain() + float(state[0] * 0)
        return plain() + torch.tensor([0.0, 0.0])

    with pytest.raises(RuntimeError, match="a recorded step asks and sends nothing"):
        recorder.record(step)
    for _ in range(WARM_UP):
        captured.run(step, 0, None)
    with pytest.warns(UserWarning, match="a step could not be recorded, so none will be"):
        captured.run(step, 0, None)
    # Once only
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arrangement in (0, 1, 1, 1, 1):
            captured.run(step, arrangement, None)
    assert recorder.recordings == recorder.replays == 0


def test_a_fit_goes_on_without_recordings_where_none_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Replays):
        def record(self, step: Step) -> tuple[Tensor, Callable[[], object]]:
            raise RuntimeError("operation not permitted when stream is capturing")

    plain, other = Regression(3), Regression(3)
    fit(plain, plain.stacked, SolverConfig(steps=8, lr=0.03))
    monkeypatch.setattr(capture, "recorder_for", lambda _device: Refusing())
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        fit(other, other.stacked, SolverConfig(steps=8, lr=0.03, capture=True))
    assert torch.equal(other.stacked.flat, plain.stacked.flat)


def test_a_cpu_is_refused(small: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"capture needs an NVIDIA GPU.*got device='cpu'"):
        fastedit.edit(small, make_edits(1), "lora", capture=True, evaluate=False)


def test_layers_on_several_devices_are_refused(small: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # What it is where layers are on several devices, here all the same one
    monkeypatch.setattr(small, "layer_devices", (torch.device("cpu"),) * small.n_layers)
    with pytest.raises(ValueError, match=r"capture needs all layers on one device \(got layers on \['cpu'\]\)"):
        fastedit.edit(small, make_edits(1), "lora", capture=True, evaluate=False)
