"""``edit``: many edits on a frozen model, in batches, each edit by itself."""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastedit.backbone import EditableModel, held_inputs
from fastedit.data import fingerprint
from fastedit.deltas import EditDelta, Rows, StoredDeltas, accumulate, installed, stack
from fastedit.deltas.base import DeltaSpec, new_stack
from fastedit.engine import provenance
from fastedit.engine.batch import BatchProblem, prepare, split_point
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.memory import is_out_of_memory, release_memory
from fastedit.engine.progress import progress
from fastedit.engine.run import Run, Timing
from fastedit.engine.timing import PhaseTimer
from fastedit.engine.views import TrainingView, ViewSource
from fastedit.evaluation import PROTOCOLS, EditScores, summarise
from fastedit.methods import EditPlan, resolve
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
    deltas: list[EditDelta] | StoredDeltas

    def keep(self, deltas: Sequence[EditDelta]) -> None:
        """Add the deltas of a batch to those of the run."""
        if isinstance(self.deltas, StoredDeltas):
            with self.timer.phase("store"):
                self.deltas.append(deltas)
        else:
            self.deltas += deltas


def edit(
    model: EditableModel,
    edits: Sequence[EditRequest],
    method: str = "ft",
    *,
    batch_size: int = 16,
    mode: str = "single",
    pool: Sequence[EditRequest] | None = None,
    views: str = "heldout",
    near: bool = True,
    evaluate: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
    deltas_folder: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Edit a frozen model: each edit gets a delta of its own, and nothing of the model is written.

    Args:
        model: from ``fastedit.load``.
        edits: what to change.
        method: "ft", "lora", or one of them under another objective: "kl+ft", "odedit+lora" ...
        batch_size: edits fitted together; results do not depend on it. Where memory runs out in a batch, it is tried
            again in halves and the run goes on with those; finished edits are kept.
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
        overrides: fields of the method's and the objective's config.
    Returns:
        Run.
    Raises:
        ValueError: a setting, method or field that does not exist or cannot work here; before any work starts.
    """
    if not edits:
        raise ValueError("edit: at least one edit (got edits=[])")
    if batch_size < 1:
        raise ValueError(f"edit: batch_size is at least 1 (got batch_size={batch_size!r})")
    if mode not in MODES:
        raise ValueError(f"edit: mode is one of {list(MODES)} (got mode={mode!r})")
    plan = resolve(method, overrides)
    spec, solver = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    source = ViewSource(edits, pool, source=views, near=near, seed=seed)
    source.check(plan.objective.build(plan.objective_config, solver.steps).roles)
    delta_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    kept: list[EditDelta] | StoredDeltas = [] if deltas_folder is None else StoredDeltas(deltas_folder)
    if len(kept):
        raise ValueError(f"edit: deltas_folder is new or empty (got {deltas_folder} with {len(kept)} deltas)")
    work = _Work(model, edits, plan, spec, solver, source, PhaseTimer(model.device), delta_dtype, kept)

    run_mode = _single if mode == "single" else _sequential
    outcomes, scored = run_mode(work, batch_size, evaluate, show_progress)
    notes = _provenance(work, method, mode=mode, batch_size=batch_size, views=views, near=near, seed=seed, pool=pool)
    scores = summarise(scored, seed=seed) if evaluate else {}
    return Run(work.deltas, outcomes, scores, scored, _timing(work, outcomes), notes)


def _single(
    work: _Work, batch_size: int, evaluate: bool, show: bool | None
) -> tuple[list[FitOutcome], list[EditScores]]:
    outcomes: list[FitOutcome] = []
    scored: list[EditScores] = []
    evaluator = Evaluator(work.model, work.spec, work.timer)
    start, size = 0, batch_size
    with progress("editing", len(work.edits), show) as line:
        while start < len(work.edits):
            chosen = range(start, min(start + size, len(work.edits)))
            try:
                fitted, ended, found = _one_batch(work, chosen, evaluator if evaluate else None)
            except Exception as error:
                if len(chosen) == 1 or not is_out_of_memory(error):
                    raise
                size = len(chosen) // 2
                told = f"edit: memory ran out in a batch of {len(chosen)}; going on with batches of {size}"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
            else:
                work.keep(fitted)
                outcomes += ended
                scored += found
                start = chosen.stop
                line.advance(len(chosen))
                continue
            # outside of the handler: the traceback holds the tensors of the batch
            release_memory(work.model)
    return outcomes, scored


def _one_batch(
    work: _Work, chosen: range, evaluator: Evaluator | None
) -> tuple[list[EditDelta], list[FitOutcome], list[EditScores]]:
    fitted, ended = _fit(work, chosen, committed=None)
    if evaluator is None:
        return fitted, ended, []
    stacked = stack(fitted, device=work.model.device)
    return fitted, ended, evaluator.scores([work.edits[i] for i in chosen], stacked)


def _sequential(
    work: _Work, batch_size: int, evaluate: bool, show: bool | None
) -> tuple[list[FitOutcome], list[EditScores]]:
    outcomes: list[FitOutcome] = []
    scored: list[EditScores] = []
    committed: EditDelta | None = None
    evaluator = Evaluator(work.model, work.spec, work.timer)
    with progress("editing in sequence", len(work.edits), show) as line:
        for index in range(len(work.edits)):
            fitted, ended = _fit(work, range(index, index + 1), committed)
            work.keep(fitted)
            outcomes += ended
            committed = accumulate([committed, *fitted] if committed else fitted)
            line.advance()
    if evaluate and committed is not None:
        final = stack([committed], device=work.model.device)
        with progress("scoring after the last edit", len(work.edits), show) as line:
            for start in range(0, len(work.edits), batch_size):
                chosen = list(work.edits[start : start + batch_size])
                scored += evaluator.scores(chosen, final, shared=True)
                line.advance(len(chosen))
    return outcomes, scored


def _fit(work: _Work, chosen: range, committed: EditDelta | None) -> tuple[list[EditDelta], list[FitOutcome]]:
    """Fit the deltas of some edits together, on top of the committed one."""
    objective = work.plan.objective.build(work.plan.objective_config, work.solver.steps)
    views: list[list[TrainingView]] = []
    with work.timer.phase("encode"):
        views = [work.views.views(index, objective.roles) for index in chosen]
    prepared = prepare(work.model, work.spec, views, work.timer)
    with work.timer.phase("setup"):
        stacked = new_stack(work.spec, len(views), dtype=work.delta_dtype, device=work.model.device)
    with ExitStack() as entered:
        held = entered.enter_context(held_inputs(work.model, *split_point(work.spec)))
        holder = entered.enter_context(installed(work.model, stacked, Rows()))
        if committed is not None:
            earlier = stack([committed], device=work.model.device)
            entered.enter_context(installed(work.model, earlier, Rows()))
        problem = BatchProblem(work.model, stacked, holder, objective, views, work.timer, prepared, held)
        outcomes = fit(problem, stacked, work.solver)
    with work.timer.phase("store"):
        name = work.model.fingerprint
        deltas = [
            stacked.unstack(b, model_fingerprint=name, request_id=work.edits[index].id)
            for b, index in enumerate(chosen)
        ]
    return deltas, outcomes


def _timing(work: _Work, outcomes: Sequence[FitOutcome]) -> Timing:
    spent = work.timer.total(without=("evaluation",))
    return Timing(
        edits_per_s=len(outcomes) / spent if spent else float("nan"),
        seconds=dict(work.timer.seconds),
        steps=sum(outcome.steps for outcome in outcomes),
        peak_memory_mib=_peak_memory_mib(work.model.device),
    )


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    # ru_maxrss is in KiB on Linux and in bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


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
