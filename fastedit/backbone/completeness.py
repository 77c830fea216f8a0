"""Whether a checkpoint holds what its configuration asks for: every weight, in its shape."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .headers import StoredTensor
from .placement import is_kept

#: Types of weights that are no codes.
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
#: Names in a message; the rest are counted.
_SHOWN = 4
#: What bitsandbytes stores beside a weight of 4 and of 8 bits: the suffixes that every one has.
_BESIDE_4_BIT, _BESIDE_8_BIT = ("absmax", "quant_map"), ("SCB",)


def check_weights(hf: Any, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor], *, quantized: bool) -> None:
    """Refuse a checkpoint whose files lack weights of a model, or hold some in another shape.

    Args:
        hf: the model that the configuration asks for, on the meta device. tensors: of the files, by name.
        quantized: whether the files hold linear maps as bitsandbytes packs them.
    Raises:
        ValueError: names the weights, how many they are, and entries of the configuration that ask for such shapes.
    """
    try:
        stored = dict(_renamed(hf, tensors))
    except (ImportError, AttributeError, TypeError):
        # A version of the library that renames by other means: `check_loaded` then says what was missing
        return
    expected = {name: tuple(tensor.shape) for name, tensor in hf.state_dict().items()}
    missing = set(expected) - set(stored)
    mismatched = [
        (name, stored[name].shape, shape)
        for name, shape in expected.items()
        if name in stored and not _fits(stored[name], shape, quantized)
    ]
    codes = [name for name in expected if name in stored and stored[name].dtype not in FLOATS]
    if quantized:
        missing |= _without_scales(expected, stored, tensors)
        if not codes:
            rule = "quantization_config must be absent from config.json where no weight is quantized"
            raise ValueError(
                f"load: {checkpoint.source!r}: {rule} (got {len(tensors)} tensors of floating-point types)"
            )
    elif codes and not mismatched:
        rule = "weights must be of floating-point types where config.json has no quantization_config"
        raise ValueError(f"load: {checkpoint.source!r}: {rule} (got {stored[codes[0]].dtype} of {_some(codes)})")
    refuse(hf, checkpoint, _untied(hf, missing, stored), mismatched, set(stored) - set(expected))


def check_loaded(hf: Any, checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """The same of a model that the library has loaded, by its own account; unexpected weights are told as a warning."""
    missing = set(info.get("missing_keys", ())) | {
        name for name, part in hf.named_parameters() if part.is_meta and not is_kept(hf, name)
    }
    mismatched = [(name, tuple(got), tuple(wanted)) for name, got, wanted in info.get("mismatched_keys", ())]
    unexpected = set(info.get("unexpected_keys", ()))
    refuse(hf, checkpoint, missing, mismatched, unexpected)
    if unexpected:
        warnings.warn(
            f"load: {checkpoint.source!r} has {len(unexpected)} weights that its configuration has no place for, "
            f"which are left out: {_some(unexpected)}",
            stacklevel=5,
        )


def refuse(
    hf: Any,
    checkpoint: Checkpoint,
    missing: Iterable[str],
    mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
    unexpected: Iterable[str],
) -> None:
    """Raise one error that names what is missing and what has another shape, if anything is."""
    absent, wrong, more = sorted(missing), sorted(mismatched), sorted(unexpected)
    if wrong:
        shapes = "; ".join(
            f"{name}: {got} in the file, {wanted} by the configuration{_asked_by(hf.config, got, wanted)}"
            for name, got, wanted in wrong[:_SHOWN]
        )
        rule = f"{len(wrong)} weights must have the shapes that config.json asks for"
        raise ValueError(f"load: {checkpoint.source!r}: {rule} (got {shapes}{'; ...' if len(wrong) > _SHOWN else ''})")
    if absent:
        others = f"; it has {len(more)} that the model has no place for: {_some(more)}" if more else ""
        rule = "a checkpoint must hold every weight of its model"
        got = f"{len(absent)} missing: {_some(absent)}{others}"
        raise ValueError(f"load: {checkpoint.source!r}: {rule} (got {got})")


def _renamed(hf: Any, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of the files under the names that the model has for them, as the library renames on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(hf)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    expected, prefix = hf.state_dict(), hf.base_model_prefix
    for name, tensor in tensors.items():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if pattern is None:
            yield renamed, tensor
            continue
        # Parts of weights, or several in one: the library sees to their shapes
        first = by_pattern[pattern].target_patterns[0]
        for target in by_pattern[pattern].target_patterns:
            name = renamed.replace(first, target)
            if name in expected:
                yield name, StoredTensor(tensor.dtype, tuple(expected[name].shape), tensor.file)


def _fits(stored: StoredTensor, shape: tuple[int, ...], quantized: bool) -> bool:
    """Whether a stored tensor can be the weight of a shape; of 4-bit weights only the number of entries is known."""
    if stored.shape == shape:
        return True
    packed = quantized and stored.dtype in ("U8", "BF16", "F16", "F32") and len(shape) == 2
    width = {"U8": 2, "BF16": 4, "F16": 4, "F32": 8}.get(stored.dtype, 1)
    return packed and stored.shape[1:] == (1,) and stored.shape[0] == math.ceil(math.prod(shape) / width)


def _without_scales(
    expected: Mapping[str, Any], stored: Mapping[str, StoredTensor], tensors: Mapping[str, StoredTensor]
) -> set[str]:
    """Names of what belongs beside quantized weights and is absent."""
    absent: set[str] = set()
    for name in expected:
        tensor = stored.get(name)
        if tensor is None or not name.endswith(".weight"):
            continue
        if tensor.dtype == "I8":
            absent |= {name[: -len("weight")] + end for end in _BESIDE_8_BIT} - set(stored) - set(tensors)
        elif tensor.shape[1:] == (1,) and tensor.shape != expected[name]:
            absent |= {f"{name}.{end}" for end in _BESIDE_4_BIT} - set(stored) - set(tensors)
            if not any(key.startswith(f"{name}.quant_state.") for key in stored):
                absent.add(f"{name}.quant_state")
    return absent


def _untied(hf: Any, missing: set[str], stored: Mapping[str, Any]) -> set[str]:
    """Without the weights that the library takes from others that are there."""
    tied: dict[str, str] = getattr(hf, "all_tied_weights_keys", None) or {}
    present = {name for pair in tied.items() for name in pair if set(pair) & set(stored)}
    ignored = [re.compile(pattern) for pattern in getattr(hf, "_keys_to_ignore_on_load_missing", None) or ()]
    return {name for name in missing - present if not any(pattern.search(name) for pattern in ignored)}


def _asked_by(config: Any, got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Entries of a configuration that are the sizes which differ."""
    sizes = (
        set(wanted) - set(got) if len(got) != len(wanted) else {b for a, b in zip(got, wanted, strict=True) if a != b}
    )
    found: list[str] = []
    waiting: list[tuple[str, Any]] = [("", config.to_dict())]
    while waiting:
        place, value = waiting.pop()
        for key, part in value.items():
            name = f"{place}.{key}" if place else str(key)
            if isinstance(part, dict):
                waiting.append((name, part))
            elif type(part) is int and part in sizes:
                found.append(f"{name}={part}")
    return f" with {', '.join(sorted(found)[:3])}" if found else ""


def _some(names: Iterable[str]) -> str:
    """The first few names, and that there are more."""
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")
