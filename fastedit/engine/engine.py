"""``edit``: many edits on a frozen model, in batches, each edit by itself."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastedit.backbone import EditableModel, held_inputs
from fastedit.backbone.expansion import expanded_layers
from fastedit.data import fingerprint
from fastedit.deltas import EditDelta, Rows, StoredDeltas, accumulate, installed, stack
from fastedit.deltas.base import DeltaSpec, new_stack
from fastedit.engine import provenance
from fastedit.engine.batch import BatchProblem, EditRows, prepare, split_point
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.flops import Peak, nfu
from fastedit.engine.memory import is_out_of_memory, peak_memory_mib, release_memory
from fastedit.engine.plan import largest_batch
from fastedit.engine.progress import ProgressLine, progress
from fastedit.engine.run import Run, Timing
from fastedit.engine.timing import PhaseTimer
from fastedit.engine.utilisation import necessary_flops
from fastedit.engine.views import ViewSource
from fastedit.evaluation import PROTOCOLS, EditScores, summarise
from fastedit.methods import EditPlan, resolve
from fastedit.ops import keep_freed_memory
from fastedit.requests import EditRequest
from fastedit.solver import FitOutcome, SolverConfig, fit

MODES = ("single", "sequential")


@dataclass
class _Work:
    """What every batch of a run shares."""

    model: EditableModel
    edits: Sequence[EditRequest]
    plan: EditPlan
    spec: DeltaSpec
    solver: SolverConfig
    views: ViewSource
    timer: PhaseTimer
    delta_dtype: torch.dtype
    store: StoredDeltas | None
    per_file: int
    outcomes: dict[int, FitOutcome] = field(default_factory=dict)
    scored: dict[int, EditScores] = field(default_factory=dict)
    # In memory all, or those that are not in a file yet
    deltas: dict[int, EditDelta] = field(default_factory=dict)

    def keep(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """Take over an edit that has ended."""
        self.deltas[number], self.outcomes[number] = delta, outcome
        if self.store is not None and len(self.deltas) >= self.per_file:
            self.write()

    def write(self) -> None:
        """Put the deltas that are in memory into a file, where the run has files."""
        if self.store is None or not self.deltas:
            return
        with self.timer.phase("store"):
            places = sorted(self.deltas)
            self.store.append([self.deltas[place] for place in places], places)
            self.deltas.clear()

    def all_deltas(self) -> Sequence[EditDelta]:
        """Those of every edit, in order."""
        self.write()
        return self.store if self.store is not None else [self.deltas[n] for n in range(len(self.edits))]


def edit(
    model: EditableModel,
    edits: Sequence[EditRequest],
    method: str = "ft",
    *,
    batch_size: int | str = 16,
    mode: str = "single",
    pool: Sequence[EditRequest] | None = None,
    views: str = "heldout",
    near: bool = True,
    evaluate: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
    deltas_folder: str | Path | None = None,
    peak: Peak | None = None,
    **overrides: Any,
) -> Run:
    """Edit a frozen model: each edit gets a delta of its own, and nothing of the model is written.

    Args:
        model: from ``fastedit.load``.
        edits: what to change.
        method: "ft", "lora", or one of them under another objective: "kl+ft", "odedit+lora" ...
        batch_size: edits fitted together; results do not depend on it. An edit that has ended makes room for a waiting
            one. Where memory runs out the run goes on with half as many, and ended edits are kept. "auto" takes as many
            as the memory plan has room for (``fastedit.plan_memory``).
        mode: "single" fits and scores every edit alone on the base model; "sequential" lets edits accumulate in order
            (each is fitted on top of the earlier ones) and scores all of them after the last.
        pool: records to draw locality views and paraphrases from, for objectives that use them (a train split).
        views: "heldout" never fits on a record's own rephrase and locality questions; "record" fits on exactly those.
        near: draw locality views near the edit (its own question about other images) where the pool has them.
        evaluate: score every edit under both protocols.
        seed: of the views and of score intervals.
        show_progress: None shows a progress line with the time left on a terminal.
        deltas_folder: write every batch's deltas to files there instead of keeping them in memory, which a run over
            thousands of edits would fill; a new or empty folder.
        peak: of the machine, from ``fastedit.measure_peak``; fills ``run.timing.nfu``.
        overrides: fields of the method's and the objective's config.
    Returns:
        Run.
    Raises:
        ValueError: a setting, method or field that does not exist or cannot work here; before any work starts.
    """
    if not edits:
        raise ValueError("edit: at least one edit (got edits=[])")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"edit: batch_size is at least 1, or 'auto' (got batch_size={batch_size!r})")
    if mode not in MODES:
        raise ValueError(f"edit: mode is one of {list(MODES)} (got mode={mode!r})")
    plan = resolve(method, overrides)
    spec, solver = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    source = ViewSource(edits, pool, source=views, near=near, seed=seed)
    source.check(plan.objective.build(plan.objective_config, solver.steps).roles)
    delta_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    store = None if deltas_folder is None else StoredDeltas(deltas_folder)
    if store:
        raise ValueError(f"edit: deltas_folder is new or empty (got {deltas_folder} with {len(store)} deltas)")
    timer = PhaseTimer(model.device)
    if isinstance(batch_size, str):
        batch_size = largest_batch(model, plan, edits, evaluate=evaluate, keep_deltas=store is None)
    work = _Work(model, edits, plan, spec, solver, source, timer, delta_dtype, store, batch_size)

    if model.device.type == "cpu":
        keep_freed_memory()
    elif model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    run_mode = _single if mode == "single" else _sequential
    with expanded_layers(model, split_point(spec)[0]):
        run_mode(work, batch_size, evaluate, show_progress)
    notes = _provenance(work, method, mode=mode, batch_size=batch_size, views=views, near=near, seed=seed, pool=pool)
    outcomes = [work.outcomes[number] for number in range(len(edits))]
    scored = [work.scored[number] for number in range(len(edits))] if evaluate else []
    scores = summarise(scored, seed=seed) if evaluate else {}
    return Run(work.all_deltas(), outcomes, scores, scored, _timing(work, outcomes, peak), notes)


def _single(work: _Work, batch_size: int, evaluate: bool, show: bool | None) -> None:
    waiting = deque(range(len(work.edits)))
    size = batch_size
    with progress("editing", len(work.edits), show) as line:
        scored = _Scoring(work, batch_size, line) if evaluate else None

        def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
            work.keep(number, delta, outcome)
            if scored is None:
                line.advance()
            else:
                scored.add(number, delta)

        while waiting:
            places = min(size, len(waiting))
            try:
                _fit(work, waiting, places, None, take)
            except Exception as error:
                if places == 1 or not is_out_of_memory(error):
                    raise
                size = places // 2
                # Those that were at work begin anew
                waiting = deque(number for number in range(len(work.edits)) if number not in work.outcomes)
                told = f"edit: memory ran out in a batch of {places}; going on with batches of {size}"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
            else:
                break
            # outside of the handler: the traceback holds the tensors of the batch
            release_memory(work.model)
        if scored is not None:
            scored.flush()


class _Scoring:
    """Scores edits that have ended, a batch at a time."""

    def __init__(self, work: _Work, batch_size: int, line: ProgressLine) -> None:
        self.work, self.size, self.line = work, batch_size, line
        self._evaluator = Evaluator(work.model, work.spec, work.timer)
        self._ended: list[tuple[int, EditDelta]] = []

    def add(self, number: int, delta: EditDelta) -> None:
        """One more has ended."""
        self._ended.append((number, delta))
        if len(self._ended) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Score those that wait for it."""
        # What memory has no room for beside a batch stays here until there is room
        while self._ended:
            part = self._ended[: self.size]
            stacked = stack([delta for _, delta in part], device=self.work.model.device)
            try:
                found = self._evaluator.scores([self.work.edits[number] for number, _ in part], stacked)
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self.size = len(part) // 2
                told = f"edit: memory ran out scoring {len(part)} edits; going on with {self.size} at a time"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
            else:
                for (number, _), scores in zip(part, found, strict=True):
                    self.work.scored[number] = scores
                    self.line.advance()
                del self._ended[: len(part)]
                continue
            release_memory(self.work.model)


