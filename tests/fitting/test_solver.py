"""The masked loop against torch's own optimiser, one edit at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows
from fastedit.deltas.kinds import new_stack
from fastedit.fitting.solver import FitOutcome, SolverConfig, fit, no_phase
from fastedit.objectives import Losses


class Regression:
    """Per-edit least squares with known data: edit b fits ``x_b W_b = y_b``."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 6, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(size, 6, 3, generator=generator, dtype=torch.float64)
        self.stacked = new_stack(DeltaSpec("full", (Site(0, "up", "up", 4, 3),)), size, dtype=torch.float64)
        self.waiting = list(range(size))
        self.outcomes: dict[int, FitOutcome] = {}
        self.ends: list[list[int]] = []

    def next_step(self) -> tuple[None, None]:
        return None, None

    def losses(self, steps: Tensor) -> Losses:
        size = self.stacked.size
        out = self.stacked.delta(0, self.x.view(-1, 4), Rows((6,) * size)).view(size, 6, 3)
        total = (out - self.y).square().mean((1, 2))
        return Losses(total, total.detach(), torch.ones(size, dtype=torch.bool))

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        self.ends.append(sorted(outcomes))
        self.outcomes.update(outcomes)

    def started(self, places: Sequence[int]) -> None:
        """Nothing."""

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        entering, self.waiting = self.waiting, []
        return entering

    def phase(self, name: str) -> AbstractContextManager[None]:
        return no_phase(name)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_adamw_on_each_edit(clip: float | None, decay: float) -> None:
    problem = Regression(3)
    config = SolverConfig(steps=25, lr=0.03, clip=clip, weight_decay=decay, stop_loss=None)
    fit(problem, problem.stacked, config)
    outcomes = [problem.outcomes[b] for b in range(3)]
    assert [o.steps for o in outcomes] == [25] * 3
    for b in range(3):
        weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([weight], lr=0.03, weight_decay=decay)
        for _ in range(25):
            optimiser.zero_grad()
            (problem.x[b] @ weight.T - problem.y[b]).square().mean().backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([weight], clip)
            optimiser.step()
        torch.testing.assert_close(problem.stacked.parts["0.up:delta"][b], weight.detach(), atol=1e-12, rtol=1e-10)


def test_a_stopped_edit_keeps_every_bit_while_others_go_on() -> None:
    problem = Regression(3)
    problem.y[1] *= 0.01
    config = SolverConfig(steps=40, lr=0.03, clip=None, stop_loss=2e-2)
    snapshots: list[Tensor] = []
    original = problem.losses

    def watching(steps: Tensor) -> Losses:
        snapshots.append(problem.stacked.flat[1].clone())
        return original(steps)

    problem.losses = watching  # type: ignore[method-assign]
    fit(problem, problem.stacked, config)
    outcomes = problem.outcomes
    assert outcomes[1].status == "converged"
    assert outcomes[1].steps < outcomes[0].steps == 40
    assert all(torch.equal(s, problem.stacked.flat[1]) for s in snapshots[outcomes[1].steps :])
    assert problem.ends == [[1], [0, 2]]


class Queue(Regression):
    """More tasks than places: a task that ends makes room for the next one."""

    def __init__(self, tasks: int, places: int) -> None:
        super().__init__(tasks)
        self.all_x, self.all_y = self.x, self.y
        self.x, self.y = self.x[:places].clone(), self.y[:places].clone()
        self.stacked = new_stack(self.stacked.spec, places, dtype=torch.float64)
        self.task = [-1] * places
        self.found: dict[int, tuple[FitOutcome, Tensor]] = {}
        self.steps_seen: list[list[int]] = []

    def losses(self, steps: Tensor) -> Losses:
        self.steps_seen.append(steps.tolist())
        return super().losses(steps)

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        for place, outcome in outcomes.items():
            self.found[self.task[place]] = outcome, self.stacked.flat[place].clone()

    def started(self, places: Sequence[int]) -> None:
        """Nothing."""

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        entering = list(free)[: len(self.waiting)]
        for place in entering:
            self.task[place] = self.waiting.pop(0)
            self.x[place], self.y[place] = self.all_x[self.task[place]], self.all_y[self.task[place]]
        return entering


