"""How fast the ops are: each beside its baselines, in turns, on the same inputs in the same run.

    python benchmarks/kernels.py                        every op, about ten minutes on two cores
    python benchmarks/kernels.py key_value low_rank     two of them
    python benchmarks/kernels.py --record               rows appended to benchmarks/results/

Nothing is timed before its check has passed; where one fails, it exits with 2 and the reason.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record
from benchmarks.memory import _reset_peak, _status_mib
from benchmarks.record import Row
from fastedit import ops
from fastedit.engine import provenance

ROOT = Path(__file__).resolve().parents[1]
OURS = "fastedit"
DISAGREE = 2
console = Console()


def stems() -> list[str]:
    """Return the ops that have cases."""
    folder = Path(__file__).resolve().parent / "kernel_cases"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def cases_of(stem: str) -> list[dict[str, Any]]:
    """Return the cases of an op.

    Raises:
        ValueError: no op of that name has any.
    """
    if stem not in stems():
        raise ValueError(f"kernels: ops with cases are {', '.join(stems())} (got {stem})")
    found: list[dict[str, Any]] = importlib.import_module(f"benchmarks.kernel_cases.{stem}").CASES
    return found


def time_case(case: dict[str, Any], seconds: float, least: int) -> dict[str, list[float]]:
    """Return the seconds of every call, by implementation, taken in turns until each had its share of ``seconds``.

    Slow baselines take part in every round until their share is used up, but ``least`` times at least.
    """
    runs = {OURS: case["run"], **case["baselines"]}
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    share = seconds / len(runs)
    while True:
        left = [name for name, spent in taken.items() if len(spent) < least or sum(spent) < share]
        if not left:
            return taken
        # the op takes part in every round: a baseline is compared with calls made around its own
        for name in dict.fromkeys([OURS, *left]):
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)


def extra_memory(stem: str, name: str, implementation: str) -> float:
    """Return the MiB that one call takes on top of its inputs, from a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), stem, "--memory-of", f"{name}/{implementation}"]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _release() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return


def _measure_memory(stem: str, name: str, implementation: str) -> float:
    case = next(case for case in cases_of(stem) if case["name"] == name)
    run = {OURS: case["run"], **case["baselines"]}[implementation]
    # inputs and what the libraries keep are made by the first call; freed memory goes back before the second
    run()
    _release()
    before = _status_mib("VmRSS")
    _reset_peak()
    run()
    return max(0.0, _status_mib("VmHWM") - before)


def rows_of(case: dict[str, Any], stem: str, taken: dict[str, list[float]], extra: dict[str, float]) -> list[Row]:
    """Return the rows of one case; ratios of times refer to each baseline's own row, the op's to none."""
    served = ops.implementations()
    key = stem if stem in served else f"{stem}_"
    config = {"shapes": case["shapes"], "dtype": case["dtype"], "served_by": served[key]["cpu"]}
    shared = (
        config,
        provenance.machine(),
        provenance.versions(),
        record.commit_with_changes(provenance.commit()),
        0,
        provenance.utc_now(),
    )

    def row(implementation: str, metric: str, values: list[float]) -> Row:
        value, low, high = record.spread(values)
        unit = record.METRICS[metric]
        return Row(case["name"], implementation, metric, unit, value, low, high, None, None, *shared)

    own = row(OURS, "run_s", taken[OURS])
    rows = [own]
    rows += [record.with_ratio(row(name, "run_s", times), own) for name, times in taken.items() if name != OURS]
    rows += [row(name, "working_memory_mib", [mib]) for name, mib in extra.items()]
    return record.check(rows)


def show(rows: list[Row]) -> None:
    """Print one case: times, how many times the op's they are, and extra memory."""
    table = Table("implementation", "p20 ms", "p50 ms", "p80 ms", "times the op's", "extra MiB", title=rows[0].case)
    extra = {row.implementation: f"{row.value:.1f}" for row in rows if row.metric == "working_memory_mib"}
    for row in rows:
        if row.metric == "run_s":
            times = [f"{1e3 * seconds:.2f}" for seconds in (row.p20, row.value, row.p80)]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            table.add_row(row.implementation, *times, ratio, extra.get(row.implementation, ""))
    console.print(table)


def main(
    wanted: Annotated[list[str] | None, typer.Argument(help="ops; all that have cases if absent")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if absent", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="time for one case")] = 10.0,
    least: Annotated[int, typer.Option(help="calls of each at least", min=1)] = 5,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure extra memory")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time ops beside their baselines."""
    if threads is not None:
        torch.set_num_threads(threads)
    if memory_of is not None and wanted:
        name, implementation = memory_of.split("/")
        print(json.dumps(_measure_memory(wanted[0], name, implementation)))
        return
    rows: list[Row] = []
    for stem in wanted or stems():
        for case in cases_of(stem):
            try:
                case["check"]()
            except AssertionError as error:
                console.print(f"{case['name']}: not timed, the result is wrong: {error}", markup=False)
                raise typer.Exit(DISAGREE) from error
            taken = time_case(case, seconds, least)
            names = taken if with_memory else ()
            found = rows_of(case, stem, taken, {name: extra_memory(stem, case["name"], name) for name in names})
            show(found)
            rows += found
    if json_path is not None:
        record.write_json(rows, json_path)
    if store:
        console.print(f"rows appended to {record.append(rows).name}")


if __name__ == "__main__":
    typer.run(main)
