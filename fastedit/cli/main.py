"""Commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Edit knowledge in multimodal LLMs.")
console = Console()
messages = Console(stderr=True)

Model = Annotated[str, typer.Option(help="an embedded model, a Hugging Face id or a folder")]
Data = Annotated[str, typer.Option(help="an embedded set (pocket-vqa, pocket-caption) or a file of records")]
Format = Annotated[str | None, typer.Option("--format", help="mmedit, vlkeb or jsonl; found out by content if absent")]
Images = Annotated[Optional[Path], typer.Option(help="the folder below which image paths lie")]  # noqa: UP045
Limit = Annotated[Optional[int], typer.Option(help="only the first so many records", min=1)]  # noqa: UP045
Out = Annotated[Path, typer.Option(help="folder for results")]
BatchSize = Annotated[str, typer.Option(help="edits fitted together; auto is as many as fit in memory")]
Mode = Annotated[str, typer.Option(help="single or sequential")]
Settings = Annotated[Optional[list[str]], typer.Option("--set", help="field=value of the method's config; repeatable")]  # noqa: UP045
TrainerSettings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--trainer", help="field=value of training: lr, batch_size, seed ...; repeatable"),
]
TrainedPart = Annotated[Optional[Path], typer.Option("--artifact", help="what fastedit train wrote")]  # noqa: UP045
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="leave out records whose images are missing")]
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16 ...")]  # noqa: UP045
Quantize = Annotated[str, typer.Option(help="none, nf4 or int8")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1 ...")]  # noqa: UP045
Threads = Annotated[Optional[int], typer.Option(help="CPU threads; all cores if absent", min=1)]  # noqa: UP045


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``field=value`` pairs; a value is read as JSON where it is JSON, else as text; lists become tuples.

    Raises:
        ValueError: a pair without "=".
    """
    parsed: dict[str, Any] = {}
    for pair in settings or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: field=value (got {pair!r})")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        parsed[name] = tuple(value) if isinstance(value, list) else value
    return parsed


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{name}: numbers separated by commas (got {text!r})") from None


def load_inputs(
    model: str,
    data: str,
    *,
    format: str | None,
    images: Path | None,
    limit: int | None,
    skip_missing: bool,
    loading: dict[str, Any],
    methods: dict[str, dict[str, Any]],
    batch_size: int | str,
) -> tuple[Any, Any, Any]:
    """Records first (they are cheap and may be wrong), a pool of training records, what it will take, the model."""
    import fastedit
    from fastedit.cli.plan import announce
    from fastedit.data import EMBEDDED

    edits = fastedit.read_edits(data, format=format, images=images, limit=limit, skip_missing=skip_missing)
    pool = fastedit.read_edits(data, split="train") if data in EMBEDDED else None
    announce(messages, model, edits, methods, batch_size=batch_size, loading=loading)
    return fastedit.load(model, **{k: v for k, v in loading.items() if v is not None}), edits, pool


@app.command()
def edit(
    model: Model = "pocket-llava",
    data: Data = "pocket-vqa",
    method: Annotated[str, typer.Option(help="ft, lora, kl+ft, odedit+lora ...")] = "odedit+lora",
    out: Out = Path("runs/edit"),
    limit: Limit = None,
    batch_size: BatchSize = "16",
    mode: Mode = "single",
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
    artifact: TrainedPart = None,
    score_at: Annotated[str, typer.Option(help="in sequence, also score after so many edits: 1,10,100")] = "",
) -> None:
    """Edit a model, score the edits, save deltas and scores."""
    import fastedit
    from fastedit.cli.plan import read_batch_size
    from fastedit.cli.tables import checkpoint_line, score_tables, speed_table

    use_threads(threads)
    size: Any = read_batch_size(batch_size)
    overrides, gaps = parse_settings(settings), parse_numbers("--score-at", score_at)
    loading = {"dtype": dtype, "quantize": quantize, "device": device}
    loaded, edits, pool = load_inputs(
        model, data, format=format, images=images, limit=limit, skip_missing=skip_missing, loading=loading,
        methods={method: overrides}, batch_size=size,
    )  # fmt: skip
    run = fastedit.edit(
        loaded, edits, method, batch_size=size, mode=mode, pool=pool, artifact=artifact, score_at=gaps, **overrides
    )
    for count, scores in run.checkpoints.items():
        console.print(checkpoint_line(count, scores), markup=False, soft_wrap=True)
    folder = run.save(out)
    for protocol in run.scores:
        for table in score_tables({method: run}, protocol):
            console.print(table)
    console.print(speed_table({method: run}))
    console.print(f"scores: {folder / 'scores.json'}\ndeltas: {folder / 'deltas.safetensors'}", soft_wrap=True)


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
    threads: Threads = None,
    settings: Settings = None,
    trainer: TrainerSettings = None,
) -> None:
    """Train the part that a method needs before it can edit; saved to a file for edit --artifact."""
    import fastedit
    from fastedit.cli.train import train_method
    from fastedit.data import EMBEDDED

    use_threads(threads)
    chosen, overrides = parse_settings(trainer), parse_settings(settings)
    if steps is not None:
        chosen["steps"] = steps
    split = {"split": "train"} if data in EMBEDDED else {}
    records = fastedit.read_edits(data, format=format, images=images, limit=limit, skip_missing=skip_missing, **split)
    given: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "device": device}
    loaded = fastedit.load(model, **{k: v for k, v in given.items() if v is not None})
    path = Path("runs") / f"{method.replace('+', '-')}.safetensors" if out is None else out
    train_method(console, loaded, method, records, path, resume=resume, trainer=chosen, settings=overrides)


