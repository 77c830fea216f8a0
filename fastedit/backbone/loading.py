"""`load`: from a name to an editable model, every mistake in the arguments refused before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastedit.ops import release_workspaces

from .adapters import input_place, make_adapter
from .checkpoint import reading
from .completeness import check_loaded
from .cpu_linear import LINEAR, choose_linear, use_onednn
from .device_map import DeviceMap, checked_map, offloading
from .generic.kinds import auto_class
from .model import EditableModel
from .opening import RANDOM_PREFIX, open_model, resolve_name
from .patches import use_products
from .placement import look_up_late
from .prompts import check_template
from .quantization import QUANTIZATIONS, Quantizer
from .settings import (
    ATTENTIONS,
    AUTO_DTYPE,
    DTYPES,
    check_choice,
    check_dtype,
    checked_device,
    default_device,
    settled_dtype,
)
from .synthetic.models import make_random
from .synthetic.shapes import SHAPES

__all__ = ["DTYPES", "RANDOM_PREFIX", "check_choice", "default_device", "end_tokens", "load", "resolve_name"]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    quantize: str = "none",
    dtype: str | None = AUTO_DTYPE,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    attention: str | None = None,
    template: str | None = None,
    keep: Sequence[int | str] = (),
    seed: int = 0,
    image_cache_mib: int = 1024,
    state_cache_mib: int = 256,
    linear: str = "auto",
) -> EditableModel:
    """Return a frozen multimodal model that can be edited.

    Args:
        name_or_path: an embedded model ("pocket-llava", "smol-llava"), "random:SHAPE" (a stock configuration with
            random weights), a local folder, or a Hugging Face id. Only safetensors are read; code from a checkpoint is
            never run.
        quantize: "none", "nf4" or "int8" (bitsandbytes) for the decoder's linear maps; head, vision side and
            projector are left as they are. A checkpoint that is already quantized keeps its own.
        dtype: "float32", "bfloat16", "float16", "float64", or None for what the checkpoint was stored in. "auto" is
            float32 on a CPU, and elsewhere what the checkpoint was stored in, as it is where that is already quantized.
        device: None is the first GPU where there is one, else the CPU.
        device_map: for a model that does not fit one device (needs accelerate): "auto" fills the GPUs, then host
            memory, then the disk; or devices, "cpu" or "disk" by module path, "" for the rest. Layers run where they
            are; those in host memory beside a GPU, or on disk, are brought to a device for each call.
        max_memory: bytes or "10GiB" by a GPU's number and "cpu", which "auto" may fill; None is what is free.
        offload_folder: for weights on disk that are in the checkpoint in another form (experts): written there, and
            removed with the model. Other weights on disk are read from the checkpoint's own files.
        attention: attention implementation of transformers; None is its default.
        template: prompt text around the question, "Question: {} Short answer:"; None is the processor's chat template
            where it has one, else the bare question.
        keep: what stays unquantized besides: decoder layers by number, modules by dotted path.
        seed: of random weights.
        image_cache_mib: memory for image features, and as much for preprocessed images.
        state_cache_mib: memory on the device for prefix states of locality questions, and as much for their reference
            logits. What no longer fits, of this and of image features, goes to as much host memory, then is made again.
        linear: who multiplies frozen float32 weights on a CPU: "torch", "onednn", or "auto", which takes oneDNN where
            torch's own library does not use the processor's full width (AVX-512 that is not Intel's).
    Raises:
        ValueError, FileNotFoundError, ImportError: what is wrong, with the value, the rule and the nearest known name.
    """
    name = os.fspath(name_or_path)
    check_choice("quantize", quantize, QUANTIZATIONS)
    check_dtype(dtype)
    if attention is not None:
        check_choice("attention", attention, ATTENTIONS)
    check_choice("linear", linear, LINEAR)
    check_template(template)
    for field, budget in (("image_cache_mib", image_cache_mib), ("state_cache_mib", state_cache_mib)):
        if budget < 0:
            raise ValueError(f"load: {field} must not be negative (got {field}={budget})")
    spread = checked_map(device_map, device, max_memory, offload_folder, name)
    place = checked_device(device) if spread is None else spread.device
    dtype = settled_dtype(dtype, place)
    named = DTYPES.get(dtype or AUTO_DTYPE, torch.float32)
    choose_linear(linear, named, place)
    # Parameters made in inference mode could never be part of a graph
    with torch.inference_mode(False):
        if name.startswith(RANDOM_PREFIX):
            hf, processor, quantizer = _make_random(name, quantize, named, place, attention, keep, seed)
        else:
            target = place if spread is None else spread
            hf, processor, quantizer = _load_checkpoint(name, quantize, dtype, target, attention, keep, template)
        model = _editable(hf, processor, quantizer, name, template, place, linear, image_cache_mib, state_cache_mib)
    model.loaded_with = {
        "quantize": quantize, "dtype": dtype, "device": str(place) if spread is None else None,
        "device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder, "attention": attention,
        "template": template, "keep": keep, "seed": seed, "image_cache_mib": image_cache_mib,
        "state_cache_mib": state_cache_mib, "linear": linear,
    }  # fmt: skip
    return model


def _make_random(
    name: str,
    quantize: str,
    dtype: torch.dtype,
    place: torch.device,
    attention: str | None,
    keep: Sequence[int | str],
    seed: int,
) -> tuple[Any, Any, Quantizer]:
    """Draw a model of a shape."""
    shape_name = name.removeprefix(RANDOM_PREFIX)
    check_choice("random shape", shape_name, tuple(SHAPES))
    quantizer = Quantizer(quantize, SHAPES[shape_name].model_type, keep, dtype)
    convert = quantizer.convert if quantizer.active else None
    hf, processor = make_random(shape_name, dtype=dtype, device=place, attention=attention, seed=seed, convert=convert)
    return hf, processor, quantizer


def _editable(
    hf: Any,
    processor: Any,
    quantizer: Quantizer,
    name: str,
    template: str | None,
    place: torch.device,
    linear: str,
    image_cache_mib: int,
    state_cache_mib: int,
) -> EditableModel:
    """Make a model editable that is in memory."""
    quantizer.cure(hf)
    multiplied_by = choose_linear(linear, _float_dtype(hf), place)
    if multiplied_by == "onednn":
        use_onednn(hf)
    if linear != "torch":
        use_products(hf)
    # What reading and quantizing weights left behind
    release_workspaces()
    return EditableModel(
        hf,
        processor,
        make_adapter(hf, processor),
        name=name,
        quantize=quantizer.kind,
        dtype=_float_dtype(hf),
        template=template,
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=image_cache_mib,
        state_cache_mib=state_cache_mib,
        linear=multiplied_by,
    )


def _load_checkpoint(
    name: str,
    quantize: str,
    dtype: str | None,
    place: torch.device | DeviceMap,
    attention: str | None,
    keep: Sequence[int | str],
    template: str | None,
) -> tuple[Any, Any, Quantizer]:
    """Load model and processor of a folder, an embedded model or a Hugging Face id."""
    opened = open_model(name, quantize=quantize, dtype=dtype, keep=keep, chats=template is None)
    checkpoint, quantizer = opened.checkpoint, opened.quantizer
    options: dict[str, Any] = {"dtype": opened.stored}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantizer.active and not quantizer.is_stored:
        options["quantization_config"] = quantizer.config(opened.hf)
    spread = place.settled(opened.hf, quantized=quantizer.active) if isinstance(place, DeviceMap) else None
    if isinstance(place, torch.device) and (quantizer.active or place.type != "cpu"):
        # Straight to the device; needs accelerate, which a plain model on the CPU does not.
        options["device_map"] = {"": place}
    with (
        reading(f"the weights of {name!r} must be readable"),
        without_bars() if checkpoint.local else nullcontext(),
        offloading(spread) as (folder, owner),
    ):
        hf, info = auto_class(opened.config).from_pretrained(
            checkpoint.source,
            local_files_only=checkpoint.local,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **({} if spread is None else spread.options(folder)),
        )
        owner.append(hf)
    check_loaded(hf, checkpoint, info)
    look_up_late(hf)
    if quantizer.is_stored:
        quantizer.check(hf)
        quantizer.settle(hf, opened.stored)
    return hf, opened.processor, quantizer


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bar over weights: only a download takes long enough for one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _float_dtype(hf: nn.Module) -> torch.dtype:
    """The type of the word embeddings, which is that of the residual stream."""
    return input_place(hf.get_input_embeddings(), hf)[1]  # type: ignore[operator]


def end_tokens(hf: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a generated answer, the tokenizer's own end token first where it is among them.

    Raises:
        ValueError: there is none, or one that the model has no embedding for.
    """
    ends: Any = None
    for config in (getattr(hf, "generation_config", None), getattr(hf.config, "text_config", None), hf.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            break
    standard = tokenizer.eos_token_id
    listed = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if listed in ([], [None]):
        listed = [standard]
    rows = int(hf.get_input_embeddings().weight.shape[0])
    for token in listed:
        if type(token) is not int or not 0 <= token < rows:
            rule = f"eos_token_id must be tokens of the model, 0 to {rows - 1}"
            raise ValueError(f"load: {rule}, in generation_config.json or else in config.json (got {token!r})")
    return sorted(dict.fromkeys(listed), key=lambda token: token != standard)
