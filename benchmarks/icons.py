"""smol-llava under its editors: LDKE's localization on thirty layers, and the methods side by side.

    python benchmarks/icons.py --table localization --edits 20 --seconds 3600
    python benchmarks/icons.py --table methods --edits 40 --seconds 3600
    python benchmarks/icons.py --record                                          keep the rows under results/
    python benchmarks/icons.py --report                                          tables of what is kept

Edits are taken a few at a time and every variant of a table gets the same ones before the next begin, so that the table
compares what it has wherever it is broken off; each variant's few edits are a row, and what is there is not run again.
Weights are bfloat16, as they ship. Seconds are those of the processor, one thread.

Localization: eight candidate layers, three of them for an edit, no classifier, which would decide the same for all.
"brute force" is one set for all edits: each candidate alone is fitted on the first edits of the train split and scored
(mean of what must change, in words seen and unseen, and of what must stay); the best three of them.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest.mock import patch

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from fastedit.backbone import weights_hash
from fastedit.engine import Run
from fastedit.evaluation import bootstrap
from fastedit.methods import resolve
from fastedit.methods.ldke.config import LDKEConfig, candidate_layers
from fastedit.requests import EditRequest

MODEL, DATA, DTYPE = "smol-llava", "icon-entity", "bfloat16"
TABLES = ("localization", "methods")
STORED = record.RESULTS / "icons.jsonl.gz"
#: Below the folder of a run.
ROWS = "rows.jsonl"
#: Edits of one row.
TOGETHER = 4
#: Train records: the first are edits of the search for the best layers, the others the pool.
SEARCHED, POOL = 4, 64
#: What must change and what must stay, of the scores that the search of layers goes by.
CHANGES = ("reliability", "text_generality", "image_generality", "text_generality_unseen", "image_generality_unseen")
STAYS = ("text_locality", "image_locality", "near")
#: Columns of each table, by the parts that it is shown in.
SHOWN: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "localization": ((*CHANGES, *STAYS),),
    "methods": (
        (*CHANGES, "polite"),
        (
            "text_locality", "text_locality_unseen", "image_locality", "image_locality_unseen", "near", "near_unseen",
            "same", "contrary",
        ),
        ("portability[entailed]", "portability[one-hop]", "portability[two-hop]"),
    ),
}  # fmt: skip
LAYERS = 30
CANDIDATES = candidate_layers(LDKEConfig(), LAYERS)
#: Seeds of sets of layers by lot.
LOTS = (1,)
#: Trained parts are made of few records, in few steps: what a machine without a GPU makes in minutes.
TRAINED_ON = 48
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "ldke": {"valid_records": 16, "stored": 64, "trainer": {"steps": 60, "batch_size": 24, "valid_every": 30}},
    "serac": {"valid_records": 12, "trainer": {"steps": 40, "batch_size": 8, "valid_every": 20}},
    "unike": {"valid_records": 12, "triplets": 400, "trainer": {"steps": 100, "batch_size": 64, "valid_every": 25}},
}


@dataclass(frozen=True)
class Variant:
    """One line of a table: a method as ``fastedit.edit`` takes it, and its settings."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def localization(best: Sequence[int]) -> list[Variant]:
    """Ways to choose three layers; `best` are those that the search on train edits named."""
    every: dict[str, Any] = {"route": False, "top": 3}
    return [
        Variant("fast localization", "ldke", every),
        Variant("last 3", "ldke", {**every, "candidates": 3, "layers": 3}),
        Variant("random 3, an edit its own", "ldke", {**every, "layers": "random"}),
        *(Variant(f"random 3, lot {seed}", "ldke", {**every, "layers": by_lot(seed)}) for seed in LOTS),
        Variant("brute force", "ldke", {**every, "layers": tuple(best)}),
    ]


def by_lot(seed: int) -> tuple[int, ...]:
    """Three candidates by lot, the same for all edits."""
    return tuple(sorted(random.Random(seed).sample(CANDIDATES, 3)))


def alone() -> list[Variant]:
    """Each candidate layer alone, for the search."""
    return [
        Variant(f"layer {layer}", "ldke", {"route": False, "candidates": (layer,), "layers": (layer,)})
        for layer in CANDIDATES
    ]


def methods() -> list[Variant]:
    """What `docs/results.md` shows side by side, quickest first."""
    control = {"kl_rephrases": True}
    return [
        Variant("lora", "lora"),
        Variant("kl+lora", "kl+lora", control),
        Variant("odedit+lora", "odedit+lora"),
        Variant("grace", "grace"),
        Variant("wise", "wise"),
        Variant("ike, 4 demonstrations", "ike", {"k": 4}),
        Variant("unike", "unike"),
        Variant("ldke", "ldke"),
        Variant("serac", "serac"),
    ]


def fewer_questions(edit: EditRequest) -> EditRequest:
    """An edit with the questions of the table "localization" alone."""
    return replace(
        edit,
        portability=(),
        probes=tuple(probe for probe in edit.probes if probe.kind == "near" and not probe.wording),
        paraphrases=tuple(one for one in edit.paraphrases if one.kind in CHANGES),
    )


