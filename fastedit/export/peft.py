"""Deltas as LoRA adapters of PEFT: one an edit, or one for a sequence that adds up.

The format is that of ``peft``'s ``save_pretrained``: ``adapter_config.json`` and ``adapter_model.safetensors`` with
``base_model.model.<path>.lora_A.weight`` (r, d_in) and ``lora_B.weight`` (d_out, r). Scales are folded into B and alpha
is the rank, module by module, because servers differ in what else they read: vLLM scales every module by ``lora_alpha /
r`` and knows no patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fastedit.backbone import EditableModel, Site
from fastedit.deltas import EditDelta
from fastedit.engine.output import require_room
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
#: On models of mixed experts PEFT takes targets of these names for parameters that all experts share, wherever they
#: stand: by the model type that transformers converts a checkpoint's experts as.
EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
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
    _require_no_expert_names(model, deltas)
    described = _described(model, base, revision)
    adapters: list[dict[str, Any]] = []
    with placing(folder, "peft", overwrite=overwrite) as placement:
        # One group at a time: deltas may lie in files, and more of them than memory holds
        for number, group in enumerate(_groups(deltas, each)):
            factors = site_factors(group, rank)
            name = adapter_name(number, group[0].request_id) if each else ""
            require_room(placement.path, _bytes(factors) * (len(deltas) - number if each else 1), "export")
            _write_adapter(placement.path / name, model, factors, described)
            adapters.append(
                {
                    "name": name,
                    "requests": [delta.request_id for delta in group],
                    "rank": max(of_site.rank for of_site in factors.values()),
                    "relative_error": {site.module_path: of_site.relative_error for site, of_site in factors.items()},
                }
            )
        if each:
            _write_index(placement, adapters, described, requests)
        largest = max(adapter["rank"] for adapter in adapters)
        placement.report |= {
            "adapters": adapters,
            "max_lora_rank": next((most for most in VLLM_RANKS if most >= largest), None),
            "asked": None,
        }
        if requests and any(error for adapter in adapters for error in adapter["relative_error"].values()):
            placement.report["asked"] = compare_answers(
                model,
                requests,
                deltas,
                lambda some: [factors_delta(group[0], site_factors(group, rank)) for group in _groups(some, each)],
                together=not each,
            )
    return placement.exported


def _require_no_expert_names(model: EditableModel, deltas: Sequence[EditDelta]) -> None:
    """Refuse maps that PEFT would look for among the experts."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:
        return
    kind = model.hf.config.model_type
    taken = EXPERT_NAMES.get(
        "mixtral" if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, ""), frozenset()
    )
    for path in dict.fromkeys(site.module_path for delta in deltas for site in delta.spec.sites):
        if path.rpartition(".")[2] in taken:
            raise ValueError(
                f"export: on a model of type {kind!r} PEFT takes targets named {', '.join(sorted(taken))} for its "
                f"experts' parameters, and an adapter of this map would change those; 'merged' and 'delta' export it "
                f"(got {path!r})"
            )


def _groups(deltas: Sequence[EditDelta], each: bool) -> Iterator[list[EditDelta]]:
    """The deltas of one adapter after another, which add up."""
    if not each:
        require_sum(deltas, "each=True writes one adapter an edit")
        yield list(deltas)
        return
    for delta in deltas:
        require_sum([delta], "write one adapter of the whole sequence")
        yield [delta]


def _bytes(factors: Mapping[Site, Factors]) -> int:
    tensors = [tensor for of_site in factors.values() for tensor in (of_site.down, of_site.up)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