def _sequential(work: _Work, batch_size: int, evaluate: bool, show: bool | None) -> None:
    committed: EditDelta | None = None
    with progress("editing in sequence", len(work.edits), show) as line:
        for index in range(len(work.edits)):
            fitted: list[EditDelta] = []

            def take(number: int, delta: EditDelta, outcome: FitOutcome, into: list[EditDelta] = fitted) -> None:
                work.keep(number, delta, outcome)
                into.append(delta)

            _fit(work, deque([index]), 1, committed, take)
            committed = accumulate([committed, *fitted] if committed else fitted)
            line.advance()
    if not evaluate or committed is None:
        return
    evaluator = Evaluator(work.model, work.spec, work.timer)
    final = stack([committed], device=work.model.device)
    with progress("scoring after the last edit", len(work.edits), show) as line:
        for start in range(0, len(work.edits), batch_size):
            chosen = range(start, min(start + batch_size, len(work.edits)))
            scores = evaluator.scores([work.edits[number] for number in chosen], final, shared=True)
            work.scored.update(zip(chosen, scores, strict=True))
            line.advance(len(chosen))


def _fit(
    work: _Work,
    waiting: deque[int],
    places: int,
    committed: EditDelta | None,
    take: Callable[[int, EditDelta, FitOutcome], None],
) -> None:
    """Fit the waiting edits, so many at a time, on top of the committed one."""
    model, timer = work.model, work.timer
    objective = work.plan.objective.build(work.plan.objective_config, work.solver.steps)

    def make(numbers: Sequence[int]) -> list[EditRows]:
        with timer.phase("encode"):
            views = [work.views.views(number, objective.roles) for number in numbers]
        return prepare(model, work.spec, views, timer)

    def name(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        request_id = work.edits[number].id
        take(number, replace(delta, model_fingerprint=model.fingerprint, request_id=request_id), outcome)

    with timer.phase("setup"):
        stacked = new_stack(work.spec, places, dtype=work.delta_dtype, device=model.device)
    with ExitStack() as entered:
        held = entered.enter_context(held_inputs(model, *split_point(work.spec)))
        holders = [entered.enter_context(installed(model, stacked, Rows()))]
        if committed is not None:
            earlier = stack([committed], device=model.device)
            holders.append(entered.enter_context(installed(model, earlier, Rows())))
        fit(BatchProblem(model, stacked, holders, held, objective, waiting, make, name, timer), stacked, work.solver)


def _timing(work: _Work, outcomes: Sequence[FitOutcome], peak: Peak | None) -> Timing:
    spent = work.timer.total(without=("evaluation",))
    used = None
    if peak is not None and spent:
        roles = work.plan.objective.build(work.plan.objective_config, work.solver.steps).roles
        necessary = necessary_flops(work.model, work.spec, work.views, roles, outcomes)
        used = nfu(necessary.total, spent, peak)
    return Timing(
        edits_per_s=len(outcomes) / spent if spent else float("nan"),
        seconds=dict(work.timer.seconds),
        steps=sum(outcome.steps for outcome in outcomes),
        peak_memory_mib=peak_memory_mib(work.model.device),
        nfu=used,
    )


def _provenance(
    work: _Work, method: str, *, pool: Sequence[EditRequest] | None, seed: int, **settings: Any
) -> dict[str, Any]:
    model = work.model
    return {
        "method": method,
        "config": work.plan.settings(),
        "solver": {**vars(work.solver)},
        "sites": [f"{site.layer}.{site.name}" for site in work.spec.sites],
        "run": settings,
        "seed": seed,
        "protocols": PROTOCOLS,
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantize": model.quantize,
            "linear": model.linear,
            "device": str(model.device),
            "template": model.template,
        },
        "data": {"edits": len(work.edits), "fingerprint": fingerprint(work.edits)},
        "pool": None if pool is None else {"records": len(pool), "fingerprint": fingerprint(pool)},
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.commit(),
        "time": provenance.utc_now(),
    }
