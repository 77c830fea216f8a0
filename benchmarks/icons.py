"""smol-llava under its editors: LDKE's localization on thirty layers, and the methods side by side.

    python benchmarks/icons.py --table localization --edits 20 --seconds 3600
    python benchmarks/icons.py --table methods --edits 40 --seconds 3600
    python benchmarks/icons.py --table methods --data icon-vqa --edits 24
    python benchmarks/icons.py --table controls --edits 24                       each with its own loss, kl+ and odedit+
    python benchmarks/icons.py --table hops --edits 40                           only edits that have a two-hop question
    python benchmarks/icons.py --record                                          keep the rows under results/
    python benchmarks/icons.py --report                                          tables of what is kept

Edits are taken a few at a time and every variant of a table gets the same ones before the next begin, so that the table
compares what it has wherever it is broken off; each variant's few edits are a row, and what is there is not run again.
Weights are bfloat16, as they ship. Seconds are those of the processor, one thread.

Localization: eight candidate layers, three of them for an edit, no classifier, which would decide the same for all.
"brute force" is one set for all edits: each candidate alone is fitted on the first edits of the train split and scored
(mean of what must change, in words seen and unseen, and of what must stay); the best three of them, and the best one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from benchmarks.icons_tables import CHANGES, TABLES, report, scores_of, worth
from fastedit.backbone import weights_hash
from fastedit.engine import Run
from fastedit.methods import resolve
from fastedit.methods.ldke.config import LDKEConfig, candidate_layers
from fastedit.requests import EditRequest
from fastedit.smol.names import SETS

MODEL, DTYPE = "smol-llava", "bfloat16"
STORED = record.RESULTS / "icons.jsonl.gz"
#: Below the folder of a run.
ROWS = "rows.jsonl"
#: Edits of one row.
TOGETHER = 4
#: Train records: the first are edits of the search for the best layers, the others the pool.
SEARCHED, POOL = 4, 64
#: Methods of the table "controls"; `lora` stands in the other one.
CONTROLLED = ("ft", "tpatcher", "unike", "ldke", "wise", "grace")
LAYERS = 30
CANDIDATES = candidate_layers(LDKEConfig(), LAYERS)
#: Where layers are compared: no classifier, and the steps and positions that were the default when they were.
LOCALIZED: Mapping[str, Any] = {"route": False, "steps": 50, "positions": "all"}
#: Seeds of sets of layers by lot.
LOTS = (1,)
#: Trained parts are made of few records, in few steps: what a machine without a GPU makes in minutes.
TRAINED_ON = 48
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "ldke": {"valid_records": 16, "stored": 64, "trainer": {"steps": 60, "batch_size": 24, "valid_every": 30}},
    "serac": {"valid_records": 12, "trainer": {"steps": 120, "batch_size": 8, "valid_every": 30}},
    "unike": {"valid_records": 12, "triplets": 400, "trainer": {"steps": 100, "batch_size": 64, "valid_every": 25}},
    "mend": {"valid_records": 12, "trainer": {"steps": 150, "batch_size": 8, "valid_every": 50}},
}


@dataclass(frozen=True)
class Variant:
    """One line of a table: a method as ``fastedit.edit`` takes it, and its settings."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def localization(best: Sequence[int]) -> list[Variant]:
    """Ways to choose layers; `best` are those that the search on train edits named, the best one first."""
    every: dict[str, Any] = {**LOCALIZED, "top": 3}
    return [
        Variant("fast localization", "ldke", every),
        Variant("last 3", "ldke", {**every, "candidates": 3, "layers": 3}),
        Variant("random 3, an edit its own", "ldke", {**every, "layers": "random"}),
        *(Variant(f"random 3, lot {seed}", "ldke", {**every, "layers": by_lot(seed)}) for seed in LOTS),
        Variant("brute force", "ldke", {**every, "layers": tuple(sorted(best))}),
        Variant("brute force, one layer", "ldke", {**LOCALIZED, "candidates": (best[0],), "layers": (best[0],)}),
    ]


def by_lot(seed: int) -> tuple[int, ...]:
    """Three candidates by lot, the same for all edits."""
    return tuple(sorted(random.Random(seed).sample(CANDIDATES, 3)))


def alone() -> list[Variant]:
    """Each candidate layer alone, for the search."""
    return [
        Variant(f"layer {layer}", "ldke", {**LOCALIZED, "candidates": (layer,), "layers": (layer,)})
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
        Variant("ike, no demonstrations", "ike", {"k": 0}),
        Variant("unike", "unike"),
        Variant("ldke", "ldke"),
        Variant("serac", "serac"),
        Variant("mend", "mend"),
    ]


def controls() -> list[Variant]:
    """What is fitted edit by edit, with its own loss, with the control's and with ODEdit's; both see rephrases."""
    found = []
    for name in CONTROLLED:
        found += [Variant(name, name), Variant(f"kl+{name}", f"kl+{name}", {"kl_rephrases": True})]
        found.append(Variant(f"odedit+{name}", f"odedit+{name}"))
    return found


def fewer_questions(edit: EditRequest, table: str = "localization") -> EditRequest:
    """An edit with the questions that a table shows alone."""
    if table == "hops":
        return replace(edit, probes=(), paraphrases=())
    if table != "localization":
        return edit
    return replace(
        edit,
        portability=(),
        probes=tuple(probe for probe in edit.probes if probe.kind == "near" and not probe.wording),
        paraphrases=tuple(one for one in edit.paraphrases if one.kind in CHANGES),
    )


