"""How many edits per second: the engine beside a plain loop, on the same edits in the same run.

    python benchmarks/throughput.py                             the default case, about two minutes on two cores
    python benchmarks/throughput.py --quick                     a tiny model: does it all work
    python benchmarks/throughput.py --case lora-last2 --record  a named case, appended to benchmarks/results/
    python benchmarks/throughput.py --sweep batch_size=1,4,16   one case per value
    python benchmarks/throughput.py compare --base COMMIT       stored ratios of two commits

Nothing is timed before all implementations were seen to do the same; when they do not, it exits with 2 and the reason.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import cases, record
from benchmarks.cases import CASES, GATE_MODELS, Case

app = typer.Typer(add_completion=False, help="Edits per second: the engine beside a plain loop.", rich_markup_mode=None)
console = Console()

DISAGREE, WRONG, SLOWER = 2, 1, 3
#: A ratio that falls by more than this is a regression.
ALLOWED_LOSS = 0.1


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    case: Annotated[str, typer.Option(help=f"what to start from: {', '.join(CASES)}")] = "default",
    model: Annotated[str | None, typer.Option(help="pocket-llava, random:qwen2vl-77m, a folder ...")] = None,
    method: Annotated[str | None, typer.Option(help="ft, lora; others run without a baseline")] = None,
    edits: Annotated[int | None, typer.Option(help="how many", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="edits that the engine fits together", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps", min=1)] = None,
    layers: Annotated[int | None, typer.Option(help="the last so many layers are edited", min=1)] = None,
    stop_loss: Annotated[float | None, typer.Option(help="stop an edit below this loss")] = None,
    words: Annotated[int | None, typer.Option(help="words of a made-up question", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(cases.DTYPES))] = None,
    quantize: Annotated[str | None, typer.Option(help="none, nf4, int8")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if absent", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="of made-up edits")] = None,
    repeats: Annotated[int | None, typer.Option(help="timed runs of each", min=1)] = None,
    baselines: Annotated[str | None, typer.Option(help="plain_loop,peft or none; ratios refer to the first")] = None,
    evaluate: Annotated[bool | None, typer.Option("--evaluate/--no-evaluate", help="score the edits too")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory")] = True,
    sweep: Annotated[str | None, typer.Option(help="field=value,value: one case per value")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the quick case: a tiny model, one thread")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="top operators and a Chrome trace as well")] = False,
    profile_dir: Annotated[Path, typer.Option(help="where traces go")] = Path("runs/benchmarks"),
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    store: Annotated[
        bool, typer.Option("--record", help="append the rows to benchmarks/results/<device>.jsonl")
    ] = False,
) -> None:
    """Compare the engine with its baselines on one case, or on a sweep of it."""
    if context.invoked_subcommand is not None:
        return
    if threads is not None or quick:
        import torch

        # A tiny model gains nothing from threads, and on a busy machine they wait for each other.
        torch.set_num_threads(threads or 1)
    changes = {
        "model": model,
        "method": method,
        "edits": edits,
        "batch_size": batch_size,
        "steps": steps,
        "layers": layers,
        "stop_loss": stop_loss,
        "words": words,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "seed": seed,
        "repeats": repeats,
        "evaluate": evaluate,
    }
    try:
        chosen = make_case("quick" if quick else case, {k: v for k, v in changes.items() if v is not None}, baselines)
        listed = [chosen]
        if sweep is not None:
            field, _, values = sweep.partition("=")
            listed = cases.sweep(chosen, field, values.split(","))
        rows = _run_all(listed, with_memory=memory)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(WRONG) from error
    if json_path is not None:
        console.print(f"rows: {record.write_json(rows, json_path)}")
    if store:
        console.print(f"rows appended to {record.append(rows)}")
    if profile:
        _profile(listed[0], profile_dir)


def make_case(name: str, changes: dict[str, Any], baselines: str | None) -> Case:
    """A named case with fields changed.

    Raises:
        ValueError: no such case, method or value; a baseline that cannot run it.
    """
    if name not in CASES:
        raise ValueError(f"throughput: case is one of {', '.join(CASES)} (got case={name!r})")
    made = replace(CASES[name], **changes)
    if changes:
        # The name says what was changed, so that rows of different work never share one.
        made = replace(made, name=f"{name}({','.join(f'{key}={value}' for key, value in changes.items())})")
    if "model" in changes:
        made = replace(made, gate_model=GATE_MODELS.get(made.model, ""), data="")
        if made.model.startswith("pocket-"):
            made = replace(made, data="pocket-vqa")
    if baselines is not None:
        wanted = tuple(part for part in baselines.split(",") if part and part != "none")
        made = replace(made, baselines=wanted)
    elif "+" in made.method:
        made = replace(made, baselines=())
    elif made.method != "lora":
        made = replace(made, baselines=tuple(b for b in made.baselines if b != "peft"))
    known = ("plain_loop", "peft", "plain_onednn")
    for baseline in made.baselines:
        if baseline not in known:
            raise ValueError(f"throughput: baselines are {', '.join(known)} (got {baseline!r})")
        if "+" in made.method or (baseline == "peft" and made.method != "lora"):
            raise ValueError(f"throughput: {baseline} cannot fit this method (got method={made.method!r})")
    made.plan()
    return made


def _run_all(listed: list[Case], *, with_memory: bool) -> list[record.Row]:
    from benchmarks.gate import GateError
    from benchmarks.harness import run_case
    from benchmarks.tables import show

    rows: list[record.Row] = []
    for case in listed:
        with console.status(case.name) as status:
            try:
                found = run_case(case, with_memory=with_memory, say=status.update)
            except GateError as error:
                console.print(f"[red]not timed: {error}[/red]", highlight=False)
                raise typer.Exit(DISAGREE) from error
        show(found, console)
        rows += found.rows
    return rows


def _profile(case: Case, folder: Path) -> None:
    from benchmarks.profiling import profile_case

    for name, (table, trace) in profile_case(case, folder).items():
        console.print(f"[bold]{name}[/bold], operators by time of their own; trace: {trace}")
        # Wider than most terminals: not wrapped
        print(table)


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="commit (or its beginning) that others are compared with")],
    results: Annotated[Path | None, typer.Option(help="stored rows; those of this device if absent")] = None,
    allowed: Annotated[float, typer.Option(help="largest loss of a ratio that is no regression")] = ALLOWED_LOSS,
) -> None:
    """Compare stored ratios with those of an earlier commit; exit with 3 when one fell by more than is allowed.

    Ratios to a baseline of the same run are compared, not seconds: machines have good and bad days.
    """
    from benchmarks.tables import show_changes

    if results is None:
        from fastedit.engine import provenance

        results = record.RESULTS / f"{record.device_name(provenance.machine())}.jsonl"
    if not results.exists():
        console.print(f"[red]compare: no stored rows (got results={results.name})[/red]")
        raise typer.Exit(WRONG)
    pairs = changed_ratios(record.read(results), base)
    if not pairs:
        console.print(f"compare: no case was stored both at {base} and later")
        raise typer.Exit(WRONG)
    show_changes(pairs, console)
    if any(after.ratio < before.ratio * (1 - allowed) for before, after in pairs if before.ratio and after.ratio):
        raise typer.Exit(SLOWER)


def changed_ratios(rows: list[record.Row], base: str) -> list[tuple[record.Row, record.Row]]:
    """(row of the base commit, latest other row) of every case and implementation with a speed ratio."""
    before: dict[tuple[str, str], record.Row] = {}
    after: dict[tuple[str, str], record.Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        if row.metric != "edits_per_s" or row.ratio is None:
            continue
        table = before if row.commit.startswith(base) else after
        table[row.case, row.implementation] = row
    return [(before[key], after[key]) for key in before if key in after]


if __name__ == "__main__":
    app()
