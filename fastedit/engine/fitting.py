"""How waiting edits become deltas: fitted together, or computed at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from fastedit.backbone import held_inputs
from fastedit.backbone.placement import is_offloaded
from fastedit.deltas import EditDelta, Rows, installed, split_point
from fastedit.deltas.full import FullDelta
from fastedit.deltas.growing import Beneath
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.low_rank import LowRankDelta
from fastedit.deltas.questions import QUESTIONS
from fastedit.engine.apply import AS_FITTED, fitted_as
from fastedit.engine.checks import question_of
from fastedit.engine.fit_problem import ActiveDeltas, FitProblem, OnFinished, WaitingEdits
from fastedit.engine.leaving import Fitted
from fastedit.engine.run_state import RunState
from fastedit.fitting.prepared import EditRows, can_branch, prepare
from fastedit.fitting.solver import FitOutcome, fit
from fastedit.methods.base import Method, is_computed
from fastedit.objectives import Role, beside_roles


def make_deltas(
    run: RunState, waiting: deque[int], slots: int, beneath: Beneath, on_fitted: Callable[[int, Fitted], None]
) -> None:
    """Turn waiting edits into deltas on top of what acts already; those that are finished leave the queue.

    When this ends, or is ended by an error, all that were finished have arrived in host memory and are kept.

    Args:
        run: that they belong to. waiting: their numbers. slots: how many at a time.
        beneath: what acts while they are made.
        on_fitted: gets the number and the delta of every edit, while no delta acts.
    """
    named = _named(run, beneath.company, on_fitted)
    try:
        if is_computed(run.job.plan.method):
            _compute(run, waiting, slots, beneath, named)
        else:
            _fit(run, waiting, slots, beneath, named)
        run.leaving.land()
    except BaseException:
        # Room may be short
        run.leaving.release()
        raise


def _named(run: RunState, fitted_on: tuple[str, ...], on_fitted: Callable[[int, Fitted], None]) -> OnFinished:
    """Hand over a delta with the names of its model, edit and company, and what the method adds once it is fitted."""
    job = run.job
    model = job.model
    as_fitted = {} if job.bind == "content" else {AS_FITTED: fitted_as(model)}

    def named(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        request = job.edits[number]
        if run.retention is not None:
            delta = run.retention.finished(delta)
        # Here no delta of the run acts
        bound = model.fingerprint if job.bind == "content" else model.architecture
        delta = replace(delta, model_fingerprint=bound, request_id=request.id, fitted_on=fitted_on)
        delta = replace(delta, texts={**delta.texts, **as_fitted})
        (delta,) = job.plan.method.finish(model, job.plan.config, run.shared, [request], [delta])
        delta = replace(delta, texts={**delta.texts, QUESTIONS: question_of(request)})
        on_fitted(number, run.leaving.send(number, delta, outcome))

    return named


def _compute(run: RunState, waiting: deque[int], slots: int, beneath: Beneath, on_finished: OnFinished) -> None:
    job, timer = run.job, run.timer
    model = job.model
    while waiting:
        numbers = [waiting[index] for index in range(min(slots, len(waiting)))]
        requests = [job.edits[number] for number in numbers]
        with timer.phase("encode"):
            views = [job.views.views(number, (Role.EDIT,)) for number in numbers]
        # Changed questions have no rows on the frozen model that would be of use
        rows = prepare(model, job.spec, views, timer) if job.spec.sites else []
        with ExitStack() as entered:
            for earlier in beneath.stacks:
                entered.enter_context(installed(model, earlier, Rows(), route=False))
            with timer.phase("compute"):
                computed = job.plan.method.compute(model, job.plan.config, run.shared, requests, rows)
        for number, each in zip(numbers, computed, strict=True):
            waiting.popleft()
            options = {**job.spec.options, **each.options}
            delta = EditDelta(replace(job.spec, options=options), dict(each.tensors), texts=dict(each.texts))
            on_finished(number, delta, FitOutcome("computed", 0, math.nan, math.nan))


def _fit(run: RunState, waiting: deque[int], slots: int, beneath: Beneath, on_finished: OnFinished) -> None:
    job, timer, method = run.job, run.timer, run.job.plan.method
    model, spec = job.model, job.spec
    if job.solver.capture and (model.layer_devices is not None or is_offloaded(model.hf)):
        places = sorted({str(device) for device in model.layer_devices or ()}) or "offloaded"
        raise ValueError(f"solver: capture needs all layers on one device (got layers on {places})")
    retention, objective = run.retention, job.plan.build_objective(job.solver.steps)
    if retention is not None:
        objective = retention.objective(objective)
    beside = beside_roles(objective)
    share = all(can_branch(model, each) for each in (spec, *(earlier.spec for earlier in beneath.stacks)))

    def prepared(numbers: Sequence[int]) -> list[EditRows]:
        with timer.phase("encode"):
            views = [job.views.views(number, objective.roles) for number in numbers]
        rows = prepare(model, spec, views, timer, beside=beside, share=share)
        if retention is None:
            return rows
        with timer.phase("retain"):
            return [retention.with_earlier(n, own, beneath.stacks) for n, own in zip(numbers, rows, strict=True)]

    def start(numbers: Sequence[int], rows: Sequence[EditRows]) -> Sequence[Mapping[str, Tensor]]:
        requests = [job.edits[number] for number in numbers]
        with timer.phase("setup"):
            return method.start(model, job.plan.config, run.shared, requests, rows)

    def stepped(steps: int) -> None:
        run.leaving.poll()
        if run.on_step is not None:
            run.on_step(steps / max(1, job.solver.steps))

    with timer.phase("setup"):
        stacked = new_stack(spec, slots, dtype=job.delta_dtype, device=model.device)
    if retention is not None and isinstance(stacked, (FullDelta, LowRankDelta)):
        retention.restrict(stacked)
    with ExitStack() as entered:
        held = entered.enter_context(held_inputs(model, *split_point(spec)))
        holders = [entered.enter_context(installed(model, stacked, Rows(), route=False))]
        stacked.earlier = beneath.stacks
        for earlier in beneath.stacks:
            holders.append(entered.enter_context(installed(model, earlier, Rows(), route=False)))
        problem = FitProblem(
            ActiveDeltas(model, stacked, holders, held),
            WaitingEdits(waiting, prepared, None if method.start is Method.start else start),
            objective,
            timer,
            on_finished=on_finished,
            on_step=stepped,
        )
        fit(problem, stacked, job.solver)
