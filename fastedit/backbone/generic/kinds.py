"""What is known of a model without a family from its configuration: whether it can be walked, and what makes it."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from .decoder import find_decoder


def check_kind(config: Any) -> None:
    """Refuse what the configuration alone tells cannot be walked.

    Raises:
        ValueError: names the model type and the rule, and the nearest model type that transformers can build.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ValueError(
            "load: a model must have a decoder-only text model, in which prompt and answer are one sequence "
            f"(got model_type={config.model_type!r} with the text model {text.model_type!r})"
        )
    known = _model_types()
    if config.model_type not in known:
        nearest = difflib.get_close_matches(config.model_type, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            "load: model_type must be one that transformers makes an image-text or a causal language model of "
            f"(got model_type={config.model_type!r}; the nearest is {nearest!r})"
        )


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of a configuration: with images where it has any."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in _image_types() else AutoModelForCausalLM


def outside_layers(hf: nn.Module) -> list[str]:
    """Paths of the linear maps that are not inside of a decoder layer; they are never quantized."""
    root = find_decoder(hf)
    layers: Any = root.layers
    inside = {id(module) for module in layers.modules()}
    return [path for path, module in hf.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside]


def _image_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(_image_types() | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
