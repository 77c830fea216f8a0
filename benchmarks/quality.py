"""Every method, and ODEdit on each, on the embedded models: scores, paired differences, seconds, memory.

    python benchmarks/quality.py --edits 100                       a first look, some minutes
    python benchmarks/quality.py --only single/pocket-llava        cases whose name contains this
    python benchmarks/quality.py --edits 1000 --jobs 2 --record    all of it: hours; goes on where it was broken off
    python benchmarks/quality.py --report                          tables and pictures of what is there

Cases run apart from this process, some at a time, and each leaves one JSON file; what is there is not run again. Both
protocols are scored, means come with 95 % bootstrap intervals, and x is compared with odedit+x on the same edits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import long_sequence, record, tv_search
from benchmarks.quality_cases import (
    DATA,
    METHODS,
    MODELS,
    UNFITTED,
    Case,
    ablations,
    cross_task,
    on_icons,
    sequential,
    single,
)
from benchmarks.quality_maps import knowledge, layer_map
from benchmarks.quality_outcomes import load_outcomes, stored_beside
from benchmarks.quality_run import World, peak_memory_mib, run_case
from benchmarks.quality_summary import summary
from benchmarks.quality_tables import markdown, rows_of
from fastedit.published.case import case_of
from fastedit.published.rows import STORED, packed

ROOT = Path(__file__).resolve().parents[1]
#: Edits of the map of layers.
MAPPED = 200
TABLES = ("single", "sequential", "cross-task", "ablation", "icons")


#: What stands above the tables of the search for a penalty.
SEARCHED = """`benchmarks/tv_search.py`, edits of each train split, paired; bold: above zero. Unless a setting says
otherwise, the penalty acts from the first step and does not back off, MMD² has the weight 1 of equation (9) and
factors do not decay; `guarded` is the default's warm-up and backing off; `no TV` is MMD alone. The control of a setting
with decay has the same; that of `kl` with decay or another weight is `kl`. Means and differences are over a setting's
pairs. [Methods](methods.md) says what follows."""


def cases_of(tables: Sequence[str], edits: int, ablated: int) -> list[Case]:
    """The cases of some tables.

    Raises:
        ValueError: a table that does not exist.
    """
    unknown = [table for table in tables if table not in TABLES]
    if unknown:
        raise ValueError(f"quality: tables are {', '.join(TABLES)} (got {', '.join(unknown)})")
    in_sequence = [m for base in METHODS if base not in UNFITTED for m in (base, f"odedit+{base}")]
    found: list[Case] = []
    for table in tables:
        if table == "single":
            found += single(edits)
        elif table == "icons":
            found += on_icons(edits)
        elif table == "sequential":
            found += sequential(edits, in_sequence)
        elif table == "cross-task":
            found += cross_task(ablated, in_sequence)
        else:
            found += ablations(ablated)
    return found


def file_of(case: Case, out: Path) -> Path:
    """Where the outcome of a case is kept."""
    return out / "cases" / f"{record_name(case.name)}-{case.edits}.json"


def record_name(name: str) -> str:
    """A case's name as a file name."""
    return name.replace("/", "--").replace(" ", "_").replace(",", "")


def run_all(cases: Sequence[Case], out: Path, *, jobs: int, threads: int, console: Console) -> list[str]:
    """Run what is not there yet, some at a time; the names of those that failed."""
    waiting = [case for case in cases if not file_of(case, out).exists()]
    console.print(f"{len(cases)} cases, {len(cases) - len(waiting)} of them are there")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    failed: list[str] = []

    def some(group: Sequence[Case]) -> None:
        texts = json.dumps([asdict(case) for case in group])
        command = [sys.executable, str(Path(__file__).resolve()), "--these", texts, "--out", str(out)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                console.print(line.rstrip(), markup=False, highlight=False)
            errors = running.stderr.read() if running.stderr is not None else ""
        missing = [case.name for case in group if not file_of(case, out).exists()]
        if missing:
            failed.extend(missing)
            told = f"failed: {', '.join(missing)}\n{errors[-3000:]}"
            console.print(told, style="red", markup=False, highlight=False)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(some, groups_of(waiting, jobs)))
    return failed