@app.command()
def compare(
    model: Model = "pocket-llava",
    data: Data = "pocket-vqa",
    methods: Annotated[str, typer.Option(help="names, separated by commas")] = "ft,kl+ft,odedit+ft,lora,odedit+lora",
    out: Out = Path("runs/compare"),
    limit: Limit = 200,
    batch_size: BatchSize = "16",
    mode: Mode = "single",
    artifacts: Annotated[
        Optional[Path], typer.Option(help="folder of trained parts; what is not there is trained on the pool")  # noqa: UP045
    ] = None,
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    dtype: Dtype = None,
    quantize: Quantize = "none",
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
) -> None:
    """Run several methods on the same edits; a table, a JSON file and a picture."""
    from fastedit.cli.compare import compare_methods, settings_per_method
    from fastedit.cli.plan import read_batch_size

    use_threads(threads)
    size: Any = read_batch_size(batch_size)
    loading = {"dtype": dtype, "quantize": quantize, "device": device}
    names = [name.strip() for name in methods.split(",") if name.strip()]
    overrides = parse_settings(settings)
    chosen = settings_per_method(names, overrides)
    loaded, edits, pool = load_inputs(
        model, data, format=format, images=images, limit=limit, skip_missing=skip_missing, loading=loading,
        methods=chosen, batch_size=size,
    )  # fmt: skip
    compare_methods(
        loaded, edits, pool, names,
        data=data, out=out, batch_size=size, mode=mode, console=console, settings=overrides,
        artifacts=artifacts or out / "artifacts",
    )  # fmt: skip


@app.command()
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
    import fastedit
    from fastedit.cli.plan import plan_table, read_batch_size

    size: Any = read_batch_size(batch_size)
    overrides = parse_settings(settings)
    edits = None
    if data is not None:
        edits = fastedit.read_edits(data, format=format, images=images, limit=limit, skip_missing=skip_missing)
    given = {"dtype": dtype, "quantize": quantize, "device": device}
    loading: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    found = fastedit.plan_memory(
        model, method=method, batch_size=size, edits=edits, evaluate=evaluate, **loading, **overrides
    )
    console.print(plan_table(model, found))
    console.print(found.text(), markup=False, soft_wrap=True)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="a file of records")],
    format: Format = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    model: Annotated[
        Optional[str], typer.Option(help="check lengths and tokens as this model has them")  # noqa: UP045
    ] = None,
    template: Annotated[Optional[str], typer.Option(help="of the model's prompts, as load takes it")] = None,  # noqa: UP045
) -> None:
    """Read records and report everything that is wrong or odd in them, without a model's weights."""
    from fastedit.cli.check import check_file

    sound = check_file(
        console, messages, data, format=format, images=images, skip_missing=skip_missing, model=model, template=template
    )
    if not sound:
        raise typer.Exit(2)


@app.command()
def info(
    model: Annotated[Optional[str], typer.Argument(help="an embedded model")] = None,  # noqa: UP045
) -> None:
    """The embedded models' cards, or the installed kernels when no model is named."""
    import fastedit
    from fastedit import pocket

    if model is None:
        console.print(f"fastedit {fastedit.__version__}; embedded models: {', '.join(pocket.MODELS)}", markup=False)
        console.print(f"methods: {', '.join(fastedit.method_names())}", soft_wrap=True, markup=False)
        for op, devices in fastedit.implementations().items():
            console.print(f"  {op}: {devices}", markup=False)
        return
    if model not in pocket.MODELS:
        raise ValueError(f"info: model is one of {sorted(pocket.MODELS)} (got model={model!r})")
    console.print_json(json.dumps(pocket.model_card(model)))


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="an embedded set")],
    folder: Annotated[Path, typer.Argument(help="where to write records and images")],
    split: Annotated[str, typer.Option(help="eval or train")] = "eval",
) -> None:
    """Write an embedded edit set as an MMEdit JSON file with its images."""
    from fastedit import pocket

    pocket.export(name, split, folder)
    console.print(f"written to {folder}", markup=False)


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads when one is asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Entry point: a refused input is one message on standard error and exit status 2, not a stack of frames."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(f"fastedit: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
