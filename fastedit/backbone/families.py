"""The families with a fast path, one row each: all that is written of a family outside of its own module.

A new fast path is a module and a row here, and a shape in ``synthetic/shapes.py`` for its tests.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What is known of a model type.

    Args:
        adapter: module of this package and class.
        image_processor: folder of transformers' models and class, of the one that needs no video library.
        unquantized: paths of parts that stay as they are: the head, the vision side and what joins it to the decoder.
    """

    adapter: tuple[str, str]
    image_processor: tuple[str, str]
    unquantized: tuple[str, ...]

    def adapter_class(self) -> Any:
        """The class, imported at the first call."""
        module, name = self.adapter
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def image_processor_class(self) -> Any:
        """The class, imported at the first call."""
        folder, name = self.image_processor
        return getattr(importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}"), name)


_LLAVA_PARTS = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
_QWEN = Family(("qwenvl", "QwenVLAdapter"), ("qwen2_vl", "Qwen2VLImageProcessorPil"), ("lm_head", "model.visual"))

#: By the model type in a configuration.
FAMILIES: dict[str, Family] = {
    "llava": Family(("llava", "LlavaAdapter"), ("clip", "CLIPImageProcessorPil"), _LLAVA_PARTS),
    "llava_next": Family(("llava", "LlavaTiledAdapter"), ("llava_next", "LlavaNextImageProcessorPil"), _LLAVA_PARTS),
    "llava_onevision": Family(
        ("llava", "LlavaTiledAdapter"), ("llava_onevision", "LlavaOnevisionImageProcessorPil"), _LLAVA_PARTS
    ),
    "blip-2": Family(
        ("blip2", "Blip2Adapter"),
        ("blip", "BlipImageProcessorPil"),
        ("language_model.lm_head", "vision_model", "qformer", "language_projection"),
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
