"""Everything about a checkpoint that is known before its weights are read; what is wrong with it is said here."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastedit.smol.names import MODEL as SMOL

from .adapters import check_configuration, has_family
from .checkpoint import CONFIG, Checkpoint, open_checkpoint, reading, stored_tensors
from .completeness import check_weights
from .generic.kinds import auto_class, outside_layers
from .headers import StoredTensor
from .probe_image import check_image
from .processors import complete_processor, load_processor
from .prompts import chat, chat_template
from .quantization import Quantizer, keep_in_float32
from .rendering import check_template_ends, rendered
from .settings import AUTO_DTYPE, DTYPES
from .synthetic.shapes import SHAPES

RANDOM_PREFIX = "random:"
POCKET_PREFIX = "pocket-"
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: What bitsandbytes stores beside a quantized weight, in types of its own.
_SCALES = re.compile(r"\.(?:SCB|weight_format|weight\.(?:absmax|quant_map|quant_state\..*|nested_.*))$")


@dataclass(frozen=True)
class Opened:
    """A checkpoint without its weights.

    Args:
        checkpoint: its files. config: its configuration. processor: complete.
        quantizer: of the model to come. hf: the model on the meta device, in its types, not quantized.
        dtype: of the residual stream. stored: the type to read a quantized checkpoint's other weights in.
    """

    checkpoint: Checkpoint
    config: Any
    processor: Any
    quantizer: Quantizer
    hf: Any
    dtype: torch.dtype
    stored: torch.dtype


def open_model(
    name: str, *, quantize: str, dtype: str | None, keep: Sequence[int | str] = (), chats: bool = True
) -> Opened:
    """Return what is known of a folder, an embedded model or a Hugging Face id before its weights are read.

    Args:
        name, quantize, dtype, keep: as for `load`.
        chats: whether prompts are made by its chat template.
    Raises:
        ValueError, FileNotFoundError, ImportError: what is wrong with it, with file, rule and value.
    """
    from transformers import AutoConfig

    checkpoint = open_checkpoint(name, resolve_name(name))
    with reading(f"no readable configuration (got name_or_path={name!r}): {CONFIG} must be one of transformers"):
        config = AutoConfig.from_pretrained(
            checkpoint.source, local_files_only=checkpoint.local, trust_remote_code=False
        )
    check_configuration(name, config)
    quantization = getattr(config, "quantization_config", None)
    quantizer = Quantizer(quantize, config.model_type, keep, _named_dtype(dtype, config), stored=quantization)
    tensors = stored_tensors(checkpoint)
    stored = _named_dtype(dtype, config)
    if quantization is not None:
        stored = float_dtype(tensors) or stored_dtype(config)
        # Without a type asked for, a checkpoint that is quantized keeps its own
        quantizer.compute = stored if dtype in (None, AUTO_DTYPE) else DTYPES[str(dtype)]
    with reading(f"{CONFIG} of {name!r} must describe a model that transformers can build"), torch.device("meta"):
        hf = auto_class(config).from_config(config, dtype=quantizer.compute)
    if not has_family(config):
        with reading(f"{name!r} must be a model that can be edited"):
            quantizer.skipped += outside_layers(hf)
    keep_in_float32(hf, quantizer.compute)
    check_weights(hf, checkpoint, tensors, quantized=quantization is not None)
    with reading(f"the processor of {name!r} must be one that transformers can build"):
        processor = load_processor(
            checkpoint.source, config.model_type, local_only=checkpoint.local, sees=hasattr(config, "vision_config")
        )
        complete_processor(processor, config, checkpoint)
    if chats and not name.startswith(POCKET_PREFIX):
        _check_chat(name, processor)
    check_image(name, hf, processor)
    return Opened(checkpoint, config, processor, quantizer, hf, quantizer.compute, stored)


def _check_chat(name: str, processor: Any) -> None:
    """Render a question by a stranger's chat template, apart at first."""
    template = chat_template(processor)
    if template is None:
        return
    chats = [chat("What is it?", with_image=with_image) for with_image in (True, False)]
    check_template_ends(template, chats, processor.tokenizer.special_tokens_map)
    with reading(f"the chat template of {name!r} must render a question, or template= must take its place"):
        for messages in chats:
            rendered(processor, messages, template)


def resolve_name(name: str) -> str:
    """Return the folder or Hugging Face id that a name stands for."""
    if Path(name).is_dir():
        return name
    if name.startswith(POCKET_PREFIX):
        from fastedit.pocket import model_path

        return str(model_path(name))
    if name == SMOL:
        from fastedit.smol.models import model_path as smol_path

        return str(smol_path())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    known = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl", SMOL, *(RANDOM_PREFIX + shape for shape in SHAPES))
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        "load: name_or_path must be an embedded model, random:<shape>, a folder that exists, or a Hugging Face id "
        f"owner/name (got name_or_path={name!r}; the nearest known name is {nearest!r})"
    )


def stored_dtype(config: Any) -> torch.dtype:
    """The type that a checkpoint says it was stored in; float32 where it says nothing."""
    for part in (config, getattr(config, "text_config", None)):
        found = getattr(part, "dtype", None)
        if isinstance(found, torch.dtype):
            return found
        if isinstance(found, str) and found in DTYPES:
            return DTYPES[found]
    return torch.float32


def float_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The type of most weights of a quantized checkpoint that are not quantized; None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if tensor.dtype in _STORED_DTYPES and not _SCALES.search(name):
            counts[_STORED_DTYPES[tensor.dtype]] += max(1, _entries(tensor))
    return counts.most_common(1)[0][0] if counts else None


def _entries(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _named_dtype(dtype: str | None, config: Any) -> torch.dtype:
    """The type that an argument asks for, of a checkpoint that is not quantized."""
    if dtype is None:
        return stored_dtype(config)
    return torch.float32 if dtype == AUTO_DTYPE else DTYPES[dtype]
