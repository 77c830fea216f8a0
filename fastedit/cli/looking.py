"""Commands that change nothing: ``plan``, ``check``, ``info``, ``records``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

import fastedit
from fastedit.cli.app import console, messages
from fastedit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Format,
    Images,
    Limit,
    Model,
    Quantize,
    Settings,
    SkipMissing,
    Template,
    parse_batch_size,
    parse_settings,
    require_known,
)


def plan(
    model: Model = "pocket-llava",
    method: Annotated[str, typer.Option(help="ft, lora, kl+ft, odedit+lora ...")] = "odedit+lora",
    batch_size: BatchSize = "16",
    data: Annotated[Optional[str], typer.Option(help="plan for these records")] = None,  # noqa: UP045
    evaluate: Annotated[bool, typer.Option(help="with scoring")] = True,
    format: Format = None,
    images: Images = None,
    limit: Limit = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    settings: Settings = None,
) -> None:
    """The memory that a run would need, part by part; no weights are read."""
    from fastedit.cli.inputs import check_loading
    from fastedit.cli.plan import plan_table
    from fastedit.methods import resolve
    from fastedit.progress import progress

    size, overrides = parse_batch_size(batch_size), parse_settings(settings)
    resolve(method, overrides)
    loading = check_loading(dtype, quantize, device, None)
    edits = None
    if data is not None:
        require_known(data, None)
        edits = fastedit.read_edits(data, format=format, images=images, limit=limit, skip_missing=skip_missing)
    with progress(f"planning for {model}", 0):
        found = fastedit.plan_memory(
            model, method=method, batch_size=size, edits=edits, evaluate=evaluate, **loading, **overrides
        )
    console.print(plan_table(model, found))
    console.print(found.text(), markup=False, soft_wrap=True)


def check(
    data: Annotated[str, typer.Argument(help="a file of records")],
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    model: Annotated[
        Optional[str], typer.Option(help="check lengths and tokens as this model has them")  # noqa: UP045
    ] = None,
    template: Template = None,
) -> None:
    """Read records and report everything that is wrong or odd in them, without a model's weights."""
    from fastedit.cli.check import check_file

    require_known(data, None)
    sound = check_file(
        console, messages, data, format=format, images=images, skip_missing=skip_missing, model=model, template=template
    )
    if not sound:
        raise typer.Exit(2)


def info(
    model: Annotated[Optional[str], typer.Argument(help="an embedded model")] = None,  # noqa: UP045
) -> None:
    """The embedded models' cards, or the installed kernels when no model is named."""
    from fastedit.cli.info import print_info

    print_info(console, model)


def records(
    name: Annotated[str, typer.Argument(help="an embedded set")],
    folder: Annotated[Path, typer.Argument(help="where to write records and images")],
    split: Annotated[str, typer.Option(help="eval or train")] = "eval",
) -> None:
    """Write an embedded edit set as an MMEdit JSON file with its images."""
    from fastedit import pocket, smol

    (smol if name in smol.SETS else pocket).export(name, split, folder)
    console.print(f"written to {folder}", markup=False)
