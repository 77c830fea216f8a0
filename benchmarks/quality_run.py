"""One case of ``quality.py``: trained, edited, scored; the outcome as plain values."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fastedit
from benchmarks.quality_cases import FIVE, SCORES, Case
from fastedit.engine import Run
from fastedit.engine.memory.limits import process_bytes
from fastedit.engine.run import plain
from fastedit.evaluation import bootstrap
from fastedit.methods import resolve
from fastedit.requests import EditRequest

#: Edits that processor seconds are taken over.
TIMED = 64
#: Shown besides where a run has them.
FURTHER = ("portability", "blind", "blindness", "routed_in", "routed_in_wrongly")


def records(data: str, split: str, limit: int | None) -> list[EditRequest]:
    """Records of a set, or of several by turns ("a+b")."""
    names = data.split("+")
    each = None if limit is None else math.ceil(limit / len(names))
    parts = [fastedit.read_edits(name, split=split, limit=each) for name in names]
    together = [record for turn in itertools.zip_longest(*parts) for record in turn if record is not None]
    return together[:limit]


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
    trained = _trained(case, model, pool, artifacts)
    given = _given(case, pool, trained, seed)
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
    trained = _trained(case, world.model, world.pool, artifacts)
    fastedit.edit(
        world.model, world.edits, case.method, batch_size=batch_size, mode=case.mode, show_progress=False,
        **_given(case, world.pool, trained, seed),
    )  # fmt: skip
    return process_bytes("VmHWM") / 2**20


def processor_seconds(world: World, method: str, given: Mapping[str, Any]) -> float:
    """Processor seconds of one edit, out of a batch, without scores: what else the machine does is not in them."""
    some = world.edits[:TIMED]
    world.model.caches.clear()
    begin = time.process_time()
    fastedit.edit(world.model, some, method, batch_size=16, evaluate=False, show_progress=False, **given)
    return (time.process_time() - begin) / len(some)


def _given(
    case: Case, pool: Sequence[EditRequest], trained: tuple[Path, float | None] | None, seed: int
) -> dict[str, Any]:
    """What ``fastedit.edit`` is given of a case, however its edits are timed."""
    return {"pool": pool, "seed": seed, **({} if trained is None else {"artifact": trained[0]}), **case.settings}


def _trained(case: Case, model: Any, pool: Sequence[EditRequest], folder: Path) -> tuple[Path, float | None] | None:
    """The file of the method's trained parts, made if it is absent, and the seconds of making it."""
    plan = resolve(case.method, case.settings)
    kind = plan.artifact_kind
    if kind is None:
        return None
    own = "" if not case.training else "-" + "-".join(f"{k}={v}" for k, v in sorted(case.training.items()))
    path = folder / f"{case.model}-{case.data}-{kind}{own}.safetensors"
    notes = path.with_suffix(".json")
    if not path.exists():
        begin = time.perf_counter()
        fastedit.train(model, kind, pool, out=path, show_progress=False, **case.training)
        notes.write_text(json.dumps({"train_s": time.perf_counter() - begin}))
    return path, json.loads(notes.read_text())["train_s"] if notes.exists() else None


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
