"""`wrap`: an editable model around one that is in memory, a trainer's or a pipeline's, which stays what it is."""

from __future__ import annotations

from typing import Any

from .adapters import check_configuration, make_adapter
from .loading import _float_dtype, end_tokens
from .model import EditableModel
from .processors import PartsProcessor
from .quantization import _stored_kind


def wrap(
    hf_model: Any,
    processor: Any,
    *,
    name: str | None = None,
    template: str | None = None,
    image_cache_mib: int = 1024,
    state_cache_mib: int = 256,
) -> EditableModel:
    """Return an editable model around a Hugging Face model that is in memory.

    Nothing of the model changes but inside of calls, which put it into eval mode and compute no gradients of its
    parameters: training mode, ``requires_grad``, hooks, configuration and weights are afterwards what they were. What
    is remembered of it is dropped once its weights were changed in place, by a trainer for example.

    Args:
        hf_model: an image-text model, or a causal model of text alone, quantized by bitsandbytes or not; or a PEFT
            model around one, whose active adapters are then part of the base model.
        processor: of the model, with ``image_processor`` and ``tokenizer``; of a model of text alone its tokenizer.
        name: for messages; None is that of the configuration.
        template, image_cache_mib, state_cache_mib: see ``fastedit.load``.
    Raises:
        TypeError: not a Hugging Face model, or no processor of one.
        ValueError: a model that cannot be edited; says why.
    """
    hf = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    if not hasattr(getattr(hf, "config", None), "model_type"):
        raise TypeError(f"wrap: hf_model must be a model of transformers (got a {type(hf_model).__name__})")
    if not hasattr(hf.config, "vision_config") and hasattr(processor, "convert_tokens_to_ids"):
        processor = PartsProcessor(None, processor, getattr(processor, "chat_template", None))
    for part in ("image_processor", "tokenizer"):
        if not hasattr(processor, part):
            raise TypeError(f"wrap: processor must have an {part} (got a {type(processor).__name__})")
    shown = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
    check_configuration(shown, hf.config)
    return EditableModel(
        hf,
        processor,
        make_adapter(hf, processor),
        name=shown,
        quantize=_stored_kind(getattr(hf.config, "quantization_config", None)) or "none",
        dtype=_float_dtype(hf),
        template=template,
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=image_cache_mib,
        state_cache_mib=state_cache_mib,
        owned=False,
    )
