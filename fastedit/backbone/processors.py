"""Processors of checkpoints, also where transformers cannot build one because a video library is absent."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

_PLAIN_IMAGE_PROCESSORS = {
    "llava": ("clip", "CLIPImageProcessorPil"),
    "llava_next": ("llava_next", "LlavaNextImageProcessorPil"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionImageProcessorPil"),
    "blip-2": ("blip", "BlipImageProcessorPil"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLImageProcessorPil"),
    "qwen2_5_vl": ("qwen2_vl", "Qwen2VLImageProcessorPil"),
    "qwen3_vl": ("qwen2_vl", "Qwen2VLImageProcessorPil"),
}


class PartsProcessor:
    """Image processor, tokenizer and chat template side by side: what is needed of a processor without video.

    Args:
        image_processor, tokenizer: of the checkpoint.
        chat_template: Jinja text or None.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Render messages with the checkpoint's template; options as those of a tokenizer."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the parts to a folder that `load_processor` reads."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.chat_template is not None:
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def load_processor(source: str, model_type: str, *, local_only: bool) -> Any:
    """Return the processor of a folder or Hugging Face id, for a model of this type.

    AutoProcessor returns a bare tokenizer, or raises, for families whose processor wants a video library; images and
    text do not need one, so the parts are loaded instead.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local_only, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (ImportError, AttributeError, ValueError, TypeError):
        processor = None
    if getattr(processor, "image_processor", None) is not None and getattr(processor, "tokenizer", None) is not None:
        return processor
    try:
        image_processor = AutoImageProcessor.from_pretrained(source, **options)
    except ImportError:
        image_processor = _plain_image_processor(model_type).from_pretrained(source, local_files_only=local_only)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return PartsProcessor(image_processor, tokenizer, _chat_template(source) or tokenizer.chat_template)


def _plain_image_processor(model_type: str) -> Any:
    """Return the Pillow image processor of a family whose AutoImageProcessor insists on torchvision (before 5.23)."""
    folder, name = _PLAIN_IMAGE_PROCESSORS[model_type]
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return getattr(module, name)


def _chat_template(source: str) -> str | None:
    """Read the chat template beside a local checkpoint, in either of the forms that transformers writes."""
    plain, wrapped = Path(source) / "chat_template.jinja", Path(source) / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        template: str = json.loads(wrapped.read_text(encoding="utf-8"))["chat_template"]
        return template
    return None
