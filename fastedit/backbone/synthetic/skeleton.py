"""A model without its weights: the modules of a configuration on the meta device, and the bytes they would take."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import make_adapter
from ..loading import end_tokens
from ..model import EditableModel
from ..opening import RANDOM_PREFIX, open_model
from ..quantization import QUANTIZATIONS, Quantizer
from ..settings import AUTO_DTYPE, DTYPES, check_choice, check_dtype
from .models import EmptyOnMeta, make_config
from .processors import made_up_processor
from .shapes import SHAPES

# nf4: two entries a byte, one scale for so many
_NF4_BLOCK = 64
# and where the scales are quantized too, a byte each, one scale of scales for so many
_NESTED_BLOCK = 256


def skeleton(
    name_or_path: str | os.PathLike[str],
    *,
    quantize: str = "none",
    dtype: str | None = AUTO_DTYPE,
    template: str | None = None,
    image_cache_mib: int = 1024,
) -> tuple[EditableModel, int]:
    """Return the model that `load` would return, on the meta device, and the bytes that its weights would take.

    Of a checkpoint only the configuration and the processor are read. Shapes, sites and the sizes of encoded rows can
    be asked of the model; it cannot compute.

    Args:
        name_or_path, quantize, dtype, template, image_cache_mib: as for `load`.
    Raises:
        ValueError, FileNotFoundError, ImportError: as `load` does.
    """
    name = os.fspath(name_or_path)
    check_choice("quantize", quantize, QUANTIZATIONS)
    check_dtype(dtype)
    nested = False
    if name.startswith(RANDOM_PREFIX):
        compute = DTYPES.get(dtype or AUTO_DTYPE, torch.float32)
        hf, processor, quantizer = _random(name, quantize, compute)
    else:
        opened = open_model(name, quantize=quantize, dtype=dtype, chats=template is None)
        hf, processor, quantizer, compute = opened.hf, opened.processor, opened.quantizer, opened.dtype
        nested = _nested(getattr(opened.config, "quantization_config", None))
    model = EditableModel(
        hf,
        processor,
        make_adapter(hf, processor),
        name=name,
        quantize=quantizer.kind,
        dtype=compute,
        template=template,
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=image_cache_mib,
    )
    return model, _planned_bytes(hf, quantizer, nested=nested)


def _random(name: str, quantize: str, dtype: torch.dtype) -> tuple[Any, Any, Quantizer]:
    """The parts of a model with random weights that is not drawn."""
    from transformers import AutoModelForImageTextToText

    shape_name = name.removeprefix(RANDOM_PREFIX)
    check_choice("random shape", shape_name, tuple(SHAPES))
    processor = made_up_processor(SHAPES[shape_name])
    with EmptyOnMeta():
        hf = AutoModelForImageTextToText.from_config(make_config(SHAPES[shape_name], processor), dtype=dtype)
    return hf.to("meta"), processor, Quantizer(quantize, SHAPES[shape_name].model_type, (), dtype)


def weight_bytes(hf: nn.Module, device: torch.device | None = None) -> int:
    """Return the bytes of a loaded model: parameters and buffers, tied ones once, and scales of quantized maps.

    Args:
        device: what is elsewhere does not count; None is everywhere.
    """
    parts = [*hf.parameters(), *hf.buffers()]
    for module in hf.modules():
        parts += _scales(module)
    return sum(_nbytes(part) for part in parts if device in (None, part.device))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _scales(module: Any) -> list[Tensor]:
    """What bitsandbytes keeps beside a quantized weight."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        second = getattr(state, "state2", None)
        return [state.absmax] if second is None else [state.absmax, second.absmax]
    # the first forward moves the row scales of 8-bit maps from the weight to the module
    found = [getattr(owner, "SCB", None) for owner in (weight, getattr(module, "state", None))]
    return [scale for scale in found if isinstance(scale, Tensor)][:1]


def _planned_bytes(hf: nn.Module, quantizer: Quantizer, *, nested: bool) -> int:
    """The same for a model that is not loaded."""
    total = sum(_nbytes(part) for part in (*hf.parameters(), *hf.buffers()))
    if not quantizer.active:
        return total
    for path, module in hf.named_modules():
        if type(module) is nn.Linear and not quantizer.skips(path):
            weight = module.weight
            total += _packed_bytes(quantizer.kind, weight.numel(), weight.shape[0], nested) - _nbytes(weight)
    return total


def _packed_bytes(kind: str, count: int, rows: int, nested: bool) -> int:
    if kind == "int8":
        return count + 4 * rows
    blocks = math.ceil(count / _NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) if nested else 4 * blocks
    return math.ceil(count / 2) + scales


def _nested(stored: Any) -> bool:
    """Whether a stored 4-bit checkpoint quantizes its scales as well."""
    if stored is None:
        return False
    entries = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(entries.get("bnb_4bit_use_double_quant", False))
