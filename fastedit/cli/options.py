"""What commands share: their options, and how the texts of options become values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fastedit.data import EMBEDDED
from fastedit.progress import log_progress, show_on_board

Model = Annotated[str, typer.Option(help="an embedded model, a Hugging Face id or a folder")]
Data = Annotated[str, typer.Option(help="an embedded set (pocket-vqa, icon-entity ...) or a file of records")]
Format = Annotated[str | None, typer.Option("--format", help="mmedit, vlkeb or jsonl; found out by content if absent")]
Images = Annotated[Optional[Path], typer.Option(help="the folder below which image paths lie")]  # noqa: UP045
Limit = Annotated[Optional[int], typer.Option(help="only the first so many records", min=1)]  # noqa: UP045
Out = Annotated[Path, typer.Option(help="folder for results")]
BatchSize = Annotated[str, typer.Option(help="edits fitted together; auto is as many as fit in memory")]
Mode = Annotated[str, typer.Option(help="single: every edit alone; sequential: edits accumulate in order")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="field=value of the method's or the objective's config; repeatable"),
]
TrainerSettings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--trainer", help="field=value of training: lr, batch_size, seed ...; repeatable"),
]
TrainedPart = Annotated[Optional[Path], typer.Option("--artifact", help="what fastedit train wrote")]  # noqa: UP045
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="leave out records whose images are missing")]
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16 ...")]  # noqa: UP045
Quantize = Annotated[str, typer.Option(help="none, nf4 or int8")]
DeviceMap = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="auto spreads layers over GPUs, host memory and disk; balanced, sequential: see accelerate"),
]
OffloadFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="with --device-map: for weights on disk that no file of the checkpoint has as the model wants"),
]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1 ...")]  # noqa: UP045


def _use_threads(threads: int | None) -> int | None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="CPU threads; all cores if absent", min=1, max=1024, callback=_use_threads),
]


def _log_to(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.with_resource(log_progress(path))
    return path


LogJson = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--log-json", help="append progress to a file, an entry a line as JSON", callback=_log_to),
]


def _board_in(context: typer.Context, folder: Path | None) -> Path | None:
    if folder is not None:
        context.with_resource(show_on_board(folder))
    return folder


Board = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--tensorboard", help="also write progress to a folder for TensorBoard", callback=_board_in),
]
Template = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="prompt around a question, 'Question: {} Short answer:'; the model's own if absent"),
]
Pool = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="records that views, demonstrations and trained parts may draw from, none of them edited: a file, an "
        "embedded set (its train split), or none; absent is the train split of an embedded --data, else none"
    ),
]
Views = Annotated[
    str,
    typer.Option(
        help="what an objective may fit on beside the edit: heldout never takes a record's own rephrase and locality "
        "questions, which are its test; record takes exactly those"
    ),
]
Near = Annotated[
    bool, typer.Option("--near/--no-near", help="draw locality views near the edit: its question about other images")
]
Seed = Annotated[int, typer.Option(help="of the views and of score intervals", min=0)]
Conflicts = Annotated[
    str,
    typer.Option(help="two answers to one question in a sequence: error refuses them, with last the later one stands"),
]
Engine = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="make the edits in several processes: processes of this machine, or ray's of a cluster"),
]
Workers = Annotated[Optional[int], typer.Option(help="of --engine, how many; 2 if absent", min=1)]  # noqa: UP045
WorkerResources = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--resources", help="of --engine ray, what each worker takes: GPU=1; repeatable"),
]
LEDGER_VARIABLE = "FASTEDIT_LEDGER"
#: Of the commands that look at a ledger or change what acts in it.
LedgerFolder = Annotated[
    Path, typer.Option("--ledger", envvar=LEDGER_VARIABLE, help="folder of edits, of fastedit edit --ledger")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask before edits are fitted again")]
LedgerModel = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", help="the edited model; if absent the one that the ledger names, where it is here"),
]
LedgerDtype = Annotated[Optional[str], typer.Option("--dtype", help="as the edits were made if absent")]  # noqa: UP045
LedgerQuantize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--quantize", help="none, nf4 or int8; as the edits were made if absent"),
]
LedgerTemplate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--template", help="prompt around a question; as the edits were made if absent"),
]
LedgerPool = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--pool", help="the records that edits were fitted with: a file, or an embedded set (its train split); if "
        "absent the embedded sets are tried",
    ),
]  # fmt: skip
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run that the folders hold")]

#: Arguments of ``fastedit.edit`` that may also be given with --set, and what the options are if they are not.
RUN_ARGUMENTS: dict[str, Any] = {
    "views": "heldout", "near": True, "seed": 0, "conflicts": "error", "evaluate": True,
}  # fmt: skip
# As Python spells them
_CONSTANTS = {"None": None, "True": True, "False": False}


def parse_settings(settings: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """``field=value`` pairs; a value is read as JSON where it is JSON, else as text; lists become tuples.

    Raises:
        ValueError: a pair without "=", or a field that is given twice.
    """
    parsed: dict[str, Any] = {}
    for pair in settings or []:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"{option}: field=value (got {pair!r})")
        if name in parsed:
            raise ValueError(f"{option}: a field is given once (got {name} again in {pair!r})")
        parsed[name] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Not JSON, or a number or a list that JSON has no end of
        return _CONSTANTS.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers separated by commas.

    Raises:
        ValueError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{name}: numbers separated by commas (got {text!r})") from None


def parse_batch_size(text: str) -> int | str:
    """A batch size as it is typed: a number of at least 1, or "auto".

    Raises:
        ValueError: anything else.
    """
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise ValueError(f"--batch-size: a number of at least 1, or auto (got {text!r})")
    return int(text)


def parse_names(option: str, text: str) -> list[str]:
    """Names separated by commas, each once.

    Raises:
        ValueError: none, or one twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{option}: at least one name (got {text!r})")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{option}: each name once (got {twice!r} again in {text!r})")
    return names


def with_run_arguments(options: dict[str, Any], settings: dict[str, Any]) -> None:
    """Move what ``fastedit.edit`` takes itself from the settings to the options, in place.

    Raises:
        ValueError: given both ways, or the command has no such option.
    """
    for name in set(settings) & set(RUN_ARGUMENTS):
        value = settings.pop(name)
        if name not in options:
            raise ValueError(f"--set: {name} has no use in this command (got {name}={value!r})")
        if options[name] != RUN_ARGUMENTS[name]:
            option = name.replace("_", "-")
            raise ValueError(f"--set: {name} is given once (got --{option} {options[name]} and {name}={value!r})")
        options[name] = value


def require_known(data: str, pool: str | None) -> None:
    """Refuse files that are not there before anything else is done.

    Raises:
        FileNotFoundError: neither a file nor a known name.
    """
    for option, name in (("--data", data), ("--pool", pool)):
        if name is not None and name != "none" and name not in EMBEDDED and not Path(name).exists():
            raise FileNotFoundError(f"{option}: {', '.join(EMBEDDED)} or a file that exists (got {name!r})")
