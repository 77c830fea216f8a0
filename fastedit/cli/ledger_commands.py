"""Commands on a ledger: ``log``, ``show``, ``undo``, ``redo``, ``verify``, ``score``, ``diff``, ``tag``, ``compact``,
``ask``, ``export``, ``consolidate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fastedit.cli.app import console
from fastedit.cli.options import (
    LEDGER_VARIABLE,
    Device,
    DeviceMap,
    Engine,
    Format,
    Images,
    Json,
    LedgerDtype,
    LedgerFolder,
    LedgerModel,
    LedgerPool,
    LedgerQuantize,
    LedgerTemplate,
    OffloadFolder,
    Settings,
    Threads,
    WorkerResources,
    Workers,
    Yes,
    parse_settings,
)

Ids = Annotated[list[str], typer.Argument(help="numbers of edits, or ids of their requests")]


def log(
    ledger: LedgerFolder,
    edits: Annotated[bool, typer.Option("--edits", help="the edits that were asked for, instead of events")] = False,
    limit: Annotated[Optional[int], typer.Option(help="only the newest so many", min=1)] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """What was done in a ledger, or which edits it has."""
    from fastedit.cli.ledger import print_log

    print_log(console, ledger, limit=limit, edits=edits, as_json=json)


def show(
    ledger: LedgerFolder,
    edit: Annotated[str, typer.Argument(metavar="ID", help="number of the edit, or the id of its request")],
    json: Json = False,
) -> None:
    """All that a ledger has of an edit: what was asked, how the fit ended, its scores."""
    from fastedit.cli.ledger import print_edit

    print_edit(console, ledger, edit, as_json=json)


def undo(
    ledger: LedgerFolder,
    ids: Ids,
    later: Annotated[
        str, typer.Option(help="edits fitted on top: refit fits them again, keep keeps and asks them")
    ] = "refit",
    yes: Yes = False,
    pool: LedgerPool = None,
    format: Format = None,
    images: Images = None,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Take edits back, all or none; says first what it costs."""
    from fastedit.cli.ledger_model import Loading
    from fastedit.cli.undo import undo_edits

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    records = {"pool": pool, "format": format, "images": images}
    undo_edits(console, ledger, ids, later=later, records=records, yes=yes, loading=loading, as_json=json)


