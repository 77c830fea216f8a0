"""What would make the host wait for a GPU is seen on the CPU; a step of a fit asks for one value, or for none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.engine import fit_problem
from fastedit.engine.profiling.dispatches import Dispatches
from fastedit.fitting.solver import Losses
from tests.engine.conftest import make_edits

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 1).any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 1],
    "written by mask": lambda x: x.clone().__setitem__(x > 1, 0.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeats": lambda x: torch.repeat_interleave(x.long()),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "where with a number": lambda x: torch.where(x > 1, x, 0.0),
    "known repeats": lambda x: torch.repeat_interleave(x.long(), output_size=6),
    "numbers": lambda x: x[torch.arange(2)],
    "parts": lambda x: x[:2].view(2, 1).expand(2, 3),
    "filled": lambda x: x[1:].clone().zero_(),
}
UPLOADS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: torch.tensor([1, 2]),
    "as_tensor": lambda x: torch.as_tensor([1.0]),
    "list": lambda x: x[[0, 2]],
}


@pytest.mark.parametrize("name", [*WAITS, *FREE, *UPLOADS])
def test_waits_and_uploads_are_told(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with Dispatches() as counted:
        counted.part = "it"
        ({**WAITS, **FREE, **UPLOADS})[name](x)
    assert bool(counted.waits.get("it")) == (name in WAITS), counted.waits
    assert bool(counted.uploads.get("it")) == (name in UPLOADS), counted.uploads
    for _, where in (*counted.waits.get("it", ()), *counted.uploads.get("it", ())):
        assert "test_dispatches" in where
    if name == "parts":
        assert counted.count("it") == 0


def test_what_keeps_a_part_from_being_replayed_is_told() -> None:
    state, weight, short = torch.zeros(3), torch.ones(3), torch.ones(2)
    kept: list[Tensor] = [state]
    with Dispatches() as counted:
        for part in ("first", "same", "other address", "other shape", "more"):
            counted.part = part
            state.add_(weight * 2)
            kept[0].mul_(1)
            if part == "other shape":
                (short * 2).sum()
            elif part == "more":
                (weight * 2).sum().abs()
            else:
                (weight * 2).sum()
            counted.part = "between"
            kept[0] = torch.zeros(3) if part == "same" else kept[0]
    assert counted.differences("first", "same") == []
    assert "mul_ reads what lies elsewhere" in counted.differences("first", "other address")[0]
    assert any("(2,)" in told for told in counted.differences("first", "other shape"))
    assert any("ops" in told for told in counted.differences("first", "more"))


@contextmanager
def by_step(counted: Dispatches, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count by step of the fits in the block; yields the steps at which no batch was put together."""
    plain, assembled = fit_problem.FitProblem.losses, fit_problem.FitProblem._assembled
    steps: list[int] = []
    at = [0]

    def losses(self: fit_problem.FitProblem, taken: Tensor) -> Losses:
        at[0] += 1
        counted.part = at[0]
        steps.append(at[0])
        return plain(self, taken)

    def anew(self: fit_problem.FitProblem) -> Any:
        steps.remove(at[0])
        return assembled(self)

    monkeypatch.setattr(fit_problem.FitProblem, "losses", losses)
    monkeypatch.setattr(fit_problem.FitProblem, "_assembled", anew)
    with counted:
        yield steps


@pytest.fixture(scope="module")
def small() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


STEPS = 9
METHODS = ["ft", "lora", "kl+lora", "kl+ft", "odedit+lora", "odedit+ft", "grace", "wise", "tpatcher", "unike", "ldke"]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_at_most_once(
    method: str, every: int, small: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of the steps between those at which edits are looked at; nothing is sent either.

    A recording of a step could be replayed as the next one: the same ops on the same shapes, whose inputs from outside
    lie where they lay.
    """
    settings: dict[str, Any] = {}
    if method in ("unike", "ldke"):
        trainer = {"steps": 1, "batch_size": 4, "valid_every": 1}
        settings["artifact"] = fastedit.train(
            small, method, make_edits(12), trainer=trainer, valid_records=3, show_progress=False
        )
    counted = Dispatches()
    with by_step(counted, monkeypatch) as steps:
        fastedit.edit(
            small, make_edits(3), method, steps=STEPS, stop_loss=1e-9, batch_size=3, evaluate=False,
            check_every=every, **settings,
        )  # fmt: skip
    # The last one ends the fit
    steady = [step for step in steps if step < STEPS]
    assert len(steady) >= STEPS - 3
    for step in steady:
        allowed = int(step % every == 0)
        assert len(counted.waits.get(step, ())) <= allowed, counted.waits[step]
        assert not counted.uploads.get(step), counted.uploads[step]
    if every == 1:
        assert counted.differences(steady[-2], steady[-1]) == []
