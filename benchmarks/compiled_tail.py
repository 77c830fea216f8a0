"""Whether ``torch.compile`` of the tail's blocks would make fits faster on a CPU: the engine with and without.

    python benchmarks/compiled_tail.py                     lora on the last two layers of random:qwen2vl-77m
    python benchmarks/compiled_tail.py --record

Attention, feed-forward blocks and the final norm are compiled as inductor takes them; what edits add at a map is left
as it is, since inductor fails on its row counts. Compiled blocks multiply by torch's own products: inductor refuses the
oneDNN op that the engine takes on some processors. Runs alternate, once everything is compiled and warm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import implementations, record
from benchmarks.cases import CASES, Case, made_up_edits
from benchmarks.outcome import Fitted
from fastedit.backbone import packed_forward
from fastedit.deltas import LowRankDelta

#: Implementation: (how frozen maps multiply, whether blocks are compiled).
MODES = {"engine": ("auto", False), "engine/torch": ("torch", False), "engine/torch/compiled": ("torch", True)}
BLOCKS = ("_attended", "_fed", "_finished")
#: Largest difference of a loss between two of them, relative.
TOLERANCE = 1e-4


@contextmanager
def blocks(compiled: dict[str, Any]) -> Iterator[None]:
    """The walk's blocks are the given ones inside."""
    before = {name: getattr(packed_forward, name) for name in BLOCKS}
    try:
        for name in BLOCKS:
            setattr(packed_forward, name, compiled.get(name, before[name]))
        yield
    finally:
        for name, block in before.items():
            setattr(packed_forward, name, block)


def measure(case: Case, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[Fitted]], float]:
    """Run every mode in turn.

    Returns:
        Seconds and results of the timed runs by mode, and the seconds that compiling took.
    Raises:
        RuntimeError: a mode fits something else.
    """
    torch._dynamo.config.recompile_limit = 64
    compiled = {name: torch.compile(getattr(packed_forward, name), dynamic=False) for name in BLOCKS}
    models = {linear: fastedit.load(case.model, dtype=case.dtype, linear=linear) for linear in ("auto", "torch")}
    edits = made_up_edits(case.edits, seed=case.seed, words=case.words)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    results: dict[str, list[Fitted]] = {mode: [] for mode in MODES}
    first: dict[str, float] = {}
    for repeat in range(repeats + 2):
        for mode, (linear, is_compiled) in MODES.items():
            implementations.forget(models[linear])
            began = time.perf_counter()
            with blocks(compiled if is_compiled else {}):
                fitted = implementations.engine(models[linear], edits, case)
            took = time.perf_counter() - began
            if repeat == 0:
                first[mode] = took
            if repeat >= 2:
                seconds[mode].append(took)
                results[mode].append(fitted)
    wanted = [outcome.loss for outcome in results["engine"][0].outcomes]
    for mode, (fitted, *_) in results.items():
        losses = [outcome.loss for outcome in fitted.outcomes]
        if any(abs(a - b) > TOLERANCE * max(1.0, abs(b)) for a, b in zip(losses, wanted, strict=True)):
            raise RuntimeError(f"compiled_tail: losses of {mode} must equal the engine's (got {losses}, {wanted})")
    slowest = "engine/torch/compiled"
    return seconds, results, first[slowest] - median(seconds[slowest])


def rows_of(
    case: Case, seconds: dict[str, list[float]], results: dict[str, list[Fitted]], compiling: float
) -> list[record.Row]:
    """Rates and the phases of a step, each beside the engine's own products without compiling."""
    shared = (case.config, *record.origin(case.seed))

    def row(mode: str, metric: str, values: list[float]) -> record.Row:
        unit = record.unit_of(metric)
        value, low, high = record.spread(values)
        return record.Row(f"compiled-tail({case.name})", mode, metric, unit, value, low, high, None, None, *shared)

    rows: list[record.Row] = []
    for mode in MODES:
        mine = [row(mode, "edits_per_s", [case.edits / each for each in seconds[mode]])]
        for phase in ("tail_forward", "backward"):
            mine.append(row(mode, f"phase_{phase}_s", [fitted.seconds[phase] for fitted in results[mode]]))
        rows += mine if mode == "engine" else [record.with_ratio(a, b) for a, b in zip(mine, rows[:3], strict=True)]
    return record.check([*rows, row("engine/torch/compiled", "phase_compile_s", [max(0.0, compiling)])])


def main(
    case: Annotated[str, typer.Option(help="a case of throughput.py whose method is lora")] = "lora-last2",
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 3,
    edits: Annotated[int, typer.Option(min=1, help="edits of a batch")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    keep: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
) -> None:
    """Fit the same edits with blocks as they are and compiled."""
    torch.set_num_threads(threads)
    LowRankDelta.delta = torch.compiler.disable(LowRankDelta.delta)  # type: ignore[method-assign]
    chosen = replace(CASES[case], edits=edits, batch_size=edits, steps=steps)
    rows = rows_of(chosen, *measure(chosen, repeats))
    table = Table("implementation", "metric", title=rows[0].case, title_justify="left")
    for name in ("value", "p20", "p80", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [f"{value:.3g}" for value in (row.value, row.p20, row.p80)]
        table.add_row(row.implementation, row.metric, *numbers, "" if row.ratio is None else f"{row.ratio:.2f}")
    Console().print(table)
    if keep:
        print(f"rows: {record.append(rows).name}")


if __name__ == "__main__":
    typer.run(main)
