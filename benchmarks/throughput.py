"""How many edits per second: the engine beside a plain loop, on the same edits in the same run.

    python benchmarks/throughput.py                             the default case, about two minutes on two cores
    python benchmarks/throughput.py --quick                     a tiny model: does it all work
    python benchmarks/throughput.py --case lora-last2 --record  a named case, appended to benchmarks/results/
    python benchmarks/throughput.py --sweep batch_size=1,4,16   one case per value; several sweeps in one run
    python benchmarks/throughput.py --html page.html            the rows of this run as a page with figures
    python benchmarks/throughput.py compare --base COMMIT       stored ratios of two commits

Nothing is timed before all implementations were seen to do the same; when they do not, it exits with 2 and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import cases, record
from benchmarks.cases import CASES, GATE_MODELS, PLAIN_BASELINES, Case
from benchmarks.variants import as_run, is_variant

app = typer.Typer(add_completion=False, help="Edits per second: the engine beside a plain loop.", rich_markup_mode=None)
console = Console()

DISAGREE, WRONG, SLOWER = 2, 1, 3
#: What the engine must equal before it is timed, also where it is timed alone.
GATE_BASELINE = "plain_loop"
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
    baselines: Annotated[
        str | None, typer.Option(help="plain_loop,peft,engine/batch=1 ... or none; ratios refer to the first")
    ] = None,
    evaluate: Annotated[bool | None, typer.Option("--evaluate/--no-evaluate", help="score the edits too")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory")] = True,
    sweep: Annotated[
        list[str] | None, typer.Option(help="field=value,value: one case per value; may be given several times")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the quick case: a tiny model, one thread")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="top operators and a Chrome trace as well")] = False,
    profile_dir: Annotated[Path, typer.Option(help="where traces go")] = Path("runs/benchmarks"),
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    html: Annotated[Path | None, typer.Option(help="write the rows of this run as one page with figures")] = None,
    runs: Annotated[
        Path | None, typer.Option(help="with --html: saved runs, of fastedit compare, whose quality is on the page too")
    ] = None,
    data: Annotated[str | None, typer.Option(help="with --runs: the records that were edited, for pictures")] = None,
    store: Annotated[
        bool, typer.Option("--record", help="append the rows to benchmarks/results/<device>.jsonl.gz")
    ] = False,
) -> None:
    """Compare the engine with its baselines on one case, or on a sweep of it."""
    if context.invoked_subcommand is not None:
        return
    if runs is not None and html is None:
        raise typer.BadParameter("is for the page, so --html is given too (got no --html)", param_hint="--runs")
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
        listed = _swept(chosen, sweep) if sweep else [chosen]
        rows = _run_all(listed, with_memory=memory)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(WRONG) from error
    if json_path is not None:
        console.print(f"rows: {record.write_json(rows, json_path)}")
    if html is not None:
        from benchmarks.plot import figures_of
        from benchmarks.report import write_joined_page, write_page

        figures = figures_of(rows)
        if runs is None:
            page = write_page(rows, figures, html)
        else:
            page = write_joined_page(rows, figures, runs, html, fastedit.read_edits(data) if data else ())
        console.print(f"page: {page}", soft_wrap=True)
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
    else:
        made = cases.fitting(made)
    for baseline in made.baselines:
        if baseline not in PLAIN_BASELINES and not is_variant(baseline):
            raise ValueError(
                f"throughput: baselines are {', '.join(PLAIN_BASELINES)} or engine[:METHOD][@DTYPE][/FIELD=VALUE] "
                f"(got {baseline!r})"
            )
        if not cases.can_fit(baseline, made):
            raise ValueError(f"throughput: {baseline} cannot fit this method (got method={made.method!r})")
        as_run(made, baseline)
    made.plan()
    return made


def _swept(case: Case, sweeps: Sequence[str]) -> list[Case]:
    """One case per value of every sweep; the sweeps are not crossed."""
    made = []
    for each in sweeps:
        field, _, values = each.partition("=")
        made += cases.sweep(case, field, values.split(","))
    return made


def _gate_with(listed: Sequence[Case]) -> dict[int, tuple[str, ...]]:
    """Place of the first case that the plain loop can do -> the plain loop, where it is not compared with anyway."""
    for number, case in enumerate(listed):
        if cases.can_fit(GATE_BASELINE, case):
            alone = not any(name in PLAIN_BASELINES for name in case.baselines)
            return {number: (GATE_BASELINE,)} if alone else {}
    return {}


def _run_all(listed: list[Case], *, with_memory: bool) -> list[record.Row]:
    from benchmarks.gate import GateError
    from benchmarks.harness import run_case
    from benchmarks.tables import show

    rows: list[record.Row] = []
    gate_with = _gate_with(listed)
    for number, case in enumerate(listed):
        with console.status(case.name) as status:
            try:
                extra = gate_with.get(number, ())
                found = run_case(case, with_memory=with_memory, gate_with=extra, say=status.update)
            except GateError as error:
                console.print(f"not timed: {error}", style="red", markup=False, highlight=False)
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

        results = record.stored(provenance.machine())
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
    """(row of the base commit, latest other row) of every case, implementation and baseline with a speed ratio."""
    before: dict[tuple[str, str, str | None], record.Row] = {}
    after: dict[tuple[str, str, str | None], record.Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        if row.metric != "edits_per_s" or row.ratio is None:
            continue
        table = before if row.commit.startswith(base) else after
        table[row.case, row.implementation, row.baseline] = row
    return [(before[key], after[key]) for key in before if key in after]


if __name__ == "__main__":
    app()