def test_an_edit_that_takes_over_a_place_comes_out_as_alone() -> None:
    config = SolverConfig(steps=40, lr=0.03, clip=0.5, weight_decay=0.01, stop_loss=2e-2)
    small = torch.tensor([1.0, 0.01, 0.3, 0.02, 1.0, 0.005, 0.4], dtype=torch.float64)[:, None, None]
    together, alone = Queue(7, 3), Queue(7, 1)
    for problem in (together, alone):
        problem.all_y *= small
        fit(problem, problem.stacked, config)
    assert sorted(together.found) == sorted(alone.found) == list(range(7))
    for task, (outcome, delta) in alone.found.items():
        assert (together.found[task][0].status, together.found[task][0].steps) == (outcome.status, outcome.steps)
        torch.testing.assert_close(together.found[task][1], delta, atol=1e-12, rtol=1e-10)
    # Places were at different steps, and fewer rounds were made than batches of three would take
    assert any(len(set(steps)) > 1 for steps in together.steps_seen)
    assert {outcome.status for outcome, _ in alone.found.values()} == {"converged", "max_steps"}


def test_no_steps_end_every_edit_as_it_began() -> None:
    problem = Queue(5, 2)
    fit(problem, problem.stacked, SolverConfig(steps=0))
    assert {outcome.status for outcome, _ in problem.found.values()} == {"max_steps"}
    assert sorted(problem.found) == list(range(5))
    assert all(float(delta.abs().max()) == 0 for _, delta in problem.found.values())


def test_radius_keeps_the_delta_in_its_ball() -> None:
    problem = Regression(2)
    fit(problem, problem.stacked, SolverConfig(steps=30, lr=0.1, clip=None, radius=0.05, stop_loss=None))
    assert problem.stacked.flat.abs().max() == pytest.approx(0.05)


class Rising(Queue):
    """One task whose loss is spoiled: NLL by step, totals and gradients that are not finite from a step on."""

    def __init__(self, nll: list[float], *, correct: bool = False, **first: int) -> None:
        super().__init__(2, 2)
        self.nll, self.correct = nll, correct
        self.first = {"loss_from": 9, "gradient_from": 9, "flat_from": 9, **first}

    def losses(self, steps: Tensor) -> Losses:
        plain = super().losses(steps)
        taken = int(steps[0])
        nll = plain.nll.clone()
        nll[0] = self.nll[taken]
        total = plain.total
        if taken >= self.first["flat_from"]:
            total = total * torch.tensor([0.0, 1.0])
        if taken >= self.first["loss_from"]:
            total = total + torch.tensor([torch.nan, 0.0])
        if taken >= self.first["gradient_from"]:
            # The square root of nothing has no gradient, and no place
            total = total + torch.stack([(total[0] - total[0].detach()).sqrt(), total[1] * 0])
        # A multiplier may let the total grow while the target becomes likelier
        total = total + 100.0 * taken
        return Losses(total, nll, torch.tensor([self.correct, True]))


@pytest.mark.parametrize(
    ("nll", "correct", "status", "first", "best", "last"),
    [
        ([2.0, 1.0, 6.8], False, "diverging", 2.0, 1.0, 6.8),
        ([9.0, 1.0, 6.8], False, "diverging", 9.0, 1.0, 6.8),
        ([9.0, 1.0, 1.8], False, "max_steps", 9.0, 1.0, 1.8),
        ([2.0, 6.8, 1.9], False, "max_steps", 2.0, 1.9, 1.9),
        ([2.0, 3.0, 2.0001], False, "max_steps", 2.0, 2.0, 2.0001),
        ([1e-5, 2e-5, 0.1], True, "max_steps", 1e-5, 1e-5, 0.1),
        ([2.0, 1.0, 0.5], False, "max_steps", 2.0, 0.5, 0.5),
    ],
)
def test_a_fit_that_ends_worse_than_it_began_is_diverging(
    nll: list[float], correct: bool, status: str, first: float, best: float, last: float
) -> None:
    problem = Rising(nll, correct=correct)
    fit(problem, problem.stacked, SolverConfig(steps=3, lr=0.03, stop_loss=None))
    outcome = problem.found[0][0]
    assert (outcome.status, outcome.steps) == (status, 3)
    assert (outcome.first_nll, outcome.best_nll, outcome.nll) == pytest.approx((first, best, last))
    assert problem.found[1][0].status == "max_steps"


