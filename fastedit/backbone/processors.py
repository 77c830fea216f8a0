"""Processors of checkpoints, also where transformers cannot build one because a video library is absent."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .families import FAMILIES
from .json_files import read_object

#: The longest side, and the most pixels, that a processor may bring images to.
MOST_SIDE, MOST_PIXELS = 1 << 14, 1 << 26


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
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.chat_template is not None:
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def load_processor(source: str, model_type: str, *, local_only: bool, sees: bool = True) -> Any:
    """Return the processor of a folder or Hugging Face id, for a model of this type.

    AutoProcessor returns a bare tokenizer, or raises, for families whose processor wants a video library; images and
    text do not need one, so the parts are loaded instead. A model of text alone (``sees`` False) has a tokenizer only.
    """
    from transformers import AutoProcessor, AutoTokenizer

    # Before transformers 5.23 the name in the package itself insists on torchvision, which processors on Pillow do not
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    options: dict[str, Any] = {"local_files_only": local_only, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (ImportError, AttributeError, ValueError, TypeError):
        processor = None
    if getattr(processor, "image_processor", None) is not None and getattr(processor, "tokenizer", None) is not None:
        return processor
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    template = _chat_template(source) or tokenizer.chat_template
    if not sees:
        return PartsProcessor(None, tokenizer, template)
    try:
        image_processor = AutoImageProcessor.from_pretrained(source, **options)
    except ImportError:
        if model_type not in FAMILIES:
            raise
        image_processor = (
            FAMILIES[model_type].image_processor_class().from_pretrained(source, local_files_only=local_only)
        )
    if model_type in FAMILIES:
        return PartsProcessor(image_processor, tokenizer, template)
    return _without_video(source, model_type, image_processor, tokenizer, template)


def _without_video(source: str, model_type: str, image_processor: Any, tokenizer: Any, template: str | None) -> Any:
    """Return a family's own processor with nothing in the place of its video processor.

    Raises:
        ImportError: it needs more than that.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    family: Any = getattr(transformers, str(PROCESSOR_MAPPING_NAMES.get(model_type)), None)
    if family is None:
        raise ImportError(f"load: model_type {model_type!r} has no processor in transformers (got {source!r})")
    known = inspect.signature(family.__init__).parameters
    path = Path(source) / "processor_config.json"
    said = read_object(path) if path.is_file() else {}
    options = {name: value for name, value in said.items() if name in known and not isinstance(value, dict)}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": template}
    parts |= {"video_processor": None} if "video_processor" in known else {}
    # The class insists on a video processor, which insists on a library; images and text ask for neither
    lenient = type(family.__name__, (family,), {"check_argument_for_proper_class": _any_class})
    try:
        return lenient(**(options | parts))
    except (TypeError, AttributeError) as error:
        rule = f"the processor of model_type {model_type!r} needs libraries that are not installed"
        raise ImportError(f"load: {rule} (got {type(error).__name__}: {error}; try pip install torchvision)") from error


def _any_class(_processor: Any, _name: str, part: Any) -> type:
    return type(part)


def _chat_template(source: str) -> str | None:
    """Read the chat template beside a local checkpoint, in either of the forms that transformers writes."""
    plain, wrapped = Path(source) / "chat_template.jinja", Path(source) / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        template: str = json.loads(wrapped.read_text(encoding="utf-8"))["chat_template"]
        return template
    return None


def complete_processor(processor: Any, config: Any, checkpoint: Checkpoint) -> None:
    """Give a processor what its file does not say, as files of older versions do not, from the model's configuration.

    Args:
        processor: changed in place. config: of the model. checkpoint: whose file says what was said.
    Raises:
        ValueError: sizes of images that no model takes, or a tokenizer without the image token.
    """
    if processor.image_processor is None:
        return
    said: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = checkpoint.file(name)
        said |= read_object(path) if path is not None else {}
    for field, value in _processor_fields(config).items():
        # Some defaults are numbers, and wrong ones for most towers
        if value is not None and hasattr(processor, field) and said.get(field) is None:
            setattr(processor, field, value)
    _check_sizes(processor.image_processor)
    token = getattr(config, "image_token_id", None)
    if token is None:
        return
    text = processor.tokenizer.convert_ids_to_tokens(int(token))
    known = text is not None and processor.tokenizer(text, add_special_tokens=False)["input_ids"] == [token]
    if not known:
        rule = "the tokenizer must have the image token of config.json, and read its text as this one token"
        raise ValueError(f"load: {checkpoint.name!r}: {rule} (got image_token_id={token}, text={text!r})")
    if isinstance(getattr(processor, "image_token", None), str):
        processor.image_token, processor.image_token_id = text, token


def _processor_fields(config: Any) -> dict[str, Any]:
    """What processors are told of a model, by the names of their fields; None where the model has no such thing."""
    vision = getattr(config, "vision_config", None)
    side, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    # Towers of CLIP put a token for the whole image before those of its patches
    classes = {"clip_vision_model": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0}
    return {
        "patch_size": patch,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": classes.get(getattr(vision, "model_type", "")),
        "num_image_tokens": (side // patch) ** 2
        if isinstance(side, int) and isinstance(patch, int) and patch
        else None,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "num_query_tokens": getattr(config, "num_query_tokens", None),
    }


def _check_sizes(image_processor: Any) -> None:
    """Refuse sizes that images would be blown up to without end."""
    fields: dict[str, Any] = image_processor.to_dict()
    # Families that take images of any shape have numbers of pixels in all
    areas = fields.get("merge_size") is not None
    sizes: list[tuple[str, Any, int]] = []
    for field in ("size", "crop_size"):
        entries = fields.get(field)
        # The longest edge only ever makes an image smaller
        named = dict(entries) if isinstance(entries, Mapping) else {"": entries}
        sizes += [
            (f"{field}.{key}" if key else field, value, MOST_PIXELS if areas else MOST_SIDE)
            for key, value in named.items()
            if key not in ("longest_edge", "max_pixels")
        ]
    sizes.append(("min_pixels", fields.get("min_pixels"), MOST_PIXELS))
    sizes += [(name, fields.get(name), MOST_SIDE) for name in ("patch_size", "merge_size", "temporal_patch_size")]
    for pair in fields.get("image_grid_pinpoints") or ():
        sizes += [("image_grid_pinpoints", side, MOST_SIDE) for side in pair]
    for name, value, limit in sizes:
        if value is not None and not (isinstance(value, (int, float)) and 0 < value <= limit):
            raise ValueError(f"load: the image processor's {name} must be in 1..{limit} (got {name}={value!r})")