def redo(
    ledger: LedgerFolder,
    ids: Ids,
    yes: Yes = False,
    pool: LedgerPool = None,
    format: Format = None,
    images: Images = None,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Let edits act again that were taken back."""
    from fastedit.cli.ledger_model import Loading
    from fastedit.cli.undo import redo_edits

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    records = {"pool": pool, "format": format, "images": images}
    redo_edits(console, ledger, ids, records=records, yes=yes, loading=loading, as_json=json)


def verify(
    ledger: LedgerFolder,
    ask: Annotated[bool, typer.Option("--ask", help="also ask the model the question of every edit that acts")] = False,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check every file and row of a ledger; exit status 1 where something is damaged, or an edit does not hold."""
    from fastedit.cli.ledger import verify_ledger
    from fastedit.cli.ledger_model import Loading

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    if not verify_ledger(console, ledger, ask=ask, loading=loading, as_json=json):
        raise typer.Exit(1)


def score(
    ledger: LedgerFolder,
    engine: Engine = None,
    workers: Workers = None,
    resources: WorkerResources = None,
    batch_size: Annotated[int, typer.Option(help="edits scored together", min=1)] = 16,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Ask the questions of all edits that act, and keep the scores; no edit is made."""
    from fastedit.cli.ledger import print_ledger_scores
    from fastedit.cli.ledger_model import Loading
    from fastedit.engine.parallel.workers import workers_of

    amounts = parse_settings(resources, "--resources") or None
    workers_of(engine, workers, amounts)
    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    spread = {"engine": engine, "workers": workers, "resources": amounts, "batch_size": batch_size}
    print_ledger_scores(console, ledger, loading, spread, as_json=json)


def diff(
    ledger: LedgerFolder,
    before: Annotated[Optional[str], typer.Argument(help="tag or event; the base model if absent, or 0")] = None,  # noqa: UP045
    after: Annotated[Optional[str], typer.Argument(help="tag or event; now if absent")] = None,  # noqa: UP045
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Which answers differ between two moments of a ledger."""
    from fastedit.cli.ledger import print_diff
    from fastedit.cli.ledger_model import Loading

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    print_diff(console, ledger, before, after, loading, as_json=json)


def tag(
    ledger: LedgerFolder,
    name: Annotated[Optional[str], typer.Argument(help="of the present state; the tags are listed if absent")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Give the present state of a ledger a name."""
    from fastedit.cli.ledger import name_state

    name_state(console, ledger, name, as_json=json)


def compact(ledger: LedgerFolder, json: Json = False) -> None:
    """Write what is of use in a ledger into few files; versions that nothing acts with and no tag names go."""
    from fastedit.cli.ledger import compact_ledger

    compact_ledger(console, ledger, as_json=json)


def ask(
    ledger: LedgerFolder,
    question: Annotated[str, typer.Argument(help="what to ask")],
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="what it is about; repeatable, in order; none for a question in text only"),
    ] = None,
    at: Annotated[Optional[str], typer.Option(help="tag or event; now if absent")] = None,  # noqa: UP045
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """The base model's answer to a question beside that with the edits."""
    from fastedit.cli.ledger import print_answers
    from fastedit.cli.ledger_model import Loading

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    print_answers(console, ledger, question, image or [], at, loading, as_json=json)


def export(
    kind: Annotated[str, typer.Argument(help="peft, merged, delta or records")],
    folder: Annotated[Path, typer.Argument(help="to write; for some kinds a file")],
    ledger: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--ledger", envvar=LEDGER_VARIABLE, help="folder of edits; required"),
    ] = None,
    at: Annotated[Optional[str], typer.Option(help="tag or event; now if absent")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    settings: Settings = None,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write the edits that act for other programs: as adapters, a checkpoint, changed tensors or records."""
    from fastedit.cli.ledger import export_edits
    from fastedit.cli.ledger_model import Loading
    from fastedit.data import EMBEDDED

    if kind in EMBEDDED:
        raise ValueError(
            f"export: an embedded set is written by fastedit records {kind} {folder} (got kind={kind!r})"
        )  # fmt: skip
    if ledger is None:
        raise typer.BadParameter(f"the folder of edits to export, or {LEDGER_VARIABLE}", param_hint="--ledger")
    options = parse_settings(settings)
    if overwrite:
        options["overwrite"] = True
    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    export_edits(console, ledger, kind, folder, options, loading, at=at, as_json=json)


def consolidate(
    kind: Annotated[str, typer.Argument(help="delta, merged or peft")],
    folder: Annotated[Path, typer.Argument(help="to write")],
    ledger: LedgerFolder,
    method: Annotated[str, typer.Option(help="lora, ft, kl+lora or kl+ft")] = "kl+lora",
    batch_size: Annotated[Optional[int], typer.Option(help="edits of a step; all if absent", min=1)] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="of the change's first values and of the batches", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    settings: Settings = None,
    model: LedgerModel = None,
    dtype: LedgerDtype = None,
    quantize: LedgerQuantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    template: LedgerTemplate = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fit one change of weights on all edits that act, say which hold with it, and write it for other programs."""
    from fastedit.cli.consolidate import consolidate_edits
    from fastedit.cli.ledger_model import Loading

    loading = Loading(model, dtype, quantize, template, device, device_map, offload_folder)
    options = parse_settings(settings) | {"batch_size": batch_size, "seed": seed}
    consolidate_edits(
        console, ledger, kind, folder, method=method, settings=options, overwrite=overwrite, loading=loading,
        as_json=json,
    )  # fmt: skip
