"""``edit``: many edits on a frozen model, in batches, each edit by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastedit.backbone import EditableModel
from fastedit.backbone.context import on_frozen_model, with_gradients
from fastedit.data import fingerprint
from fastedit.deltas import EditDelta
from fastedit.engine import provenance
from fastedit.engine.apply import check_editable
from fastedit.engine.arguments import check_arguments
from fastedit.engine.checks import check_conflicts, check_sequence, trained_parts
from fastedit.engine.interrupted import carrying
from fastedit.engine.memory.oom import peak_memory_mib
from fastedit.engine.memory.plan import largest_batch
from fastedit.engine.parallel.workers import workers_of
from fastedit.engine.preflight import check_run
from fastedit.engine.profiling.flops import Peak, is_counted, nfu
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.profiling.utilisation import necessary_flops
from fastedit.engine.readying import expanded, ready_device, set_up
from fastedit.engine.run import Run, Timing
from fastedit.engine.run_state import EditJob, EditLedger, EndedEdits, RunState, ending
from fastedit.engine.schedule import run_sequential, run_single
from fastedit.engine.soundness import not_finite, warn_of
from fastedit.evaluation import PROTOCOLS, EditScores, summarise
from fastedit.fitting.views import ViewSource
from fastedit.methods import resolve
from fastedit.methods.base import is_computed
from fastedit.objectives import beside_roles
from fastedit.progress import progress
from fastedit.requests import EditRequest
from fastedit.training import Artifact

P = ParamSpec("P")
Returned = TypeVar("Returned")


def _on_base(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """Let a function find the base model, though edits of the ledger that it is given are served meanwhile."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Returned:
        ledger: Any = kwargs.get("ledger")
        with ledger.on_base() if hasattr(ledger, "on_base") else nullcontext():
            return function(*args, **kwargs)

    return called


