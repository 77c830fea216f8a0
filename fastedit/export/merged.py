"""Edits written into the weights: a checkpoint that ``from_pretrained`` loads, with everything that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastedit.backbone import EditableModel, load
from fastedit.backbone.settings import DTYPES
from fastedit.deltas import EditDelta
from fastedit.engine.acting import applied
from fastedit.engine.apply import require_sequence
from fastedit.evaluation import exact_match
from fastedit.export import Exported
from fastedit.export.changed import changed_weights
from fastedit.export.checkpoint import size_bytes, write_checkpoint
from fastedit.export.placing import placing
from fastedit.export.weights import require_weights
from fastedit.requests import EditRequest
from fastedit.settings import nearest


def export_merged(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    folder: Path,
    *,
    requests: Sequence[EditRequest] = (),
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    check_sequence: bool = True,
    max_new_tokens: int = 48,
    overwrite: bool = False,
) -> Exported:
    """Write the model with the edits in its weights, its processor, chat template and generation configuration.

    Weights are the base's plus the sum of all changes, in float64, rounded once. The model in memory is only read: it
    is what it was to the bit, and may be in use meanwhile.

    Args:
        model: the base, not quantized. deltas: changes of weights, one or a sequence. folder: new or empty.
        requests: of the deltas; each is asked of the edited base, and again of the checkpoint that was written.
        dtype: "float32", "bfloat16", "float16" or "float64" of the weights; None is that of the model in memory.
        max_shard_size: of a file of weights, in bytes or "5GB".
        check_sequence: refuse edits that were not fitted on top of those before them.
        max_new_tokens: longest answer that is asked for. overwrite: an earlier export in the folder is replaced.
    Returns:
        Its report: "dtype"; "weights", by name the site and the largest and relative rounding; and with requests
        "held": how many are answered with their target "before_rounding", by the base with the deltas, and "written",
        by the checkpoint, and the requests "lost" between the two, with the answers that they get.
    Raises:
        ValueError: no changes of weights, a quantized base, weights that others share, no room, or a folder in use.
        OSError: it cannot be written; nothing is left of it.
    """
    target = checked_dtype(dtype)
    # Before their sequence: deltas that are no weights do not add up, whatever they were fitted on
    require_weights(deltas, "merged")
    if check_sequence:
        require_sequence(deltas)
    weights: dict[str, Any] = {}
    expected = size_bytes(model.hf, model.dtype, target)
    with placing(folder, "merged", overwrite=overwrite, expected_bytes=expected) as placement:
        changed = {}
        for each in changed_weights(model, deltas, "merged", dtype=target):
            changed[each.name] = each.value
            weights[each.name] = {
                "site": each.site,
                "largest_change": each.largest_change,
                "largest_rounding": each.largest_rounding,
                "relative_rounding": each.relative_rounding,
            }
        write_checkpoint(model, changed, placement.path, dtype=target, max_shard_size=max_shard_size)
        del changed
        name = dtype or str(model.dtype).removeprefix("torch.")
        placement.report |= {
            "edits": [delta.request_id for delta in deltas],
            "dtype": name,
            "template": model.template,
            "weights": weights,
        }
        if requests:
            placement.report["held"] = held_after(
                model,
                deltas,
                requests,
                placement.path,
                name,
                max_new_tokens=max_new_tokens,
                check_sequence=check_sequence,
            )
    return placement.exported


def checked_dtype(dtype: str | None) -> torch.dtype | None:
    """The type of a name.

    Raises:
        ValueError: none of this name, naming the nearest.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"export: dtype {dtype!r} is not known{nearest(str(dtype), DTYPES)} (got dtype={dtype!r})")
    return None if dtype is None else DTYPES[dtype]


def held_after(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    requests: Sequence[EditRequest],
    folder: Path,
    dtype: str,
    *,
    max_new_tokens: int,
    check_sequence: bool,
) -> dict[str, Any]:
    """Which edits are answered with their target: by the base with the deltas, and by a checkpoint, loaded anew."""
    queries = [request.query for request in requests]
    with applied(model, deltas, check_sequence=check_sequence):
        before = model.generate(queries, max_new_tokens=max_new_tokens)
    # oneDNN serves float32 alone
    linear = model.linear if dtype == "float32" else "auto"
    written = load(folder, dtype=dtype, device=model.device, template=model.template, linear=linear, state_cache_mib=0)
    after = written.generate(queries, max_new_tokens=max_new_tokens)
    pairs = list(zip(requests, before, after, strict=True))
    lost = [
        {"id": request.id, "prompt": request.prompt, "target": request.target, "before_rounding": old, "written": new}
        for request, old, new in pairs
        if exact_match(old, request.target) and not exact_match(new, request.target)
    ]
    return {
        "asked": len(pairs),
        "before_rounding": sum(exact_match(old, request.target) for request, old, _ in pairs),
        "written": sum(exact_match(new, request.target) for request, _, new in pairs),
        "lost": lost,
    }
