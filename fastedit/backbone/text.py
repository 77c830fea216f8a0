"""Which decoder walk serves which text model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .opt import LearnedPositionStack
from .rotary import RotaryStack
from .stacks import TextStack

#: Text models by the name that their configuration carries.
TEXT_STACKS: dict[str, type[RotaryStack] | type[LearnedPositionStack]] = {
    "llama": RotaryStack,
    "mistral": RotaryStack,
    "qwen2": RotaryStack,
    "qwen3": RotaryStack,
    "qwen2_vl_text": RotaryStack,
    "qwen2_5_vl_text": RotaryStack,
    "qwen3_vl_text": RotaryStack,
    "opt": LearnedPositionStack,
}


def text_stack(root: nn.Module) -> TextStack:
    """Return the stack that walks a text model.

    Raises:
        ValueError: the text model is of a kind that is not known here.
    """
    config: Any = root.config
    check_text(config.model_type)
    return TEXT_STACKS[config.model_type](root)


def check_text(kind: object) -> None:
    """Refuse a text model by the name that its configuration carries.

    Raises:
        ValueError: it is not known here.
    """
    if not isinstance(kind, str) or kind not in TEXT_STACKS:
        known = ", ".join(sorted(TEXT_STACKS))
        raise ValueError(f"the text model must be one of {known} (got model_type={kind!r})")
