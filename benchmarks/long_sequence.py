"""Thousands of edits in one sequence that do not contradict each other, scored on a sample at gaps.

    python benchmarks/long_sequence.py --method ldke --edits 10000 --fit asked --record
    python benchmarks/long_sequence.py --method grace --edits 10000
    python benchmarks/long_sequence.py --report

Of the 1,000 eval records of pocket-vqa 157 are about a flag that another one is about as well, with another answer: no
editor can give both on a third picture. Here no two edits ask the same of the same thing, and none changes what another
one's probes ask. All scenes are of the eval split; from number 1,000 on they are in no published set.

Edits of ``ldke`` are made alone and act alone. So of a sequence those alone are fitted that act on anything that is
asked (``--fit asked``); the others have what the router reads of them, and no change. Scores are those of the whole
sequence: the test of this module compares both. ``--fit all`` fits all, in a ledger that a later call goes on with.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.data.report import target_key
from fastedit.deltas import EditDelta, Rows, installed, split_point, stack
from fastedit.deltas.questions import QUESTIONS
from fastedit.engine import provenance
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import evaluation_views, summarise
from fastedit.methods import resolve
from fastedit.methods.base import is_trained
from fastedit.methods.ldke.views import walked
from fastedit.pocket.edits import Record, draw
from fastedit.pocket.requests import request
from fastedit.pocket.world import FlagScene, render
from fastedit.requests import EditRequest, Query
from fastedit.routers.classifier import ANSWER, Disentangler
from fastedit.training import Artifact

GAPS = (1, 10, 100, 1000, 10000)
SHOWN = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality", "near", "same")
#: Where outcomes are kept.
RESULTS = record.RESULTS / "sequences.jsonl"
#: Prompts that are walked together.
ROWS = 256


def content(scene: Any) -> str:
    """What a scene shows, however it is rendered."""
    return scene.country if isinstance(scene, FlagScene) else repr(replace(scene, seed=0))


def consistent(name: str, split: str = "eval") -> Iterator[Record[Any]]:
    """Records in order of their numbers, without those that contradict an earlier one.

    A record is left out if an earlier one edits the same kind of thing of the same scene or flag, if it edits what an
    earlier one's locality questions and probes ask, or if its own ask what an earlier one edits.
    """
    edited: set[tuple[str, str]] = set()
    kept: set[tuple[str, str]] = set()
    # Scenes of which nothing may change
    untouched: set[str] = set()
    scenes: set[str] = set()
    number = -1
    while True:
        number += 1
        drawn = draw(name, split, number)
        if drawn is None:
            continue
        mine = (content(drawn.scene), drawn.kind)
        asked = {(content(probe.scene), drawn.kind) for probe in drawn.near if probe.scene is not None}
        asked |= {(content(drawn.scene), probe.kind.split()[0]) for probe in drawn.same}
        elsewhere = {content(drawn.locality.scene)} - {mine[0]} if drawn.locality.scene is not None else set()
        if mine in edited or mine in kept or mine[0] in untouched or asked & edited:
            continue
        if elsewhere & scenes:
            continue
        edited.add(mine)
        scenes.add(mine[0])
        kept |= asked
        untouched |= elsewhere
        yield drawn


def sample_of(count: int, most: int, seed: int = 0) -> list[int]:
    """Numbers of the edits among the first ``count`` that are scored."""
    if count <= most:
        return list(range(count))
    return sorted(random.Random(f"{seed}|{count}|scored").sample(range(count), most))


def choices(model: EditableModel, stacked: Any, queries: Sequence[Query]) -> list[int]:
    """The edit that acts on each question, or -1."""
    chosen: list[int] = []
    with torch.no_grad(), installed(model, stacked, Rows()) as holder:
        for start in range(0, len(queries), ROWS):
            with holder.paused():
                state = packed_start(model, model.encode(queries[start : start + ROWS], answers=False))
                holder.route(packed_prefix(model, state, *split_point(stacked.spec)))
            chosen += holder.choice or []
    return chosen


def run_asked(
    model: EditableModel,
    records: Sequence[Record[Any]],
    gaps: Sequence[int],
    sample: int,
    artifact: Artifact,
    method: str = "ldke",
    **given: Any,
) -> dict[str, Any]:
    """Scores at gaps of a sequence of ``ldke``, of which those edits alone are fitted that act on what is asked.

    Args:
        records: of the edits. gaps: lengths that are scored. sample: most edits scored at each.
        artifact: the classifier. method: "ldke" under any objective. given: arguments of ``fastedit.edit``.
    Returns:
        by gap, scores; how many were fitted; processor seconds by part.
    """
    begin = time.process_time()
    settings = {"evaluate": False, "show_progress": False, "mode": "sequential", "conflicts": "last", **given}
    settings |= {"artifact": artifact}
    edits = {number: _request(records, number) for gap in gaps for number in sample_of(gap, sample)}
    deltas = held_memories(model, records, artifact, method, **given)
    seconds = {"memories": time.process_time() - begin}
    acting: set[int] = set()
    for gap in gaps:
        queries = [v.query for number in sample_of(gap, sample) for v in evaluation_views(edits[number])]
        acting |= {number for number in choices(model, stack(deltas[:gap]), queries) if number >= 0}
    seconds["routing"] = time.process_time() - begin - sum(seconds.values())
    numbers = sorted(acting)
    to_fit = [edits.get(number) or _request(records, number) for number in numbers]
    fitted = fastedit.edit(model, to_fit, method, **settings).deltas
    for number, delta in zip(numbers, fitted, strict=True):
        deltas[number] = delta
    seconds["fitting"] = time.process_time() - begin - sum(seconds.values())
    scores = {gap: _scored(model, edits, deltas[:gap], sample_of(gap, sample)) for gap in gaps}
    seconds["scoring"] = time.process_time() - begin - sum(seconds.values())
    return {"scores": scores, "fitted": len(numbers), "processor_seconds": seconds}


def held_memories(
    model: EditableModel, records: Sequence[Record[Any]], artifact: Artifact, method: str = "ldke", **given: Any
) -> list[EditDelta]:
    """A delta an edit that changes nothing, with what the router reads of it. Arguments as for ``run_asked``."""
    settings = {"evaluate": False, "show_progress": False, "mode": "sequential", "conflicts": "last", **given}
    # Nothing is stepped: a change of zero, the same tensors for all, beside what the router reads of each
    first = [_request(records, number) for number in (0, 1)]
    like = fastedit.edit(model, first, method, **{**settings, "artifact": artifact, "steps": 0}).deltas[0]
    return _memories(model, records, like, Disentangler.of(artifact, model.device))


def _request(records: Sequence[Record[Any]], number: int) -> EditRequest:
    return request("pocket-vqa", "eval", number, records[number], render)


@torch.no_grad()
def _memories(
    model: EditableModel, records: Sequence[Record[Any]], like: EditDelta, classifier: Disentangler
) -> list[EditDelta]:
    """A delta an edit that changes nothing, with what the classifier keeps of its question."""
    deltas = []
    for start in range(0, len(records), ROWS):
        part = records[start : start + ROWS]
        tokens = walked(model, split_point(like.spec), [Query(each.prompt, render(each.scene)) for each in part])
        kept = (*classifier(tokens), tokens.centre())
        for row, each in enumerate(part):
            tensors = {name: value[row] for name, value in zip(("entity", "relation", "image"), kept, strict=True)}
            texts = {name: text for name, text in like.texts.items() if name != QUESTIONS}
            texts |= {ANSWER: target_key(each.target), QUESTIONS: f"unfitted-{start + row}"}
            deltas.append(replace(like, tensors={**like.tensors, **tensors}, texts=texts, request_id=str(start + row)))
    return deltas


def _scored(
    model: EditableModel, edits: Mapping[int, EditRequest], deltas: Sequence[EditDelta], numbers: Sequence[int]
) -> dict[str, Any]:
    stacked = stack(list(deltas))
    evaluator = Evaluator(model, stacked.spec, PhaseTimer(model.device))
    found = []
    for start in range(0, len(numbers), 64):
        part = [edits[number] for number in numbers[start : start + 64]]
        found += evaluator.scores(part, stacked, shared=True)
    return _plain(summarise(found, seed=0))


def run_all(
    model: EditableModel, edits: Sequence[EditRequest], method: str, gaps: Sequence[int], sample: int, **given: Any
) -> dict[str, Any]:
    """The same of a sequence of which every edit is fitted."""
    begin = time.process_time()
    run = fastedit.edit(
        model, edits, method, mode="sequential", conflicts="last", show_progress=False, score_sample=sample,
        score_at=[gap for gap in gaps if gap < len(edits)], **given,
    )  # fmt: skip
    scores = {gap: _plain(found) for gap, found in run.checkpoints.items()} | {len(edits): _plain(run.scores)}
    seconds = {"all": time.process_time() - begin, **run.timing.seconds}
    return {"scores": scores, "fitted": len(edits), "processor_seconds": seconds}


def _plain(scores: Any) -> dict[str, Any]:
    return {protocol: {name: asdict(score) for name, score in own.items()} for protocol, own in scores.items()}


def rows(path: Path) -> list[dict[str, Any]]:
    """Stored outcomes, of each method with its settings the longest sequence, the newest of equal ones."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        key = row["case"]["method"], json.dumps(row["case"]["settings"])
        if key not in found or row["case"]["edits"] >= found[key]["case"]["edits"]:
            found[key] = row
    return list(found.values())


