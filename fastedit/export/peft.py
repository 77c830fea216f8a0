"""Deltas as LoRA adapters of PEFT: one an edit, or one for a sequence that adds up.

The format is that of ``peft``'s ``save_pretrained``: ``adapter_config.json`` and ``adapter_model.safetensors`` with
``base_model.model.<path>.lora_A.weight`` (r, d_in) and ``lora_B.weight`` (d_out, r). Scales are folded into B and alpha
is the rank, module by module, because servers differ in what else they read: vLLM scales every module by ``lora_alpha /
r`` and knows no patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fastedit.backbone import EditableModel, Site
from fastedit.deltas import EditDelta
from fastedit.export import Exported
from fastedit.export.asking import compare_answers
from fastedit.export.factors import Factors, factors_delta, site_factors
from fastedit.export.placing import Placement, placing
from fastedit.export.weights import require_linear, require_sum, require_weights
from fastedit.files import replacing
from fastedit.requests import EditRequest

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "adapter_config.json", "adapter_model.safetensors", "index.json"
PREFIX = "base_model.model."
#: Ranks that vLLM makes room for (``--max-lora-rank``).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Of an adapter's name that come of the request's id
_NAME_LENGTH = 48


def export_peft(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    folder: Path,
    *,
    requests: Sequence[EditRequest] = (),
    each: bool = False,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write deltas as LoRA adapters that ``peft.PeftModel.from_pretrained(stock_model, folder)`` loads.

    Args:
        model: that they were fitted on.
        deltas: of kind "low_rank", or with ``rank`` also "full"; acting on every token of every prompt.
        folder: new or empty. It holds one adapter; with ``each`` a folder for every edit and ``index.json``, which
            says whose they are.
        requests: of the deltas, in order; where ``rank`` leaves something out they are asked again with what is left.
        each: one adapter an edit. Else one adapter is the sum of all, which were fitted as a sequence; its rank is the
            sum of theirs.
        rank: most of an adapter, by SVD; what it leaves out is in the report. None leaves out nothing.
        base: name of the base model for the configuration; None is the one that it was loaded from.
        revision: of the base model.
        overwrite: replace an earlier export.
    Returns:
        Its report has "adapters" (name, request, rank, "relative_error" by module path), "max_lora_rank" (what vLLM is
        to be started with; None where it has no room for that rank) and "asked" (see ``compare_answers``; None where
        nothing was left out or no requests were given).
    Raises:
        ValueError: deltas that are no change of a linear map's weight, that do not add up, a full one without ``rank``,
            or a folder that cannot be written.
        OSError: the disk is full; nothing is left of it.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"export: rank is a whole number, at least 1, or None (got rank={rank!r})")
    require_weights(deltas, "peft")
    require_linear(model, deltas, "peft")
    for group in [[delta] for delta in deltas] if each else [list(deltas)]:
        require_sum(
            group, "write one adapter of the whole sequence" if each else "each=True writes one adapter an edit"
        )
    groups = [[delta] for delta in deltas] if each else [list(deltas)]
    made = [site_factors(group, rank) for group in groups]
    cut = any(each_site.relative_error for factors in made for each_site in factors.values())
    written = [factors_delta(group[0], factors) for group, factors in zip(groups, made, strict=True)]
    asked = compare_answers(model, requests, deltas, written, together=not each) if cut and requests else None
    size = sum(t.numel() * t.element_size() for delta in written for t in delta.tensors.values())
    described = _described(model, base, revision)
    with placing(folder, "peft", overwrite=overwrite, expected_bytes=size + 10_000 * len(made)) as placement:
        adapters: list[dict[str, Any]] = []
        for number, (group, factors) in enumerate(zip(groups, made, strict=True)):
            name = adapter_name(number, group[0].request_id) if each else ""
            _write_adapter(placement.path / name, model, factors, described)
            adapters.append(
                {
                    "name": name,
                    "requests": [delta.request_id for delta in group],
                    "rank": max(each_site.rank for each_site in factors.values()),
                    "relative_error": {
                        site.module_path: each_site.relative_error for site, each_site in factors.items()
                    },
                }
            )
        if each:
            _write_index(placement, adapters, described, requests)
        largest = max(adapter["rank"] for adapter in adapters)
        placement.report |= {
            "adapters": adapters,
            "max_lora_rank": next((most for most in VLLM_RANKS if most >= largest), None),
            "asked": asked,
        }
    return placement.exported


def adapter_name(number: int, request_id: str) -> str:
    """A name for files, and for PEFT, whose adapters have no dots: the edit's number and what its id has of letters."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", request_id).strip("-")[:_NAME_LENGTH].strip("-")
    return f"{number:06d}-{kept}" if kept else f"{number:06d}"


def adapter_config(model: EditableModel, ranks: Mapping[str, int], described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for ranks by module path, those alone that every version of PEFT has.

    Targets are full paths; where PEFT, which compares the ends of paths, would find others by them, a pattern of them.
    """
    paths = list(ranks)
    names = [name for name, _ in model.hf.named_modules()]
    hit = [name for name in names if name in ranks or any(name.endswith(f".{path}") for path in paths)]
    targets: Any = sorted(paths) if set(hit) == set(paths) else "|".join(re.escape(path) for path in sorted(paths))
    largest = max(ranks.values())
    # The first key that ends a path counts: longer ones stand first
    pattern = {
        path: ranks[path]
        for path in sorted(paths, key=len, reverse=True)
        if ranks[path] != largest or any(path.endswith(f".{other}") for other in paths)
    }
    return {
        **described,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _described(model: EditableModel, base: str | None, revision: str | None) -> dict[str, Any]:
    """What the configuration says of the base model."""
    config, kind = model.hf.config, type(model.hf)
    is_text = kind.__name__.endswith("ForCausalLM") and not hasattr(config, "vision_config")
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "base_model_name_or_path": base or getattr(config, "_name_or_path", "") or model.name,
        "revision": revision or getattr(config, "_commit_hash", None),
        "task_type": "CAUSAL_LM" if is_text else None,
        "auto_mapping": None if is_text else mapping,
    }


def _write_adapter(
    folder: Path, model: EditableModel, factors: Mapping[Site, Factors], described: Mapping[str, Any]
) -> None:
    folder.mkdir(exist_ok=True)
    ranks = {site.module_path: each.rank for site, each in factors.items()}
    config = adapter_config(model, ranks, described)
    tensors: dict[str, Tensor] = {}
    for site, each in factors.items():
        path = PREFIX + site.module_path
        tensors[f"{path}.lora_A.weight"] = each.down.T.contiguous()
        tensors[f"{path}.lora_B.weight"] = each.up.T.contiguous()
    with replacing(folder / WEIGHTS_FILE) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    _write_plain(folder / CONFIG_FILE, config)


def _write_index(
    placement: Placement,
    adapters: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
    requests: Sequence[EditRequest],
) -> None:
    entries = []
    for number, adapter in enumerate(adapters):
        asked = {"prompt": requests[number].prompt, "target": requests[number].target} if requests else {}
        entries.append({"name": adapter["name"], "request": adapter["requests"][0], "rank": adapter["rank"], **asked})
    base = {name: described[name] for name in ("base_model_name_or_path", "revision")}
    _write_plain(placement.path / INDEX_FILE, {**base, "adapters": entries})


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    """JSON as other programs read it, without a checksum among its fields."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