def chosen(edits: Sequence[EditRequest], table: str) -> list[EditRequest]:
    """The edits of a table: for "hops" those alone that have a two-hop question."""
    return [edit for edit in edits if table != "hops" or any(one.kind == "two-hop" for one in edit.portability)]


class Bench:
    """A model, its records and the rows that are there.

    Args:
        out: folder of rows and of trained parts. until: of ``time.monotonic``. data: an edit set.
        dtype: of the weights, which ship in bfloat16.
    """

    def __init__(self, out: Path, until: float, data: str, dtype: str = DTYPE) -> None:
        self.out, self.until, self.data, self.dtype = out, until, data, dtype
        self.rows = read(out / ROWS)
        self.model = fastedit.load(MODEL, dtype=dtype)
        self.weights = weights_hash(self.model.hf)
        train = fastedit.read_edits(data, split="train", limit=SEARCHED + POOL)
        self.searched, self.pool = train[:SEARCHED], train[SEARCHED:]

    def over(self) -> bool:
        """Whether no further row is to begin."""
        return time.monotonic() > self.until

    def run(self, table: str, variant: Variant, start: int, edits: Sequence[EditRequest]) -> dict[str, Any]:
        """A row of some edits, from the file where it is there."""
        key = (table, self.data, variant.label, start, self.weights)
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
            "table": table, "label": variant.label, "start": start, "model": MODEL, "data": self.data,
            "dtype": self.dtype, "weights": self.weights, "method": variant.method, "settings": variant.settings,
            "edits": len(edits),
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
        path = self.out / f"{MODEL}-{self.data}-{kind}.safetensors"
        if not path.exists():
            begin = time.process_time()
            fastedit.train(self.model, kind, self.pool[:TRAINED_ON], out=path, show_progress=False, **TRAINING[kind])
            spent = round(time.process_time() - begin, 1)
            made: dict[str, Any] = {"table": "training", "label": kind, "start": 0, "data": self.data}
            self.append({**made, "weights": self.weights, "cpu_seconds": spent})
        return path


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
    return row["table"], row["data"], row["label"], row["start"], row["weights"]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, which may be compressed; none where it is not there."""
    return [json.loads(line) for line in record.unpacked(path).splitlines()] if path.is_file() else []


def best_three(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Layers that are best alone, the best first; of equal ones the earlier."""
    ranked = sorted((-worth(row), int(row["label"].split()[1])) for row in rows)
    return [layer for _, layer in ranked[:3]]


def measure(bench: Bench, table: str, edits: int, left_out: Sequence[str] = ()) -> None:
    """Run a table's rows, a few edits after the other, until time is over."""
    if table == "localization":
        searched = [fewer_questions(edit) for edit in bench.searched]
        singles = [bench.run("search", variant, 0, searched) for variant in alone()]
        variants = localization(best_three(singles))
    else:
        every = controls() if table == "controls" else methods()
        variants = [variant for variant in every if not {variant.label, variant.method} & set(left_out)]
    whole = fastedit.read_edits(bench.data, split="eval", limit=None if table == "hops" else edits)
    records = chosen(whole, table)[:edits]
    for start in range(0, len(records), TOGETHER):
        chunk = records[start : start + TOGETHER]
        for variant in variants:
            if bench.over():
                return
            asked = [fewer_questions(edit, table) for edit in chunk]
            begin = time.monotonic()
            bench.run(table, variant, start, asked)
            print(f"{table} {bench.data} {start} {variant.label}: {time.monotonic() - begin:.0f} s", flush=True)


def main(
    table: Annotated[str, typer.Option(help=", ".join(TABLES))] = TABLES[0],
    data: Annotated[str, typer.Option(help=", ".join(SETS))] = SETS[0],
    edits: Annotated[int, typer.Option(help="of every variant", min=1)] = 20,
    dtype: Annotated[str, typer.Option(help="float32 where a machine multiplies it faster than bfloat16")] = DTYPE,
    seconds: Annotated[float, typer.Option(help="begin no row after so long", min=0)] = 1e9,
    out: Annotated[Path, typer.Option(help="folder of rows and trained parts")] = Path("runs/icons"),
    without: Annotated[str, typer.Option(help="methods to leave out, by commas")] = "",
    store: Annotated[bool, typer.Option("--record", help="keep the rows of --out, run nothing")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
) -> None:
    """Measure on smol-llava."""
    if table not in TABLES:
        raise typer.BadParameter(f"icons: table must be one of {', '.join(TABLES)} (got table={table!r})")
    if data not in SETS:
        raise typer.BadParameter(f"icons: data must be one of {', '.join(SETS)} (got data={data!r})")
    if store:
        rows = read(out / ROWS)
        STORED.write_bytes(record.packed("".join(json.dumps(row) + "\n" for row in rows), STORED))
    elif not only_report:
        out.mkdir(parents=True, exist_ok=True)
        measure(Bench(out, time.monotonic() + seconds, data, dtype), table, edits, without.split(","))
    print(report(read(STORED if store or only_report else out / ROWS)))


if __name__ == "__main__":
    typer.run(main)
