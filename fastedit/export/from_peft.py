"""A LoRA adapter of PEFT, whoever trained it, as a delta: to be applied, routed, scored and undone like any other."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.backbone import EditableModel, Site
from fastedit.backbone.json_files import read_object
from fastedit.backbone.vision import vision_sites
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.export.peft import CONFIG_FILE, INDEX_FILE, PREFIX, WEIGHTS_FILE
from fastedit.files import require_finite

#: Fields that say how a change is stored, trained or begun, or that are read below: whatever they hold is served.
_SERVED = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"}
)
#: What the others hold where they change nothing.
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {}, "")
#: Beginnings of factors that leave the base model's weights as they are; others move a part of them into the factors.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Of a stranger's pattern: what can make it take for ever, and how many repeats take moments on a module's path
_SLOW = re.compile(r"(?<!\\)\)[*+{]|\\[1-9]|\(\?P=")
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_MOST_REPEATS = 6
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")


def from_peft(folder: str | Path, model: EditableModel, *, request_id: str | None = None) -> EditDelta:
    """Return a LoRA adapter that PEFT saved as a delta of kind "low_rank".

    Modules of different ranks are filled up to the largest, and alpha (over r, or over its root for rsLoRA, each by its
    pattern) is folded into the second factor. Nothing of the folder is executed: only safetensors and JSON are read.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: that it was trained on. Its linear maps in decoder layers, and those between vision tower and decoder,
            can be an adapter's.
        request_id: of the delta; None is the folder's name.
    Returns:
        A delta of the model as it is now, float32, or float64 on a model of that.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are not whole; an adapter that does more than LoRA beside linear maps (DoRA, biases,
            modules saved whole, embeddings, experts' parameters ...), or one beside maps that the model does not have;
            says which.
    """
    folder = Path(folder)
    config = _config(folder)
    tensors = _tensors(folder)
    names = {name for name, _ in model.hf.named_modules()}
    sites = _sites(model)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    factors: dict[Site, tuple[Tensor, Tensor]] = {}
    for written, (down, up) in tensors.items():
        path = written if written in names else _renamed(model, written)
        site = sites.get(path)
        if site is None:
            raise ValueError(_no_site(model, names, path, written))
        if not (_is_target(config, path) or _is_target(config, written)):
            raise ValueError(
                f"from_peft: every module with factors is a target of {CONFIG_FILE} (got {written!r}, which "
                f"target_modules={config.get('target_modules')!r:.200} leaves out)"
            )
        scale = _scale(config, path, written, int(down.shape[0]))
        if tuple(down.shape[1:]) != (site.d_in,) or tuple(up.shape) != (site.d_out, down.shape[0]):
            raise ValueError(
                f"from_peft: factors fit the map of the model, A (r, {site.d_in}) and B ({site.d_out}, r) (got "
                f"{tuple(down.shape)} and {tuple(up.shape)} of {written!r})"
            )
        factors[site] = down.to(dtype).T, up.to(dtype).T * scale
    return _delta(model, factors, folder.name if request_id is None else request_id)


def _delta(model: EditableModel, factors: Mapping[Site, tuple[Tensor, Tensor]], request_id: str) -> EditDelta:
    rank = max(int(down.shape[1]) for down, _ in factors.values())
    parts: dict[str, Tensor] = {}
    chosen = sorted(factors, key=lambda site: (site.layer, site.name))
    for site in chosen:
        down, up = factors[site]
        missing = rank - int(down.shape[1])
        parts[f"{site.layer}.{site.name}:down"] = F.pad(down, (0, missing)).contiguous()
        parts[f"{site.layer}.{site.name}:up"] = F.pad(up, (0, 0, 0, missing)).contiguous()
    spec = DeltaSpec("low_rank", tuple(chosen), {"rank": rank, "scale": 1.0})
    return EditDelta(spec, parts, model.fingerprint, request_id, fitted_on=())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        several = f"; it holds adapters in folders, which {INDEX_FILE} lists" if (folder / INDEX_FILE).is_file() else ""
        raise FileNotFoundError(f"from_peft: the folder has {CONFIG_FILE} (got folder={str(folder)!r}){several}")
    config = read_object(path, plain_numbers=True)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"from_peft: the adapter is one of LoRA (got peft_type={kind!r:.40} in {str(path)!r})")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise ValueError(
            f"from_peft: factors stand beside the base model's own weights, and init_lora_weights={init!r:.40} moves a "
            f"part of those into them; PEFT converts it on saving with path_initial_model_for_weight_conversion (got "
            f"{str(path)!r})"
        )
    for field, value in config.items():
        if field not in _SERVED and value not in _NOTHING:
            raise ValueError(
                f"from_peft: a delta is LoRA beside linear maps and nothing else, and {field} does more (got "
                f"{field}={value!r:.80} in {str(path)!r})"
            )
    for field, kind, words in (
        ("target_modules", str, "text"),
        ("exclude_modules", str, "text"),
        ("layers_pattern", str, "text"),
        ("layers_to_transform", int, "a whole number"),
    ):
        value = config.get(field)
        if value is not None and not all(
            type(each) is kind for each in (value if isinstance(value, list) else [value])
        ):
            raise ValueError(f"from_peft: {field} is {words}, a list of such or null (got {field}={value!r:.80})")
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        config[pattern] = config.get(pattern) or {}
        if not isinstance(config[pattern], dict):
            raise ValueError(f"from_peft: {pattern} is a mapping (got {config[pattern]!r:.80} in {str(path)!r})")
        for value in (config.setdefault(field, 8), *config[pattern].values()):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"from_peft: {field} is a number (got {field}={value!r:.40} in {str(path)!r})")
    return config


def _tensors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors (r, d_in), (d_out, r) by the path of their module."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()), None)
        if pickled is not None:
            raise ValueError(
                f"from_peft: weights are read from {WEIGHTS_FILE}, and {pickled} is a pickle, which can execute code; "
                f"PEFT writes it anew with save_pretrained(..., safe_serialization=True) (got folder={str(folder)!r})"
            )
        raise FileNotFoundError(f"from_peft: the folder has {WEIGHTS_FILE} (got folder={str(folder)!r})")
    try:
        with safe_open(str(file), framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"from_peft: a whole safetensors file (got {error} in path={str(file)!r})") from error
    require_finite(stored, "from_peft", f"the file {str(file)!r}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        parsed = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if parsed is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                "from_peft: tensors are lora_A.weight and lora_B.weight of linear maps, matrices of real numbers (got "
                f"{name!r} of shape {tuple(tensor.shape)} and {tensor.dtype})"
            )
        pairs.setdefault(parsed["path"], {})[parsed["factor"]] = tensor
    for path, pair in pairs.items():
        if len(pair) < 2:
            raise ValueError(f"from_peft: modules have both factors (got lora_{next(iter(pair))} alone of {path!r})")
    if not pairs:
        raise ValueError(f"from_peft: the adapter has factors (got none in path={str(file)!r})")
    return {path: (pair["A"], pair["B"]) for path, pair in pairs.items()}


def _sites(model: EditableModel) -> dict[str, Site]:
    """Every map that a delta can stand beside, by its path."""
    found: list[Site] = []
    for layer in range(model.n_layers):
        found += model.sites([layer], list(model.adapter.text.paths_of(layer)))
    if model.adapter.vision_linears():
        found += vision_sites(model)
    # A block of experts is no map of its own
    return {site.module_path: site for site in found if hasattr(model.module(site), "in_features")}


def _renamed(model: EditableModel, path: str) -> str:
    """The path as the installed transformers calls it, of one that an earlier release called otherwise."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return path
    name = f"{path}.weight"
    for each in get_model_conversion_mapping(model.hf):
        if isinstance(each, WeightRenaming):
            name = each.rename_source_key(name)[0]
    return name.removesuffix(".weight")


def _no_site(model: EditableModel, names: set[str], path: str, written: str) -> str:
    if path in names:
        kind = type(model.hf.get_submodule(path)).__name__
        why = f"got {written!r}, a {kind} that is none of these"
    else:
        why = f"got {written!r}, and the model has no such module"
    maps = ", ".join(sorted(set(model.adapter.text.paths_of(0).values())))
    return (
        f"from_peft: an adapter stands beside linear maps of decoder layers, in {model.name} {maps}, or between vision "
        f"tower and decoder ({why})"
    )


def _scale(config: Mapping[str, Any], path: str, written: str, rank: int) -> float:
    """What the product of a module's factors is multiplied by."""
    expected = _of_pattern(config["rank_pattern"], path, written, config["r"])
    if expected != rank:
        raise ValueError(
            f"from_peft: the rank of a module is that of {CONFIG_FILE} (got factors of rank {rank} for {written!r}, "
            f"whose r is {expected})"
        )
    alpha = float(_of_pattern(config["alpha_pattern"], path, written, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_pattern(pattern: Mapping[str, Any], path: str, written: str, default: Any) -> Any:
    """PEFT's rule: the first key that a path ends in, as a pattern."""
    for name in dict.fromkeys((path, written)):
        for key, value in pattern.items():
            if _matches(rf"(?:.*\.)?(?:{_checked(key)})", name):
                return value
    return default


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """PEFT's rule: a whole path by a pattern, or its end by one of a list; of the layers that are named."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if _is_named(config.get("exclude_modules") or [], path) or not targets:
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or _matches(targets, path)
    if not _is_named(targets, path):
        return False
    if layers is None or path in targets:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for each in [patterns] if isinstance(patterns, str) else patterns:
        index = re.match(rf"(?:^|.*?\.){_checked(each)}\.(\d+)\.", path)
        if index is not None:
            return int(index[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _is_named(names: Any, path: str) -> bool:
    if isinstance(names, str):
        return _matches(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(_checked(pattern), path) is not None


@functools.lru_cache(maxsize=1024)
def _checked(pattern: str) -> str:
    """A pattern of a stranger, which may not take long."""
    repeats = len(_REPEAT.findall(pattern))
    if _SLOW.search(pattern) or repeats > _MOST_REPEATS:
        raise ValueError(
            f"from_peft: patterns of {CONFIG_FILE} repeat no groups, refer to none, and repeat at most {_MOST_REPEATS} "
            f"times (got {pattern!r:.200})"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"from_peft: patterns of {CONFIG_FILE} are regular (got {pattern!r:.80}: {error})") from None
    return pattern
