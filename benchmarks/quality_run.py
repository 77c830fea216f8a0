"""One case of ``quality.py``: trained, edited, scored; the outcome as plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fastedit
from benchmarks.quality_cases import FIVE, SCORES, Case
from fastedit.backbone import weights_hash
from fastedit.engine import Run
from fastedit.engine.memory.limits import process_bytes
from fastedit.engine.run import plain
from fastedit.evaluation import bootstrap
from fastedit.published.case import arguments, records, trained_part
from fastedit.requests import EditRequest

#: Edits that processor seconds are taken over.
TIMED = 64
#: Shown besides where a run has them.
FURTHER = ("portability", "blind", "blindness", "routed_in", "routed_in_wrongly")


class World:
    """A model and its records, kept for the cases that follow one another."""

    def __init__(self) -> None:
        self._name = ("", "", 0)
        self.model: Any = None
        self.edits: list[EditRequest] = []
        self.pool: list[EditRequest] = []

    def of(self, case: Case) -> World:
        """Load what a case needs, where the case before did not need the same."""
        name = (case.model, case.data, case.edits)
        if name != self._name:
            self.model = fastedit.load(case.model)
            self.edits, self.pool = records(case.data, "eval", case.edits), records(case.data, "train", None)
            self._name = name
        # What a case found out about its questions is no gain of the next one's speed
        self.model.caches.clear()
        self.model.artifacts.clear()
        return self


def run_case(case: Case, world: World, artifacts: Path, *, batch_size: int = 64, seed: int = 0) -> dict[str, Any]:
    """Train what is to be trained (once for all cases that share it), edit, score.

    Returns:
        case, scores with intervals, one value an edit for every score of ``SCORES`` under the strict protocol,
        seconds, memory, provenance; plain values.
    """
    model, edits, pool = world.of(case).model, world.edits, world.pool
    trained = trained_part(case, model, pool, artifacts)
    given = arguments(case, pool, trained, seed)
    begin = time.perf_counter()
    run = fastedit.edit(
        model, edits, case.method, batch_size=batch_size, mode=case.mode, score_at=case.score_at, show_progress=False,
        **given,
    )  # fmt: skip
    wall = time.perf_counter() - begin
    cost = None if case.mode == "sequential" else processor_seconds(world, case.method, given)
    return plain(  # type: ignore[no-any-return]
        {
            "case": {**asdict(case), "name": case.name},
            "weights": weights_hash(model.hf),
            "scores": tables(run.scores),
            "checkpoints": {str(count): tables(scores) for count, scores in run.checkpoints.items()},
            "per_edit": per_edit(run),
            "tags": [list(edit.tags) for edit in edits],
            "rates": rates(run),
            "timing": {
                "seconds_per_edit": cost if cost is not None else _editing(run) / len(edits),
                "wall_s": wall,
                "train_s": None if trained is None else trained[1],
                "seconds": dict(run.timing.seconds),
                "peak_memory_mib": None,
                "steps": run.timing.steps,
            },
            "provenance": run.provenance,
        }
    )


def peak_memory_mib(case: Case, artifacts: Path, *, batch_size: int = TIMED, seed: int = 0) -> float:
    """Peak of this process's memory, which has done nothing else, when one batch of a case is fitted and scored."""
    world = World().of(replace(case, edits=TIMED))
    trained = trained_part(case, world.model, world.pool, artifacts)
    fastedit.edit(
        world.model, world.edits, case.method, batch_size=batch_size, mode=case.mode, show_progress=False,
        **arguments(case, world.pool, trained, seed),
    )  # fmt: skip
    return process_bytes("VmHWM") / 2**20


def processor_seconds(world: World, method: str, given: Mapping[str, Any]) -> float:
    """Processor seconds of one edit, out of a batch, without scores: what else the machine does is not in them."""
    some = world.edits[:TIMED]
    world.model.caches.clear()
    begin = time.process_time()
    fastedit.edit(world.model, some, method, batch_size=16, evaluate=False, show_progress=False, **given)
    return (time.process_time() - begin) / len(some)


def tables(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores as plain values."""
    return {protocol: {name: asdict(score) for name, score in own.items()} for protocol, own in scores.items()}


def per_edit(run: Run) -> dict[str, list[float | None]]:
    """One value an edit of every score under the strict protocol, the mean of the five included."""
    found: dict[str, list[float | None]] = {
        name: [edit.strict.get(name) for edit in run.edit_scores] for name in (*SCORES, *FURTHER)
    }
    found["mean_of_five"] = [_mean([edit.strict.get(name) for name in FIVE]) for edit in run.edit_scores]
    found["mean_of_six"] = [_mean([edit.strict.get(name) for name in (*FIVE, "near")]) for edit in run.edit_scores]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def rates(run: Run) -> dict[str, Any]:
    """By kind of question, how often a router let an edit act; empty without a router."""
    acted: dict[str, list[float]] = {}
    for edit in run.edit_scores:
        for answer in edit.answers:
            if answer.get("acted") is not None:
                acted.setdefault(str(answer["score"]), []).append(float(answer["acted"]))
    return {name: asdict(bootstrap(values)) for name, values in acted.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _editing(run: Run) -> float:
    return sum(seconds for phase, seconds in run.timing.seconds.items() if phase != "evaluation")
