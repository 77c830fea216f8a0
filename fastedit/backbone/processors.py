"""Processors of checkpoints, also where transformers cannot build one because a video library is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def load_processor(source: str, *, local_only: bool) -> Any:
    """Return the processor of a folder or Hugging Face id.

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
    image_processor = AutoImageProcessor.from_pretrained(source, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return PartsProcessor(image_processor, tokenizer, _chat_template(source) or tokenizer.chat_template)


def _chat_template(source: str) -> str | None:
    """Read the chat template beside a local checkpoint, in either of the forms that transformers writes."""
    plain, wrapped = Path(source) / "chat_template.jinja", Path(source) / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        template: str = json.loads(wrapped.read_text(encoding="utf-8"))["chat_template"]
        return template
    return None