@_on_base
@on_frozen_model
@with_gradients
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
    ledger: EditLedger | None = None,
    peak: Peak | None = None,
    score_at: Sequence[int] = (),
    score_sample: int | None = None,
    artifact: Artifact | str | Path | None = None,
    conflicts: str = "error",
    bind: str = "content",
    engine: str | None = None,
    workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    **overrides: Any,
) -> Run:
    """Edit a frozen model: each edit gets a delta of its own, and nothing of the model is written.

    Args:
        model: from ``fastedit.load``.
        edits: what to change.
        method: one of ``fastedit.method_names()``: "ft", "mend" ..., or one of them under another objective: "kl+ft",
            "odedit+lora" ...
        batch_size: edits fitted together; results do not depend on it. An edit that has ended makes room for a waiting
            one. Where memory runs out the run goes on with half as many, and ended edits are kept. "auto" takes as many
            as the memory plan has room for (``fastedit.plan_memory``).
        mode: "single" fits and scores every edit alone on the base model; "sequential" lets edits accumulate in order
            (each is fitted on top of the earlier ones) and scores all of them after the last.
        pool: records to draw locality views and paraphrases from, for objectives that use them (a train split).
        views: "heldout" never fits on a record's own rephrase and locality questions; "record" fits on exactly those.
        near: draw locality views near the edit (its own question about other images) where the pool has them.
        evaluate: score every edit under both protocols.
        seed: of the views, of score intervals, and of what the method draws: first factors, masks, layers.
        show_progress: None shows a progress line with the time left on a terminal.
        ledger: from ``fastedit.open_ledger``: every edit is committed there as it ends, with its outcome and scores,
            and what is committed of these edits already is not made again. Memory does not grow with their number.
        score_at: in sequence, also score after so many edits, all edits so far (``run.checkpoints``).
        score_sample: in sequence, score at most so many of the edits so far, drawn anew each time; None scores all.
        artifact: trained parts of the method, from ``fastedit.train``, or a file of them.
        conflicts: "error" refuses a sequence that gives one question about one image two answers; "last" makes all the
            edits, and each is scored by what it asked for.
        bind: "content" lets the deltas act on exactly these weights; "architecture" on any of the same names and
            shapes, in another dtype or quantization for example, with a warning that says how they were fitted.
        engine: None makes the edits in this process; "processes" in several of this machine, "ray" in those of a Ray
            cluster (docs/scaling.md). Results do not depend on it. An edit that fails three times by itself is set
            aside: it has no place in the run, and its reason is in ``run.provenance["set_aside"]``.
        workers: of an engine, how many processes; each has the model. None is 2.
        resources: of "ray", what each worker takes: {"GPU": 1}; None is one CPU.
        peak: of the machine, from ``fastedit.measure_peak``; fills ``run.timing.nfu``.
        overrides: fields of the method's and the objective's config.
    Returns:
        Run.
    Raises:
        ValueError: a setting, method or field that does not exist or cannot work here, or records that the run would
            stop at (``RecordErrors``, all of them at once); before any work starts. Of a ledger, see there.
        RunInterrupted: something ended the run after some edits were finished, such as memory that ran out for one
            edit alone. The finished edits are in its ``run``. A signal (Ctrl-C) gives RunStopped, with the same.
    """
    check_arguments(
        model, edits, pool=pool, ledger=ledger, artifact=artifact, method=method, batch_size=batch_size,
        mode=mode, views=views, near=near, evaluate=evaluate, seed=seed, show_progress=show_progress,
        score_at=score_at, score_sample=score_sample, conflicts=conflicts, bind=bind,
    )  # fmt: skip
    spread = workers_of(engine, workers, resources)
    check_editable(model)
    plan = resolve(method, overrides, seed=seed)
    check_sequence(plan, mode, score_at, len(edits), score_sample)
    trained = trained_parts(model, plan, artifact)
    spec, solver = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    if trained is not None and "artifact" in spec.options:
        # Those that do not act without their trained part say which it is
        spec = replace(spec, options={**spec.options, "artifact": trained.id})
    source = ViewSource(edits, pool, source=views, near=near, seed=seed)
    if not is_computed(plan.method):
        source.check(plan.build_objective(solver.steps).roles)
    with progress("checking the records", 0, show_progress):
        check_run(model, edits, plan, source, evaluate=evaluate, mode=mode)
    if mode == "sequential" and conflicts == "error" and ledger is None:
        check_conflicts(edits)
    timer = PhaseTimer(model.device)
    if isinstance(batch_size, str):
        batch_size = largest_batch(model, plan, edits, evaluate=evaluate, keep_deltas=ledger is None, mode=mode)
    job = EditJob(model, edits, plan, spec, solver, source, () if pool is None else pool, trained, seed, bind)
    run = RunState(job, EndedEdits(timer), timer, score_sample=score_sample, workers=spread)
    described = partial(
        _provenance, method=method, mode=mode, batch_size=batch_size, views=views, near=near, seed=seed, pool=pool
    )
    if ledger is None:
        return _made(run, batch_size, mode, evaluate, show_progress, score_at, described, peak)
    with ledger.session(job, mode=mode, conflicts=conflicts, provenance=described(job)) as store:
        if len(store.edits) < len(edits):
            source = ViewSource(store.edits, pool, source=views, near=near, seed=seed)
            run.job = replace(job, edits=store.edits, views=source)
        run.ended.recall(store)
        return _made(run, batch_size, mode, evaluate, show_progress, score_at, described, peak)


def _made(
    run: RunState,
    batch_size: int,
    mode: str,
    evaluate: bool,
    show_progress: bool | None,
    score_at: Sequence[int],
    described: Callable[[EditJob], dict[str, Any]],
    peak: Peak | None,
) -> Run:
    """Make the edits of a run that have not ended yet, and score them."""
    job, ended = run.job, run.ended
    ready_device(job.model.device)
    describe = partial(described, job)
    with carrying(run, partial(_finished, run, describe, evaluate)), ending(run.workers):
        here = run.workers is None or (mode == "sequential" and job.plan.method.sequence != "route")
        if here and len(ended.outcomes) < len(job.edits):
            set_up(run, show_progress)
        with expanded(job):
            if mode == "single":
                run_single(run, batch_size, evaluate, show_progress)
            else:
                run_sequential(run, batch_size, evaluate, show_progress, score_at)
        numbers = range(len(job.edits)) if ended.store is None else ended.store.members
        if ended.set_aside:
            return _finished(run, describe, evaluate, [number for number in numbers if number not in ended.set_aside])
        return _result(run, numbers, run.ended.deltas_of(numbers), describe(), evaluate=evaluate, peak=peak)