class Bench:
    """A model, its records and the rows that are there.

    Args:
        out: folder of rows and of trained parts. until: of ``time.monotonic``.
    """

    def __init__(self, out: Path, until: float) -> None:
        self.out, self.until = out, until
        self.rows = read(out / ROWS)
        self.model = fastedit.load(MODEL, dtype=DTYPE)
        self.weights = weights_hash(self.model.hf)
        train = fastedit.read_edits(DATA, split="train", limit=SEARCHED + POOL)
        self.searched, self.pool = train[:SEARCHED], train[SEARCHED:]

    def over(self) -> bool:
        """Whether no further row is to begin."""
        return time.monotonic() > self.until

    def run(self, table: str, variant: Variant, start: int, edits: Sequence[EditRequest]) -> dict[str, Any]:
        """A row of some edits, from the file where it is there."""
        key = (table, variant.label, start, self.weights)
        for row in self.rows:
            if key_of(row) == key:
                return row
        given = dict(variant.settings)
        kind = resolve(variant.method, given).artifact_kind
        if kind is not None:
            given["artifact"] = self.trained(kind)
        with patch("fastedit.engine.profiling.timing.time.perf_counter", time.process_time):
            run = fastedit.edit(
                self.model, edits, variant.method, batch_size=TOGETHER, pool=self.pool, show_progress=False, **given
            )
        row = {
            "table": table, "label": variant.label, "start": start, "model": MODEL, "data": DATA, "dtype": DTYPE,
            "weights": self.weights, "method": variant.method, "settings": variant.settings, "edits": len(edits),
            "scores": per_edit(run, scores_of(table)), "layers": layers_of(run),
            "cpu_seconds": {name: round(value, 3) for name, value in run.timing.seconds.items()},
            "steps": run.timing.steps, "provenance": run.provenance,
        }  # fmt: skip
        self.append(row)
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Put a row into the file."""
        plain = json.loads(json.dumps(row))
        self.rows.append(plain)
        with (self.out / ROWS).open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(plain) + "\n")

    def trained(self, kind: str) -> Path:
        """The file of a method's trained parts, made if it is absent; its seconds are a row."""
        path = self.out / f"{MODEL}-{DATA}-{kind}.safetensors"
        if not path.exists():
            begin = time.process_time()
            fastedit.train(self.model, kind, self.pool[:TRAINED_ON], out=path, show_progress=False, **TRAINING[kind])
            spent = round(time.process_time() - begin, 1)
            self.append({"table": "training", "label": kind, "start": 0, "weights": self.weights, "cpu_seconds": spent})
        return path


def scores_of(table: str) -> list[str]:
    """Names of the scores that rows of a table have; the search has those of the table that it is made for."""
    return [name for part in SHOWN.get(table, SHOWN["localization"]) for name in part]


def per_edit(run: Run, names: Sequence[str]) -> dict[str, list[float | None]]:
    """One value an edit under the strict protocol, of the scores that any edit has."""
    found = {name: [each.strict.get(name) for each in run.edit_scores] for name in names}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def layers_of(run: Run) -> list[list[int]]:
    """By edit, the layers that a delta of kind "localized" changes."""
    found = []
    for delta in run.deltas:
        if "layers" not in delta.tensors:
            return []
        sites = [site.layer for site in delta.spec.sites]
        found.append([sites[int(place) - 1] for place in delta.tensors["layers"].flatten().tolist()])
    return found


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from the others."""
    return row["table"], row["label"], row["start"], row["weights"]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, which may be compressed; none where it is not there."""
    return [json.loads(line) for line in record.unpacked(path).splitlines()] if path.is_file() else []


def worth(row: Mapping[str, Any]) -> float:
    """Mean over edits of the means of what must change and of what must stay."""
    parts = []
    for names in (CHANGES, STAYS):
        values = [value for name in names for value in row["scores"].get(name, ()) if value is not None]
        parts.append(mean(values))
    return mean(parts)


