"""Commands."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import fastedit
from fastedit.cli import ledger_commands, looking, recipes, report, reproduce
from fastedit.cli.app import app, console, messages
from fastedit.cli.failures import run
from fastedit.cli.options import (
    LEDGER_VARIABLE,
    BatchSize,
    Board,
    Conflicts,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Engine,
    Format,
    Images,
    Json,
    Limit,
    LogJson,
    Mode,
    Model,
    Near,
    OffloadFolder,
    Out,
    Overwrite,
    Pool,
    Quantize,
    Seed,
    Settings,
    SkipMissing,
    Template,
    Threads,
    TrainedPart,
    TrainerSettings,
    Views,
    WorkerResources,
    Workers,
    parse_batch_size,
    parse_names,
    parse_numbers,
    parse_settings,
    require_known,
    with_run_arguments,
)


@app.command()
def edit(
    model: Model = "pocket-llava",
    data: Data = "pocket-vqa",
    method: Annotated[str, typer.Option(help="ft, lora, kl+ft, odedit+lora ...")] = "odedit+lora",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder for the run; if absent runs/edit, and none where a ledger keeps the edits"),
    ] = None,
    overwrite: Overwrite = False,
    limit: Limit = None,
    batch_size: BatchSize = "16",
    mode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="single: every edit alone, the default; sequential: edits accumulate in order, the default of a ledger"
        ),
    ] = None,
    conflicts: Conflicts = "error",
    score_at: Annotated[str, typer.Option(help="in sequence, also score after so many edits: 1,10,100")] = "",
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="score the edits")] = True,
    ledger: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            envvar=LEDGER_VARIABLE, help="commit every edit there as it ends, and go on from what is committed"
        ),
    ] = None,
    pool: Pool = None,
    views: Views = "heldout",
    near: Near = True,
    seed: Seed = 0,
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: Template = None,
    threads: Threads = None,
    engine: Engine = None,
    workers: Workers = None,
    resources: WorkerResources = None,
    log_json: LogJson = None,
    tensorboard: Board = None,
    settings: Settings = None,
    artifact: TrainedPart = None,
    json: Json = False,
) -> None:
    """Edit a model, score the edits, save deltas and scores."""
    from fastedit.cli.edit import Keeping, edit_records, goes_on, look_at_ledger
    from fastedit.cli.inputs import check_artifact, check_loading, check_runs, load_model, read_records
    from fastedit.engine.arguments import check_options
    from fastedit.engine.output import claim_output
    from fastedit.engine.parallel.workers import workers_of
    from fastedit.ledger import check_folder
    from fastedit.methods import resolve

    mode = mode or ("single" if ledger is None else "sequential")
    if out is None and ledger is None:
        out = Path("runs/edit")
    if overwrite and out is None:
        raise ValueError("--overwrite: replaces the run that --out holds (got no --out)")
    size, overrides = parse_batch_size(batch_size), parse_settings(settings)
    options: dict[str, Any] = {"views": views, "near": near, "seed": seed, "conflicts": conflicts, "evaluate": evaluate}
    with_run_arguments(options, overrides)
    options |= {"mode": mode, "batch_size": size, "score_at": parse_numbers("--score-at", score_at)}
    check_options(method=method, **options)
    amounts = parse_settings(resources, "--resources") or None
    workers_of(engine, workers, amounts)
    chosen = {method: overrides}
    resolve(method, overrides)
    loading = check_loading(dtype, quantize, device, template, device_map, offload_folder)
    check_artifact(method, overrides, artifact)
    require_known(data, pool)
    if ledger is not None:
        check_folder(ledger)
    edits, learned = read_records(data, pool, format=format, images=images, limit=limit, skip_missing=skip_missing)
    check_runs(chosen, edits, mode=mode, conflicts=options["conflicts"], score_at=options["score_at"])
    there = 0 if ledger is None else look_at_ledger(ledger, edits, options["conflicts"])
    claimed = nullcontext() if out is None else claim_output(out, overwrite=overwrite, field="--out")
    with goes_on(ledger, edits), claimed:
        loaded = load_model(
            messages, model, edits, chosen, batch_size=size, loading=loading, out=out,
            evaluate=options["evaluate"], keep_deltas=ledger is None,
        )  # fmt: skip
        edit_records(
            console, loaded, edits, method, Keeping(out, ledger, there, json), pool=learned, artifact=artifact,
            engine=engine, workers=workers, resources=amounts, **options, **overrides,
        )  # fmt: skip


@app.command()
def train(
    method: Annotated[str, typer.Option(help="mend, odedit+mend, ke ...")],
    model: Model = "pocket-llava",
    data: Data = "pocket-vqa",
    out: Annotated[Optional[Path], typer.Option(help="file for what is trained")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="most optimiser steps", min=1)] = None,  # noqa: UP045
    limit: Limit = None,
    resume: Annotated[bool, typer.Option(help="go on from where a run was broken off")] = True,
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: Template = None,
    threads: Threads = None,
    log_json: LogJson = None,
    tensorboard: Board = None,
    settings: Settings = None,
    trainer: TrainerSettings = None,
) -> None:
    """Train the part that a method needs before it can edit; saved to a file for edit --artifact."""
    from fastedit.cli.inputs import check_asked, check_loading, open_model
    from fastedit.cli.train import train_method, training_settings
    from fastedit.data import EMBEDDED
    from fastedit.engine.output import claim_result
    from fastedit.progress import progress
    from fastedit.training import processes

    processes.take_device()
    # Of several processes the first one speaks and writes
    console.quiet = messages.quiet = not processes.is_first()
    overrides = parse_settings(settings)
    chosen = training_settings(method, overrides, trainer, steps)
    loading = check_loading(dtype, quantize, device, template, device_map, offload_folder)
    require_known(data, None)
    split = {"split": "train"} if data in EMBEDDED else {}
    with progress(f"reading {data}", 0):
        records = fastedit.read_edits(
            data, format=format, images=images, limit=limit, skip_missing=skip_missing, **split
        )
    path = Path("runs") / f"{method.replace('+', '-')}.safetensors" if out is None else out
    with claim_result(path, field="--out") if processes.is_first() else nullcontext():
        shaped = check_asked(model, records, loading)
        loaded = open_model(messages, model, loading)
        loaded.images.take_sizes(shaped.images)
        train_method(console, loaded, method, records, path, resume=resume, trainer=chosen, settings=overrides)


@app.command()
def compare(
    model: Model = "pocket-llava",
    data: Data = "pocket-vqa",
    methods: Annotated[str, typer.Option(help="names, separated by commas")] = "ft,kl+ft,odedit+ft,lora,odedit+lora",
    out: Out = Path("runs/compare"),
    overwrite: Overwrite = False,
    limit: Limit = 200,
    batch_size: BatchSize = "16",
    mode: Mode = "single",
    conflicts: Conflicts = "error",
    pool: Pool = None,
    views: Views = "heldout",
    near: Near = True,
    seed: Seed = 0,
    artifacts: Annotated[
        Optional[Path], typer.Option(help="folder of trained parts; what is not there is trained on the pool")  # noqa: UP045
    ] = None,
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: Template = None,
    threads: Threads = None,
    log_json: LogJson = None,
    tensorboard: Board = None,
    settings: Settings = None,
) -> None:
    """Run several methods on the same edits; a table, a JSON file and a picture."""
    from fastedit.cli.compare import Comparison, settings_per_method
    from fastedit.cli.inputs import check_loading, check_runs, load_model, read_records
    from fastedit.engine.arguments import check_options
    from fastedit.engine.output import claim_output

    size, overrides = parse_batch_size(batch_size), parse_settings(settings)
    options: dict[str, Any] = {"views": views, "near": near, "seed": seed, "conflicts": conflicts}
    with_run_arguments(options, overrides)
    options |= {"mode": mode, "batch_size": size}
    check_options(**options)
    names = parse_names("--methods", methods)
    chosen = settings_per_method(names, overrides)
    loading = check_loading(dtype, quantize, device, template, device_map, offload_folder)
    require_known(data, pool)
    edits, learned = read_records(data, pool, format=format, images=images, limit=limit, skip_missing=skip_missing)
    check_runs(chosen, edits, mode=mode, conflicts=options["conflicts"])
    work = Comparison(edits, learned, chosen, data=data, out=out, artifacts=artifacts or out / "artifacts")
    work.check_artifacts(model)
    with claim_output(out, overwrite=overwrite, field="--out"):
        loaded = load_model(messages, model, edits, chosen, batch_size=size, loading=loading, out=out)
        work.run(console, loaded, **options)


for _command in (
    looking.plan,
    looking.check,
    looking.info,
    looking.records,
    report.report,
    reproduce.reproduce,
    recipes.recipes,
    ledger_commands.log,
    ledger_commands.show,
    ledger_commands.diff,
    ledger_commands.ask,
    ledger_commands.verify,
    ledger_commands.score,
    ledger_commands.undo,
    ledger_commands.redo,
    ledger_commands.tag,
    ledger_commands.compact,
    ledger_commands.export,
    ledger_commands.consolidate,
):
    app.command()(_command)


def main() -> None:
    """Entry point: what is refused is one message on standard error, not a stack of frames."""
    sys.exit(run(app))