def _result(
    run: RunState,
    numbers: Sequence[int],
    deltas: Sequence[EditDelta],
    notes: dict[str, Any],
    *,
    evaluate: bool,
    peak: Peak | None = None,
) -> Run:
    """The run of these edits."""
    outcomes = [run.ended.outcomes[number] for number in numbers]
    scored = [run.ended.scores.get(number, EditScores({}, {})) for number in numbers] if evaluate else []
    scores = summarise(scored, seed=run.job.seed) if evaluate else {}
    timing = _timing(run, peak)
    notes |= {"not_finite": not_finite(scored)} if evaluate else {}
    notes |= {} if run.workers is None else {"workers": run.workers.described()}
    warn_of(outcomes, scored)
    edits = run.job.edits
    requests = edits if list(numbers) == list(range(len(edits))) else [edits[number] for number in numbers]
    return Run(deltas, outcomes, scores, scored, timing, notes, run.ended.checkpoints, run.job.artifact, requests)


def _finished(run: RunState, describe: Callable[[], dict[str, Any]], evaluate: bool, numbers: Sequence[int]) -> Run:
    """What there is of a run that ended early, or that gave up some edits."""
    aside = [{"edit": n, "id": run.job.edits[n].id, "reason": why} for n, why in sorted(run.ended.set_aside.items())]
    notes = {**describe(), "finished": {"edits": list(numbers), "of": len(run.job.edits)}}
    notes |= {"set_aside": aside} if aside else {}
    return _result(run, numbers, run.ended.deltas_of(numbers), notes, evaluate=evaluate and bool(run.ended.scores))


def _timing(run: RunState, peak: Peak | None) -> Timing:
    # What a ledger had already took no time
    outcomes = [outcome for number, outcome in sorted(run.ended.outcomes.items()) if number in run.ended.made]
    spent = run.timer.total(without=("evaluation",))
    used = None
    # Seconds of several processes are not those of one peak
    if peak is not None and run.workers is None and spent and is_counted(run.job.spec, run.job.model):
        objective = run.job.plan.build_objective(run.job.solver.steps)
        roles, beside = objective.roles, beside_roles(objective)
        necessary = necessary_flops(run.job.model, run.job.spec, run.job.views, roles, outcomes, beside)
        used = nfu(necessary.total, spent, peak)
    return Timing(
        edits_per_s=len(outcomes) / spent if spent else float("nan"),
        seconds=dict(run.timer.seconds),
        steps=sum(outcome.steps for outcome in outcomes),
        peak_memory_mib=peak_memory_mib(run.job.model.device),
        nfu=used,
    )


def _provenance(
    job: EditJob, method: str, *, pool: Sequence[EditRequest] | None, seed: int, **settings: Any
) -> dict[str, Any]:
    model = job.model
    return {
        "method": method,
        "config": job.plan.settings(),
        "notes": job.plan.method.notes(model, job.plan.config),
        "solver": {**vars(job.solver)},
        "sites": [f"{site.layer}.{site.name}" for site in job.spec.sites],
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
            "parameters": model.hf.num_parameters(),
            **provenance.prompts(model),
        },
        "data": {"edits": len(job.edits), "fingerprint": fingerprint(job.edits)},
        "artifact": None if job.artifact is None else {"kind": job.artifact.kind, "id": job.artifact.id},
        "pool": None if pool is None else {"records": len(pool), "fingerprint": fingerprint(pool)},
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.commit(),
        "time": provenance.utc_now(),
    }