def best_three(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Layers that are best alone, rising; of equal ones the earlier."""
    ranked = sorted((-worth(row), int(row["label"].split()[1])) for row in rows)
    return sorted(layer for _, layer in ranked[:3])


def measure(bench: Bench, table: str, edits: int, left_out: Sequence[str] = ()) -> None:
    """Run a table's rows, a few edits after the other, until time is over."""
    if table == "localization":
        searched = [fewer_questions(edit) for edit in bench.searched]
        singles = [bench.run("search", variant, 0, searched) for variant in alone()]
        variants = localization(best_three(singles))
    else:
        variants = [variant for variant in methods() if variant.label not in left_out]
    records = fastedit.read_edits(DATA, split="eval", limit=edits)
    for start in range(0, len(records), TOGETHER):
        chunk = records[start : start + TOGETHER]
        for variant in variants:
            if bench.over():
                return
            asked = [fewer_questions(edit) for edit in chunk] if table == "localization" else chunk
            begin = time.monotonic()
            bench.run(table, variant, start, asked)
            print(f"{table} {start} {variant.label}: {time.monotonic() - begin:.0f} s", flush=True)


def complete(rows: Sequence[Mapping[str, Any]], table: str) -> dict[str, list[Mapping[str, Any]]]:
    """By label, the rows of those edits that every variant of a table was measured on."""
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["table"] == table:
            by_label.setdefault(row["label"], {})[row["start"]] = row
    shared = set.intersection(*(set(found) for found in by_label.values())) if by_label else set()
    return {label: [found[start] for start in sorted(shared)] for label, found in by_label.items()} if shared else {}


def markdown(rows: Sequence[Mapping[str, Any]], table: str) -> Iterator[str]:
    """Lines of a table, in its parts: means, beside them 95 % bootstrap intervals, and processor seconds an edit.

    The number of edits that have a score stands in its head where not all do.
    """
    by_label = complete(rows, table)
    for number, part in enumerate(SHOWN[table] if by_label else ()):
        last = number == len(SHOWN[table]) - 1
        own = next(iter(by_label.values()))
        edits = sum(row["edits"] for row in own)
        counts = {name: bootstrap(values_of(own, name)).n for name in part}
        heads = [f"{name.replace('_', ' ')}{f' ({n})' if n < edits else ''}" for name, n in counts.items()]
        seconds = ["localization, s", "fit, s"] if table == "localization" else ["s an edit"]
        yield f"| {' | '.join([table, *heads, *(seconds if last else [])])} |"
        yield f"|{'---|' * (1 + len(heads) + (len(seconds) if last else 0))}"
        for label, own in by_label.items():
            cells = [label, *(cell(values_of(own, name)) for name in part)]
            cells += costs(own, split=table == "localization") if last else []
            yield f"| {' | '.join(cells)} |"
        yield ""


def values_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """One value an edit of a score, over rows."""
    return [value for row in rows for value in row["scores"].get(name, [None] * row["edits"])]


def cell(values: Sequence[float | None]) -> str:
    """A mean with its interval, "-" where no edit has the score."""
    score = bootstrap(values)
    return f"{score.mean:.2f} <sub>{score.low:.2f} to {score.high:.2f}</sub>" if score.n else "-"


def costs(rows: Sequence[Mapping[str, Any]], *, split: bool) -> list[str]:
    """Processor seconds an edit without evaluation: of getting ready, which localization is part of, and of the fit."""
    edits = sum(row["edits"] for row in rows)
    ready = sum(row["cpu_seconds"].get("setup", 0.0) for row in rows) / edits
    whole = sum(v for row in rows for name, v in row["cpu_seconds"].items() if name != "evaluation") / edits
    return [f"{ready:.2f}", f"{whole - ready:.2f}"] if split else [f"{whole:.2f}"]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, the search, and how often each layer was chosen."""
    lines: list[str] = []
    for table in TABLES:
        lines += [f"## {table}", "", *markdown(rows, table)]
    for row in rows:
        if row["table"] == "search":
            spent = sum(v for name, v in row["cpu_seconds"].items() if name != "evaluation")
            lines.append(f"* {row['label']}: {worth(row):.3f}, {spent:.1f} s")
        if row["table"] == "training":
            lines.append(f"* {row['label']} trained: {row['cpu_seconds']:.0f} s")
    for label, own in complete(rows, "localization").items():
        counted = Counter(layer for row in own for layers in row["layers"] for layer in layers)
        lines.append(f"* {label}: {', '.join(f'layer {n} {c} times' for n, c in sorted(counted.items()))}")
    return "\n".join(lines)


def main(
    table: Annotated[str, typer.Option(help=", ".join(TABLES))] = TABLES[0],
    edits: Annotated[int, typer.Option(help="of every variant", min=1)] = 20,
    seconds: Annotated[float, typer.Option(help="begin no row after so long", min=0)] = 1e9,
    out: Annotated[Path, typer.Option(help="folder of rows and trained parts")] = Path("runs/icons"),
    without: Annotated[str, typer.Option(help="methods to leave out, by commas")] = "",
    store: Annotated[bool, typer.Option("--record", help="keep the rows of --out, run nothing")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
) -> None:
    """Measure on smol-llava."""
    if table not in TABLES:
        raise typer.BadParameter(f"icons: table must be one of {', '.join(TABLES)} (got table={table!r})")
    if store:
        rows = read(out / ROWS)
        STORED.write_bytes(record.packed("".join(json.dumps(row) + "\n" for row in rows), STORED))
    elif not only_report:
        out.mkdir(parents=True, exist_ok=True)
        measure(Bench(out, time.monotonic() + seconds), table, edits, without.split(","))
    print(report(read(STORED if store or only_report else out / ROWS)))


if __name__ == "__main__":
    typer.run(main)