@pytest.mark.parametrize("spoiled", ["loss_from", "gradient_from"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_is_not_finite_takes_no_step_and_spares_the_others(spoiled: str, step: int) -> None:
    problem = Rising([1.0, 1.0, 1.0, 1.0], **{spoiled: step})
    fit(problem, problem.stacked, SolverConfig(steps=3, lr=0.03, stop_loss=None))
    outcome, delta = problem.found[0]
    assert (outcome.status, outcome.steps) == ("diverged", step)
    assert bool(delta.isfinite().all())
    assert bool(delta.any()) == (step > 0)
    plain = Queue(2, 2)
    fit(plain, plain.stacked, SolverConfig(steps=3, lr=0.03, stop_loss=None))
    assert problem.found[1][0].status == "max_steps"
    torch.testing.assert_close(problem.found[1][1], plain.found[1][1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("lr", "status"), [(0.03, "max_steps"), (1e9, "diverging")])
def test_parameters_beyond_all_numbers_of_a_model_are_diverging_whatever_the_loss(lr: float, status: str) -> None:
    problem = Rising([9.0, 8.0])
    fit(problem, problem.stacked, SolverConfig(steps=2, lr=lr, stop_loss=None))
    assert problem.found[0][0].status == status
    said = Rising([9.0, 8.0], correct=True)
    fit(said, said.stacked, SolverConfig(steps=2, lr=lr, stop_loss=None))
    assert said.found[0][0].status == "max_steps"


def test_a_fit_that_moved_and_has_no_gradient_left_is_diverging() -> None:
    for nll, status in (([9.0, 6.8], "diverging"), ([9.0, 9.0], "max_steps")):
        problem = Rising(nll, flat_from=1)
        fit(problem, problem.stacked, SolverConfig(steps=2, lr=0.03, stop_loss=None))
        assert problem.found[0][0].status == status


@pytest.mark.parametrize(("lr", "status"), [(0.03, "max_steps"), (1.7e308, "diverged")])
def test_a_last_step_that_leaves_no_numbers_is_seen(lr: float, status: str) -> None:
    problem = Queue(2, 2)
    fit(problem, problem.stacked, SolverConfig(steps=1, lr=lr, stop_loss=None))
    assert {outcome.status for outcome, _ in problem.found.values()} == {status}


@pytest.mark.parametrize("every", [2, 3, 5, 100])
def test_what_comes_out_does_not_depend_on_when_the_host_asks(every: int) -> None:
    """To the bit: an edit that ended makes no step more, however late that is seen."""
    small = torch.tensor([1.0, 0.01, 0.3, 0.02, 1.0, 0.005, 0.4], dtype=torch.float64)[:, None, None]
    problems = []
    for check_every in (1, every):
        problem = Queue(7, 3)
        problem.all_y *= small
        config = SolverConfig(steps=40, lr=0.03, clip=0.5, stop_loss=2e-2, check_every=check_every)
        fit(problem, problem.stacked, config)
        problems.append(problem)
    first, other = problems
    assert {outcome.status for outcome, _ in first.found.values()} == {"converged", "max_steps"}
    for task, (outcome, delta) in first.found.items():
        assert other.found[task][0] == outcome
        assert torch.equal(other.found[task][1], delta)


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("spoiled", ["loss_from", "gradient_from"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_is_not_finite_is_seen_late_and_ends_where_it_did(spoiled: str, step: int, every: int) -> None:
    found = []
    for check_every in (1, every):
        problem = Rising([3.0, 2.0, 1.0, 1.0], **{spoiled: step})
        fit(problem, problem.stacked, SolverConfig(steps=4, lr=0.03, stop_loss=None, check_every=check_every))
        found.append(problem.found)
    assert found[0][0][0].status == "diverged"
    for task, (outcome, delta) in found[0].items():
        assert repr(found[1][task][0]) == repr(outcome)
        assert torch.equal(found[1][task][1], delta)


BAD = [("check_every", 0), ("steps", -1), ("lr", 0.0), ("lr", float("inf")), ("clip", 0.0), ("radius", -1.0)]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"solver: {field} .*\(got {field}="):
        SolverConfig(**{field: value})  # type: ignore[arg-type]
