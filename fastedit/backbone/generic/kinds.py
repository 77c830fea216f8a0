"""What is known of a model without a family from its configuration: whether it can be walked, and what makes it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from .cross import reads_encoder
from .decoder import find_decoder, layers_of
from .encoder import ENCODER_TEXTS


def check_kind(config: Any) -> None:
    """Refuse what the configuration alone tells cannot be walked.

    Raises:
        ValueError: names the model type and the rule, and the nearest model type that transformers can build.
    """
    text = config.get_text_config()
    if (reads_encoder(config) or reads_encoder(text)) and text.model_type not in ENCODER_TEXTS:
        raise ValueError(
            "load: a model must have a decoder-only text model, in which prompt and answer are one sequence, or T5 "
            f"(got model_type={config.model_type!r} with the text model {text.model_type!r})"
        )
    known = _model_types()
    if config.model_type not in known:
        nearest = difflib.get_close_matches(config.model_type, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            "load: model_type must be one that transformers makes an image-text or a causal language model of "
            f"(got model_type={config.model_type!r}; the nearest is {nearest!r})"
        )


def check_forward(hf: Any, of_prompt: Collection[str]) -> None:
    """Refuse a model whose stock forward needs more than tokens and an image.

    Args:
        of_prompt: what else its processor makes of a prompt.
    Raises:
        ValueError: names what it needs.
    """
    needed = [
        name
        for name, parameter in inspect.signature(hf.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and name not in ("input_ids", "pixel_values", *of_prompt)
    ]
    if needed:
        raise ValueError(
            "load: a model's forward must need no more than tokens and an image "
            f"(got {', '.join(needed)} besides for model_type={hf.config.model_type!r})"
        )


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of a configuration: with images where it has any."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in _image_types() else AutoModelForCausalLM


def outside_layers(hf: nn.Module) -> list[str]:
    """Paths of the linear maps that are not inside of a decoder layer; they are never quantized."""
    root = find_decoder(hf)
    inside = {id(module) for module in (layers_of(root) or nn.ModuleList()).modules()}
    return [path for path, module in hf.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside]


def _image_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(_image_types() | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
