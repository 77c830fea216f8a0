"""What a command works on: records, a pool and a model; what can be known to be wrong is, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.device_map import checked_map
from fastedit.backbone.placement import places_of
from fastedit.backbone.prompts import check_template
from fastedit.backbone.quantization import QUANTIZATIONS
from fastedit.backbone.settings import AUTO_DTYPE, check_choice, check_dtype, checked_device, settled_dtype
from fastedit.backbone.synthetic.skeleton import skeleton
from fastedit.cli.plan import announce
from fastedit.data import EMBEDDED, RecordErrors
from fastedit.engine.checks import check_conflicts, check_sequence
from fastedit.engine.output import expected_output_bytes, require_room
from fastedit.engine.preflight import record_problems
from fastedit.methods import resolve
from fastedit.progress import expect_memory, progress
from fastedit.requests import EditRequest
from fastedit.training import load_artifact, require_artifact

#: Arguments of ``fastedit.load`` that say where weights go.
_PLACING = ("device", "device_map", "offload_folder")


def read_records(
    data: str,
    pool: str | None,
    *,
    format: str | None,
    images: Path | None,
    limit: int | None,
    skip_missing: bool,
) -> tuple[Sequence[EditRequest], Sequence[EditRequest] | None]:
    """The records to edit, and those that may be learned from; both are cheap to read and may be wrong."""
    with progress(f"reading {data}", 0):
        edits = fastedit.read_edits(data, format=format, images=images, limit=limit, skip_missing=skip_missing)
        if pool is None:
            pool = data if data in EMBEDDED else "none"
        if pool == "none":
            return edits, None
        if pool in EMBEDDED:
            return edits, fastedit.read_edits(pool, split="train")
        return edits, fastedit.read_edits(pool, format=format, images=images, skip_missing=skip_missing)


def check_runs(
    methods: Mapping[str, Mapping[str, Any]],
    edits: Sequence[EditRequest],
    *,
    mode: str,
    conflicts: str,
    score_at: Sequence[int] = (),
) -> None:
    """Refuse what ``fastedit.edit`` would refuse of these methods on these edits once a model is loaded.

    Raises:
        ValueError: see there.
    """
    for name, settings in methods.items():
        check_sequence(resolve(name, settings), mode, score_at, len(edits))
    if mode == "sequential" and conflicts == "error":
        check_conflicts(edits)


def check_artifact(method: str, settings: Mapping[str, Any], artifact: Path | None) -> None:
    """Refuse a file of trained parts that a method cannot use on any model, or has none of where it needs some.

    Raises:
        ValueError, FileNotFoundError: names what is needed.
    """
    plan = resolve(method, settings)
    kind = plan.artifact_kind
    if kind is None:
        if artifact is not None:
            raise ValueError(f"--artifact: {method} has no trained parts (got {str(artifact)!r})")
    elif artifact is None:
        require_artifact(None, kind)
    elif artifact.exists():
        load_artifact(artifact, kind=kind)
    else:
        raise FileNotFoundError(f"--artifact: a file that exists, of fastedit train (got {str(artifact)!r})")


def check_loading(
    dtype: str | None,
    quantize: str,
    device: str | None,
    template: str | None,
    device_map: str | None = None,
    offload_folder: Path | None = None,
) -> dict[str, Any]:
    """Arguments of ``fastedit.load`` that were given, refused where they cannot be; None is its own default.

    Raises:
        ValueError, ImportError: see ``fastedit.load``.
    """
    check_choice("quantize", quantize, QUANTIZATIONS)
    check_dtype(dtype)
    spread = checked_map(device_map, device, None, offload_folder, "")
    place = checked_device(device) if spread is None else spread.device
    check_template(template)
    optional = {"device": device, "template": template, "device_map": device_map, "offload_folder": offload_folder}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"dtype": settled_dtype(dtype or AUTO_DTYPE, place), "quantize": quantize, **given}


def check_asked(
    model: str, edits: Sequence[EditRequest], loading: Mapping[str, Any], *, scored: bool = True
) -> EditableModel:
    """The model without its weights, after every image and text of the records was held against it.

    Args:
        loading: arguments of ``fastedit.load``. scored: False looks at the edits' own questions alone.
    Raises:
        RecordErrors: what the model cannot be asked, all of it. ValueError: see ``fastedit.load``.
    """
    with progress(f"checking {len(edits)} records", 0):
        shaped, _ = skeleton(model, **{name: value for name, value in loading.items() if name not in _PLACING})
        problems = record_problems(shaped, edits, scored=scored)
    if problems:
        raise RecordErrors(problems)
    return shaped


def open_model(messages: Console, model: str, loading: Mapping[str, Any]) -> EditableModel:
    """Load a model and say what was taken where nothing was asked for: its type and its device."""
    with progress(f"loading {model}", 0):
        loaded = fastedit.load(model, **loading)
    dtype = str(loaded.dtype).removeprefix("torch.")
    parts = " and ".join(places_of(loaded.hf))
    messages.print(f"{model}: {dtype} on {parts}", markup=False, soft_wrap=True)
    return loaded


def load_model(
    messages: Console,
    model: str,
    edits: Sequence[EditRequest],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int | str,
    loading: Mapping[str, Any],
    out: Path | None,
    evaluate: bool = True,
    keep_deltas: bool = True,
) -> EditableModel:
    """Look at the records, say what it will take, then load the model.

    Args:
        loading: arguments of ``fastedit.load``, as ``check_loading`` gives them.
        out: folder for the runs; None writes none.
    Raises:
        ValueError: records that the model cannot be asked, no room in ``out``, or see ``fastedit.load``.
    """
    shaped = check_asked(model, edits, loading, scored=evaluate)
    if "device_map" not in loading:
        with progress(f"planning for {model}", 0):
            lines, planned_mib = announce(
                model, edits, methods, batch_size=batch_size, loading=loading, evaluate=evaluate,
                keep_deltas=keep_deltas,
            )  # fmt: skip
        expect_memory(planned_mib)
        for line in lines:
            messages.print(line, markup=False, soft_wrap=True)
    loaded = open_model(messages, model, loading)
    loaded.images.take_sizes(shaped.images)
    if out is not None:
        sizes = [
            expected_output_bytes(loaded, resolve(name, settings), len(edits), evaluate=evaluate)
            for name, settings in methods.items()
        ]
        require_room(out, sum(sizes), "--out")
    return loaded