def cells(outcomes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Stored outcomes as texts: method, length and scores, a line a gap."""
    lines = []
    for row in outcomes:
        for gap, scores in row["scores"].items():
            strict = scores["strict"]
            values = [f"{strict[name]['mean']:.3f}" if name in strict else "" for name in SHOWN]
            lines.append([row["case"]["label"], f"{int(gap):,}", *values])
    return lines


def markdown(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """Outcomes as a Markdown table."""
    lines = [["method", "edits", *SHOWN], ["---"] * (2 + len(SHOWN)), *cells(outcomes)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def show(outcomes: Sequence[dict[str, Any]], console: Console) -> None:
    """Print outcomes."""
    table = Table("method", "edits", *SHOWN)
    for line in cells(outcomes):
        table.add_row(*line)
    console.print(table)


def draw_curves(outcomes: Sequence[dict[str, Any]], path: Path) -> Path:
    """A picture of reliability, generality and locality by the length of the sequence."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    wanted = ("reliability", "text_generality", "image_generality", "image_locality", "near")
    names = [name for name in wanted if any(name in s["strict"] for row in outcomes for s in row["scores"].values())]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3 * len(names), 3.5), sharey=True, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        for row in outcomes:
            points = [(int(gap), s["strict"][name]) for gap, s in row["scores"].items() if name in s["strict"]]
            x, y = [gap for gap, _ in points], [score["mean"] for _, score in points]
            axis.plot(x, y, marker="o", label=row["case"]["label"])
            axis.fill_between(x, [s["low"] for _, s in points], [s["high"] for _, s in points], alpha=0.15)
        axis.set(xscale="log", title=name.replace("_", " "), xlabel="edits in sequence", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def main(
    method: Annotated[str, typer.Option(help="ldke, odedit+ldke, grace, wise, lora ...")] = "ldke",
    edits: Annotated[int, typer.Option(help="how many", min=1)] = 10_000,
    sample: Annotated[int, typer.Option(help="most edits scored at a gap", min=1)] = 1000,
    fit: Annotated[str, typer.Option(help="asked: fit what acts on a question that is asked; all")] = "all",
    model: Annotated[str, typer.Option()] = "pocket-llava",
    settings: Annotated[str, typer.Option(help="JSON of the method's settings")] = "{}",
    label: Annotated[str, typer.Option(help="in tables and pictures; the method if absent")] = "",
    train_records: Annotated[int, typer.Option(help="of the pool and of trained parts", min=1)] = 2000,
    trainer: Annotated[str, typer.Option(help="JSON of the training's settings")] = "{}",
    artifact: Annotated[Path | None, typer.Option(help="trained parts; made there if absent")] = None,
    ledger: Annotated[Path | None, typer.Option(help="folder; a call that was broken off goes on there")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the stored outcomes here")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the outcome to benchmarks/results/")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
) -> None:
    """Edit in one long sequence, and score it at gaps."""
    console = Console()
    if not only_report:
        loaded = fastedit.load(model)
        pool = fastedit.read_edits("pocket-vqa", split="train", limit=train_records)
        given: dict[str, Any] = {"pool": pool, **_tuples(json.loads(settings))}
        if is_trained(resolve(method, {}).method):
            if artifact is None or not artifact.exists():
                made = fastedit.train(
                    loaded, method, pool, out=artifact, trainer=json.loads(trainer), show_progress=False
                )
            else:
                made = fastedit.load_artifact(artifact, loaded)
            given["artifact"] = made
        gaps = [gap for gap in GAPS if gap < edits] + [edits]
        records = list(itertools.islice(consistent("pocket-vqa"), edits))
        if ledger is not None:
            given["ledger"] = fastedit.open_ledger(ledger, loaded)
        if fit == "asked":
            outcome = run_asked(loaded, records, gaps, sample, given.pop("artifact"), method, batch_size=64, **given)
        else:
            wanted = [_request(records, number) for number in range(edits)]
            outcome = run_all(loaded, wanted, method, gaps, sample, batch_size=64, **given)
        case = {"method": method, "edits": edits, "sample": sample, "fit": fit, "settings": json.loads(settings)}
        case |= {"label": label or method, "model": model, "train_records": train_records, "trainer": trainer}
        case |= {"model_fingerprint": loaded.fingerprint}
        row = {"case": case, **outcome, "machine": record.machine(), "versions": provenance.versions()}
        row |= {"commit": record.commit_with_changes(provenance.commit()), "time": provenance.utc_now()}
        line = json.dumps(row)
        show([json.loads(line)], console)
        console.print(
            {name: round(value, 1) for name, value in outcome["processor_seconds"].items()}, outcome["fitted"]
        )
        if store:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if picture is not None or only_report:
        known = rows(RESULTS)
        show(known, console)
        if picture is not None:
            console.print(f"picture: {draw_curves(known, picture)}")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


if __name__ == "__main__":
    typer.run(main)
