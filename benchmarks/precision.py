"""What quantization costs: answers of the unedited model, and scores of edits, at every precision.

    python benchmarks/precision.py                         float32, bfloat16, int8, nf4 on the embedded model
    python benchmarks/precision.py --precisions float32,nf4 --edits 200 --record

The edits, their order and their settings are the same at every precision, so that differences are paired.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from fastedit.backbone import EditableModel
from fastedit.engine import Run, provenance
from fastedit.evaluation import PROTOCOLS, Score, bootstrap, bootstrap_difference, exact_match
from fastedit.requests import EditRequest, Query

#: Name of a precision -> arguments of ``fastedit.load``; quantized weights multiply in float32.
PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "nf4": {"dtype": "float32", "quantize": "nf4"},
}
SCORES = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality", "near", "same")
GENERATED = 64


@dataclass(frozen=True)
class Costed:
    """One precision.

    Args:
        name: of PRECISIONS.
        base_prediction: share of the records whose own question the unedited model answers as recorded.
        base_answers: share of all their recorded unedited answers, mean over records.
        run: the edits, scored.
    """

    name: str
    base_prediction: Score
    base_answers: Score
    run: Run

    def score(self, protocol: str, name: str) -> Score | None:
        """Mean over edits with its interval; None where no edit has the score."""
        found = self.run.scores[protocol].get(name)
        return found if found is not None and found.n else None


def unedited(request: EditRequest) -> list[Query]:
    """Every question of a record with the answer that was recorded before any edit, its own question first."""
    asked = []
    if request.prediction:
        asked.append(Query(request.prompt, request.image, request.prediction))
        if request.rephrase is not None:
            asked.append(Query(request.rephrase, request.image, request.prediction))
        if request.image_rephrase is not None:
            asked.append(Query(request.prompt, request.image_rephrase, request.prediction))
    if request.locality_prompt is not None:
        asked.append(Query(request.locality_prompt, None, request.locality_answer))
    if request.image_locality_prompt is not None:
        asked.append(Query(request.image_locality_prompt, request.image_locality_image, request.image_locality_answer))
    asked += [probe.query for probe in request.probes]
    return [query for query in asked if query.answer]


def base_accuracy(model: EditableModel, records: Sequence[EditRequest], *, batch_size: int = 64) -> tuple[Score, Score]:
    """Shares of recorded predictions, and of all recorded unedited answers, that the model gives.

    Raises:
        ValueError: a record without a prediction.
    """
    asked = [unedited(request) for request in records]
    for request, queries in zip(records, asked, strict=True):
        if not request.prediction:
            raise ValueError(f"precision: records carry a prediction (got none in {request.id!r})")
        assert queries
    flat = [query for queries in asked for query in queries]
    answers = iter(model.generate(flat, max_new_tokens=GENERATED, batch_size=batch_size))
    right = [[float(exact_match(next(answers), str(query.answer))) for query in queries] for queries in asked]
    return bootstrap([own[0] for own in right]), bootstrap([sum(own) / len(own) for own in right])


def cost(
    name: str,
    model_name: str,
    edits: Sequence[EditRequest],
    records: Sequence[EditRequest],
    *,
    method: str = "lora",
    batch_size: int = 64,
    seed: int = 0,
    **overrides: Any,
) -> Costed:
    """Load the model at a precision, ask it, edit it.

    Args:
        name: of PRECISIONS. model_name: as ``fastedit.load`` takes it.
        edits: made and scored. records: asked of the unedited model.
        method, batch_size, seed, overrides: of ``fastedit.edit``.
    Raises:
        ImportError: quantization without bitsandbytes.
    """
    model = fastedit.load(model_name, **PRECISIONS[name])
    prediction, answers = base_accuracy(model, records, batch_size=batch_size)
    run = fastedit.edit(
        model, edits, method, batch_size=batch_size, evaluate=True, seed=seed, show_progress=False, **overrides
    )
    return Costed(name, prediction, answers, run)


def rows_of(found: Sequence[Costed], config: dict[str, Any]) -> list[record.Row]:
    """Every score as a row, the bounds of its interval as rows of their own."""
    machine, versions, now = record.machine(), provenance.versions(), provenance.utc_now()
    commit = record.commit_with_changes(provenance.commit())
    rows = []
    for each in found:
        own = {**config, "precision": each.name}
        named: dict[str, Score | None] = {"base_prediction": each.base_prediction, "base_answers": each.base_answers}
        named |= {f"{p}_{score}": each.score(p, score) for p in PROTOCOLS for score in SCORES}
        for metric, score in named.items():
            if score is None or not math.isfinite(score.mean):
                continue
            for suffix, value in (("", score.mean), ("_low", score.low), ("_high", score.high)):
                shared = (own, machine, versions, commit, int(config["seed"]), now)
                case = f"precision({config['model']},{config['method']},edits={config['edits']})/precision={each.name}"
                rows.append(record.Row(case, "engine", metric + suffix, "1", value, value, value, None, None, *shared))
    return record.check(rows)


def show(found: Sequence[Costed], console: Console) -> None:
    """Print the tables: the unedited model, both protocols, and differences to the first precision."""
    names = [each.name for each in found]
    base = {
        "own question": [each.base_prediction for each in found],
        "all unedited": [each.base_answers for each in found],
    }
    _print(console, "unedited model: answers as recorded", names, base)
    for protocol in PROTOCOLS:
        scores = {score: [each.score(protocol, score) for each in found] for score in SCORES}
        _print(console, f"after an edit, {protocol}", names, scores)
    if len(found) > 1:
        per_edit = [[edit.strict for edit in each.run.edit_scores] for each in found]
        apart = {
            score: [
                bootstrap_difference([own.get(score) for own in other], [own.get(score) for own in per_edit[0]])
                for other in per_edit[1:]
            ]
            for score in SCORES
        }
        _print(console, f"strict, minus {names[0]} on the same edits", names[1:], apart, "+.2f")


def _print(
    console: Console, title: str, names: Sequence[str], cells: Mapping[str, Sequence[Score | None]], form: str = ".2f"
) -> None:
    """A table with a column for every precision; under a mean its interval."""
    table = Table("", *names)
    for score, values in cells.items():
        table.add_row(score.replace("_", " "), *(_text(value, form) for value in values))
    console.print(f"[bold]{title}[/bold]")
    console.print(table)


def _text(score: Score | None, form: str) -> str:
    if score is None or not score.n:
        return "-"
    return f"{score.mean:{form}}\n\\[{score.low:{form}}, {score.high:{form}}]"


def main(
    model: Annotated[str, typer.Option(help="an embedded model")] = "pocket-llava",
    data: Annotated[str, typer.Option(help="records that carry predictions")] = "pocket-vqa",
    precisions: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = ",".join(PRECISIONS),
    method: Annotated[str, typer.Option(help="ft, lora ...")] = "lora",
    layers: Annotated[int, typer.Option(help="the last so many layers are edited", min=1)] = 2,
    edits: Annotated[int, typer.Option(help="how many", min=1)] = 100,
    records: Annotated[int, typer.Option(help="asked of the unedited model", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="edits fitted together", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="of views and intervals")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
) -> None:
    """Score the same edits at several precisions."""
    console = Console()
    names = [name for name in precisions.split(",") if name]
    problem = _problem(names)
    if problem:
        console.print(problem, style="red", markup=False, highlight=False)
        raise typer.Exit(1)
    asked = fastedit.read_edits(data, limit=max(edits, records))
    found = []
    for name in names:
        with console.status(name):
            found.append(
                cost(
                    name,
                    model,
                    asked[:edits],
                    asked[:records],
                    method=method,
                    batch_size=batch_size,
                    seed=seed,
                    layers=layers,
                )
            )
    show(found, console)
    config = {"model": model, "data": data, "method": method, "layers": layers, "edits": edits, "records": records}
    rows = rows_of(found, {**config, "batch_size": batch_size, "seed": seed})
    if json_path is not None:
        console.print(f"rows: {record.write_json(rows, json_path)}")
    if store:
        console.print(f"rows appended to {record.append(rows)}")


def _problem(names: Sequence[str]) -> str:
    """What makes the precisions impossible, before any work; "" if nothing."""
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        return f"precision: precisions are {', '.join(PRECISIONS)} (got {', '.join(unknown) or 'none'})"
    quantized = [name for name in names if "quantize" in PRECISIONS[name]]
    if quantized and importlib.util.find_spec("bitsandbytes") is None:
        return f"precision: {', '.join(quantized)} needs bitsandbytes: pip install 'bitsandbytes>=0.48' accelerate"
    return ""


if __name__ == "__main__":
    typer.run(main)
