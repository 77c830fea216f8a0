"""How fast the ops are: each beside its baselines, in turns, on the same inputs in the same run.

    python benchmarks/kernels.py                        every op, about ten minutes on two cores
    python benchmarks/kernels.py key_value low_rank     two of them
    python benchmarks/kernels.py --device cuda          the cases for a GPU; benchmarks/gpu.sh runs these and more
    python benchmarks/kernels.py --scale 0.01           the cases for a GPU in small, on the CPU: do they work
    python benchmarks/kernels.py --record               rows appended to benchmarks/results/

Nothing is timed before its check has passed. A case whose check fails is named and left out, the others follow; the
exit status is then 2, and 1 where a case or a baseline could not run.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record, serving
from benchmarks.kernel_timing import OURS, Clock, Contexts, extra_on_device, runs_of, time_case
from benchmarks.memory import _reset_peak, _status_mib
from benchmarks.record import Row
from fastedit import ops
from fastedit.engine.profiling.flops import Peak
from fastedit.engine.profiling.utilisation import measure_peak

ROOT = Path(__file__).resolve().parents[1]
WRONG, DISAGREE = 1, 2
DEVICES = ("cpu", "cuda")
console = Console()


def stems() -> list[str]:
    """Return the ops that have cases."""
    folder = Path(__file__).resolve().parent / "kernel_cases"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def cases_of(stem: str, device: str = "cpu", scale: float | None = None) -> Iterator[dict[str, Any]]:
    """Make the cases of an op one by one: those of the CPU, or with a scale or for ``cuda`` those of a GPU.

    Raises:
        ValueError: no op of that name has any.
    """
    if stem not in stems():
        raise ValueError(f"kernels: ops with cases are {', '.join(stems())} (got {stem})")
    module = importlib.import_module(f"benchmarks.kernel_cases.{stem}")
    if device == "cpu" and scale is None:
        return iter(module.CASES)
    # rows of sizes that mean nothing never share a name with those of real ones
    suffix = "" if scale in (None, 1.0) else f"@{scale:g}"
    made = (make(device, scale or 1.0) for make in module.CUDA_CASES)
    return ({**case, "name": case["name"] + suffix} for case in made)


def extra_memory(stem: str, name: str, implementation: str) -> float:
    """Return the MiB that one call takes on top of its inputs, from a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), stem, "--memory-of", f"{name}/{implementation}"]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _release() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    ops.release_workspaces()
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


def memory_of(
    stem: str, case: Mapping[str, Any], names: Sequence[str], contexts: Contexts, device: str
) -> dict[str, float]:
    """Return the extra MiB of every implementation; on a CPU each in a process of its own."""
    if device == "cpu":
        return {name: extra_memory(stem, case["name"], name) for name in names}
    found = {}
    for name in names:
        with contexts.get(name, nullcontext)():
            found[name] = extra_on_device(runs_of(case, contexts)[name])
    return found


def fractions(case: Mapping[str, Any], peak: Peak, seconds: float) -> dict[str, float]:
    """Return the shares of the machine's copy bandwidth and matrix rate that the unavoidable work makes in this time.

    The larger of the two is near 1 where nothing faster can be hoped for.
    """
    found = {}
    if "bytes" in case:
        found["copy_fraction"] = case["bytes"] / seconds / (peak.copy_gib_per_s * 2**30)
    if "flops" in case:
        found["matmul_fraction"] = case["flops"] / seconds / (peak.matmul_gflop_per_s * 1e9)
    return found


def rows_of(
    case: Mapping[str, Any],
    stem: str,
    taken: Mapping[str, list[float]],
    extra: Mapping[str, float],
    device: str = "cpu",
    peak: Peak | None = None,
) -> list[Row]:
    """Return the rows of one case; ratios of times refer to each baseline's own row, the op's to none."""
    config = {
        "shapes": case["shapes"],
        "dtype": case["dtype"],
        "device": device,
        "served_by": serving.server(stem, device),
    }
    shared = (config, *record.origin(0, device))

    def row(implementation: str, metric: str, values: Sequence[float]) -> Row:
        value, low, high = record.spread(values)
        unit = record.METRICS[metric]
        return Row(case["name"], implementation, metric, unit, value, low, high, None, None, *shared)

    own = row(OURS, "run_s", taken[OURS])
    rows = [own]
    rows += [record.with_ratio(row(name, "run_s", times), own) for name, times in taken.items() if name != OURS]
    rows += [row(name, "working_memory_mib", [mib]) for name, mib in extra.items()]
    if peak is not None:
        rows.append(row("machine", "matmul_peak_gflop_per_s", [peak.matmul_gflop_per_s]))
        rows.append(row("machine", "copy_bandwidth_gib_per_s", [peak.copy_gib_per_s]))
        for name, times in taken.items():
            each = [fractions(case, peak, seconds) for seconds in times]
            rows += [row(name, metric, [found[metric] for found in each]) for metric in each[0]]
    return record.check(rows)


