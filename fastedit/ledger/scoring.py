"""Scores of the edits that act in a ledger, made without making an edit; by several processes where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastedit.deltas import EditDelta, accumulate, stack
from fastedit.engine.parallel.workers import workers_of
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.readying import expanded, ready_device
from fastedit.engine.run_state import EditJob, EndedEdits, RunState, ending
from fastedit.engine.schedule import ALONE, run_single, score_together
from fastedit.evaluation import EditScores, Score, summarise
from fastedit.fitting.views import ViewSource
from fastedit.ledger.database import LedgerError
from fastedit.ledger.session import Session
from fastedit.ledger.settings import plan_of
from fastedit.ledger.stored_artifacts import read_artifact
from fastedit.methods import EditPlan
from fastedit.methods.base import Method

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger
    from fastedit.ledger.state import LedgerState


@dataclass(frozen=True)
class LedgerScores:
    """Scores of what acts.

    Args:
        scores: by protocol and name, the mean over edits with its interval. edits: of each edit, by its number.
        new: how many of them were not there yet.
    """

    scores: Mapping[str, Mapping[str, Score]]
    edits: Mapping[int, EditScores]
    new: int


def score_edits(
    ledger: Ledger,
    *,
    engine: str | None = None,
    workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    batch_size: int = 16,
    show_progress: bool | None = None,
) -> LedgerScores:
    """Ask the questions of all edits that act, and keep the scores in the ledger; those that are there stay.

    Edits that act together are scored with all of them; those that were fitted each alone (``mode="single"``), alone.

    Args:
        ledger: opened with its model. engine, workers, resources: see ``fastedit.edit``.
        batch_size: edits that are scored together. show_progress: None shows a line on a terminal.
    Returns:
        LedgerScores.
    Raises:
        LedgerError: nothing acts, or another process writes. ValueError: no possible engine, or batch_size.
        RuntimeError: an edit cannot be scored; says why.
    """
    spread = workers_of(engine, workers, resources)
    if batch_size < 1:
        raise ValueError(f"score: batch_size is at least 1 (got batch_size={batch_size})")
    model, state = ledger.needs_model("score"), ledger.state()
    if not len(state):
        raise LedgerError(f"ledger: edits act whose questions can be asked (got none in {str(ledger.folder)!r})")
    run = ledger.contents.run_of(state.edit_ids[-1])
    settings, plan, requests = run["settings"], plan_of(run["settings"]), state.requests()
    artifact = None if settings["artifact"] is None else read_artifact(ledger.contents, settings["artifact"])
    views = ViewSource(requests, requests, source=settings["views"], near=settings["near"], seed=settings["seed"])
    job = EditJob(
        model, requests, plan, state.deltas[0].spec, plan.method.solver(model, plan.config), views,
        artifact=artifact, seed=settings["seed"], bind=settings["bind"],
    )  # fmt: skip
    ready_device(model.device)
    timer = PhaseTimer(model.device)
    numbers = range(len(requests))
    with ledger.on_base(), ledger.contents.writing(), ending(spread), expanded(job):
        store = Session(ledger.contents, run["id"], requests, state.edit_ids, numbers, adds_up=False)
        work = RunState(job, EndedEdits(timer), timer, workers=spread)
        work.ended.recall(store)
        known = store.scores(store.state() if not state.act_alone else ALONE)
        missing = [number for number in numbers if number not in known]
        if state.act_alone:
            run_single(work, batch_size, True, show_progress)
            made = dict(work.ended.scores)
        elif spread is not None and missing:
            made = spread.together(work, _acting(state, plan), missing, store.state(), batch_size, show_progress)
        elif missing:
            stacked = stack(_acting(state, plan), device=model.device)
            made = score_together(work, stacked, missing, store.state(), batch_size, "scoring", show_progress)
        else:
            made = {}
    found = {**known, **made}
    ordered = [found[number] for number in numbers]
    by_edit = dict(zip(state.edit_ids, ordered, strict=True))
    return LedgerScores(summarise(ordered, seed=job.seed), by_edit, len(missing))


def _acting(state: LedgerState, plan: EditPlan) -> list[EditDelta]:
    """What acts; edits that simply add up as one."""
    acting = list(state.acting())
    adds_up = plan.method.sequence == "accumulate" and plan.method.combine is Method.combine
    return [accumulate(acting)] if adds_up else acting