def groups_of(cases: Sequence[Case], jobs: int) -> list[list[Case]]:
    """Cases of one model and set, a few at a time: they share what is rendered, and what the unedited model answers."""
    found: dict[tuple[str, str, int], list[Case]] = {}
    for case in cases:
        found.setdefault((case.model, case.data, case.edits), []).append(case)
    size = max(2, min(8, -(-len(cases) // jobs)))
    return [group[start : start + size] for group in found.values() for start in range(0, len(group), size)]


def weigh_all(cases: Sequence[Case], out: Path, *, jobs: int, threads: int, console: Console) -> None:
    """Put the peak memory of each case into its outcome, from a process of its own; what is there is not run again."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def one(case: Case) -> None:
        path = file_of(case, out)
        outcome = json.loads(path.read_text(encoding="utf-8"))
        if outcome["timing"]["peak_memory_mib"] is not None:
            return
        told = json.dumps(asdict(case))
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--weigh", told]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            console.print(f"not weighed: {case.name}\n{ended.stderr[-2000:]}", style="red", markup=False)
            return
        outcome["timing"]["peak_memory_mib"] = float(ended.stdout.split()[-1])
        write_outcome(outcome, path)
        console.print(f"{case.name}: {outcome['timing']['peak_memory_mib']:.0f} MiB", markup=False, highlight=False)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [case for case in cases if file_of(case, out).exists()]))


def write_outcome(outcome: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(path)


def run_these(text: str, out: Path) -> None:
    """Run cases that are given as JSON; the file of each is there whole or not at all."""
    world = World()
    for data in json.loads(text):
        case = case_of(data)
        path = file_of(case, out)
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        try:
            outcome = run_case(case, world, out / "artifacts")
        except Exception:
            # The others may run all the same; whoever started this sees what is missing
            traceback.print_exc()
            continue
        write_outcome(outcome, path)
        print(f"{case.name}: {time.perf_counter() - begin:.0f} s", flush=True)


def report(out: Path, console: Console, *, document: Path | None, store: bool, pictures: Path) -> None:
    """Tables, pictures and rows of every outcome that is there."""
    from benchmarks.quality_figures import draw

    outcomes = load_outcomes(out / "cases")
    if not outcomes:
        console.print(f"no outcomes below {out}", markup=False)
        return
    rows = rows_of(outcomes)
    outcomes += stored_beside(outcomes, newest_rows(record.RESULTS / "quality"))
    singles = sorted({(o["case"]["model"], o["case"]["data"]) for o in outcomes if o["case"]["table"] == "single"})
    maps = [layer_map(model, data, MAPPED, out / "maps" / f"{model}-{data}.json") for model, data in singles]
    # One picture of spaces is enough: that of the first model and set
    encoders = out / "artifacts" / f"{MODELS[0]}-{DATA[0]}-unike.safetensors"
    views = {f"{DATA[0]} on {MODELS[0]}": knowledge(encoders)} if encoders.exists() else {}
    drawn = draw(outcomes, pictures, maps, views)
    curves = long_sequence.rows(long_sequence.RESULTS)
    if curves:
        drawn["edits in sequence"] = long_sequence.draw_curves(curves, pictures / "edits-in-sequence.png")
    target = document or out / "results.md"
    shown = {name: os.path.relpath(path, target.parent) for name, path in drawn.items()}
    text = markdown(outcomes, shown, summary(outcomes, shown), stored_sections())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    console.print(f"tables: {target}\npictures: {', '.join(str(path) for path in drawn.values())}", markup=False)
    path = out / "rows.jsonl"
    if store:
        path = record.RESULTS / "quality" / record.stored(record.machine()).name
    console.print(f"rows: {write_rows(rows, path)}", markup=False)
    if store:
        console.print(f"shipped: {ship(path.parent)}", markup=False)


def stored_sections() -> list[str]:
    """What other scripts measured, from the rows that they stored."""
    cells, curves = tv_search.stored_cells(), long_sequence.rows(long_sequence.RESULTS)
    lines: list[str] = []
    if cells:
        lines += ["## Does the total variation earn its place over kl+x with the same data?", "", SEARCHED]
        lines += [*of_other_weights(cells), ""]
    for edits, base in sorted({(cell["edits"], cell["base"]) for cell in cells}, reverse=True):
        some = [cell for cell in cells if (cell["base"], cell["edits"]) == (base, edits)]
        lines += [f"### {base}, {edits} edits of each train split", "", *tv_search.table(some), ""]
    if curves:
        lines += ["## Thousands of edits in one sequence that do not contradict each other", ""]
        lines += ["`benchmarks/long_sequence.py`, pocket-vqa, scored on a sample at each length.", ""]
        lines += [*long_sequence.markdown(curves), ""]
    return lines


def of_other_weights(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on the models of the search whose cells are of other weights than those that ship; none without."""
    seen = sorted({(cell["pair"].partition("/")[0], cell["model_fingerprint"]) for cell in cells})
    shipped = {name: fastedit.load(name).fingerprint for name, _ in seen}
    other = sorted({f"`{name}`" for name, fingerprint in seen if fingerprint != shipped[name]})
    if not other:
        return []
    return [f"Cells of {', '.join(other)} are of the weights that shipped before, by which defaults were chosen."]


def newest_rows(folder: Path) -> list[dict[str, Any]]:
    """Of every case the newest stored row, on the weights that are newest.

    Args:
        folder: of stored rows, one file a machine.
    """
    lines = [line for path in sorted(folder.iterdir()) for line in record.unpacked(path).splitlines()]
    # The first rows did not say what weights they were measured on
    rows = [row for row in map(json.loads, lines) if "weights" in row]
    rows.sort(key=lambda row: row["provenance"]["time"])
    weights = {row["case"]["model"]: row["weights"] for row in rows}
    newest = {row["case"]["name"]: row for row in rows if row["weights"] == weights[row["case"]["model"]]}
    return [newest[name] for name in sorted(newest)]


def ship(folder: Path, target: Path = STORED) -> Path:
    """Write the rows that ``fastedit reproduce`` runs anew: those of ``newest_rows``, to a file of the package."""
    target.write_bytes(packed(newest_rows(folder)))
    return target


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write one line a case, compressed where the name ends so.

    A case that stands in the file already is replaced, where it was measured on the same weights.
    """
    known: dict[tuple[str, str | None], dict[str, Any]] = {}
    before = record.unpacked(path).splitlines() if path.exists() else []
    for row in (*map(json.loads, before), *rows):
        known[row["case"]["name"], row.get("weights")] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(record.packed("".join(json.dumps(row) + "\n" for row in known.values()), path))
    partial.replace(path)
    return path


def main(
    edits: Annotated[int, typer.Option(help="of every case of the tables single and sequential", min=1)] = 1000,
    ablated: Annotated[int, typer.Option(help="edits of every ablation and cross-task sequence", min=1)] = 200,
    tables: Annotated[str, typer.Option(help=", ".join(TABLES))] = ",".join(TABLES[:-1]),
    only: Annotated[str, typer.Option(help="cases whose name contains this; several by commas")] = "",
    out: Annotated[Path, typer.Option(help="folder for outcomes, trained parts and tables")] = Path("runs/quality"),
    jobs: Annotated[int, typer.Option(help="cases at a time", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of a case", min=1)] = 1,
    only_report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
    document: Annotated[Path | None, typer.Option(help="write the tables here, pictures beside")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
    weighed: Annotated[bool, typer.Option("--memory/--no-memory", help="peak memory, a process a single case")] = True,
    these: Annotated[str, typer.Option(hidden=True)] = "",
    weigh: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Score methods on the embedded models."""
    if these:
        run_these(these, out)
        return
    if weigh:
        print(peak_memory_mib(case_of(json.loads(weigh)), out / "artifacts"))
        return
    console = Console()
    failed: list[str] = []
    if not only_report:
        try:
            cases = cases_of([table for table in tables.split(",") if table], edits, ablated)
        except ValueError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error
        wanted = [part for part in only.split(",") if part]
        cases = [case for case in cases if not wanted or any(part in case.name for part in wanted)]
        failed = run_all(cases, out, jobs=jobs, threads=threads, console=console)
        if weighed:
            alone = [case for case in cases if case.table == "single"]
            weigh_all(alone, out, jobs=jobs, threads=threads, console=console)
    pictures = out / "pictures" if document is None else document.parent / "pictures"
    report(out, console, document=document, store=store, pictures=pictures)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