def show(rows: Sequence[Row]) -> None:
    """Print one case: times, how many times the op's they are, extra memory, and how near to the floor they come."""
    heads = ["implementation", "p20 ms", "p50 ms", "p80 ms", "times the op's", "extra MiB"]
    floors = {row.implementation: floor_text(rows, row.implementation) for row in rows}
    table = Table(*heads, *(["of the floor"] if any(floors.values()) else []), title=rows[0].case)
    extra = {row.implementation: f"{row.value:.1f}" for row in rows if row.metric == "working_memory_mib"}
    for row in rows:
        if row.metric == "run_s":
            times = [f"{1e3 * seconds:.2f}" for seconds in (row.p20, row.value, row.p80)]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            last = [floors[row.implementation]] if any(floors.values()) else []
            table.add_row(row.implementation, *times, ratio, extra.get(row.implementation, ""), *last)
    console.print(table)


def floor_text(rows: Sequence[Row], implementation: str) -> str:
    """Return the larger fraction of an implementation, "61% copy"; "" where none was measured."""
    found = {
        row.metric.removesuffix("_fraction"): row.value
        for row in rows
        if row.implementation == implementation and row.metric.endswith("_fraction")
    }
    name = max(found, key=lambda each: found[each], default="")
    return f"{found[name]:.0%} {name}" if name else ""


def measure(
    stem: str, case: Mapping[str, Any], device: str, clock: Clock, peak: Peak | None, settings: tuple[float, int, bool]
) -> list[Row]:
    """Check a case, served by whoever can, time it, and return its rows.

    Args:
        settings: seconds, calls at least, whether to measure memory.
    Raises:
        AssertionError: a result is wrong; nothing was timed. RuntimeError: it could not run.
    """
    seconds, least, with_memory = settings
    contexts = {name: partial(serving.served_by_triton, stem, device) for name in serving.others(stem, device)}
    for name in (OURS, *contexts):
        with contexts.get(name, nullcontext)():
            try:
                case["check"]()
            except AssertionError as error:
                raise AssertionError(f"{name if name != OURS else serving.server(stem, device)}: {error}") from error
    say = partial(console.print, markup=False, highlight=False)
    taken = time_case(case, seconds, least, clock, contexts, say)
    extra = memory_of(stem, case, list(taken), contexts, device) if with_memory else {}
    return rows_of(case, stem, taken, extra, device, peak)


def measure_all(
    wanted: Sequence[str], device: str, scale: float | None, settings: tuple[float, int, bool], store: bool = False
) -> tuple[list[Row], int]:
    """Measure the cases of these ops; return their rows and the exit status. Rows are stored case by case."""
    clock = Clock(device)
    small = 1.0 if scale is None else scale
    peak_of = cache(lambda dtype: measure_peak(dtype, device, seconds=0.5 * small, scale=small))
    rows: list[Row] = []
    status = 0
    for stem in wanted:
        for case in cases_of(stem, device, scale):
            # the case before is gone: so are its inputs, which on a GPU may be most of the memory
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            # fractions of the cases for a GPU only: the CPU's caches hold some of the others
            peak = None if device == "cpu" and scale is None else peak_of(case["dtype"])
            try:
                found = measure(stem, case, device, clock, peak, settings)
            except (AssertionError, RuntimeError) as error:
                wrong = isinstance(error, AssertionError)
                told = "not timed, the result is wrong" if wrong else "could not run"
                console.print(f"{case['name']}: {told}: {error}", markup=False, highlight=False)
                status = max(status, DISAGREE if wrong else WRONG)
                continue
            show(found)
            rows += found
            if store:
                console.print(f"rows appended to {record.append(found).name}")
            if not set(case["baselines"]) <= {row.implementation for row in found}:
                status = max(status, WRONG)
    return rows, status


def main(
    wanted: Annotated[list[str] | None, typer.Argument(help="ops; all that have cases if absent")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; each has cases of its own")] = "cpu",
    scale: Annotated[
        float | None,
        typer.Option(help="the GPU's cases, sizes times this; also on a CPU", min=1e-6, max=1.0),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if absent", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="time for one case")] = 10.0,
    least: Annotated[int, typer.Option(help="calls of each at least", min=1)] = 5,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure extra memory")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
    memory_of_: Annotated[str | None, typer.Option("--memory-of", hidden=True)] = None,
) -> None:
    """Time ops beside their baselines."""
    if threads is not None:
        torch.set_num_threads(threads)
    if memory_of_ is not None and wanted:
        name, implementation = memory_of_.split("/")
        print(json.dumps(_measure_memory(wanted[0], name, implementation)))
        return
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        there = f"{torch.cuda.device_count()} CUDA devices"
        console.print(f"kernels: device is cpu, or cuda where there is one (got device={device}, {there})")
        raise typer.Exit(WRONG)
    # what a process of its own would make anew are the cases of the CPU
    with_memory = with_memory and (device == "cuda" or scale is None)
    rows, status = measure_all(wanted or stems(), device, scale, (seconds, least, with_memory), store)
    if json_path is not None:
        record.write_json(rows, json_path)
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
