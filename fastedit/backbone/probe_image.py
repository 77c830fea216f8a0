"""One made-up image through a model's processor, before weights are read: counts and order of tokens must agree."""

from __future__ import annotations

from typing import Any

import torch

from .adapters import Adapter, has_family, make_adapter
from .checkpoint import reading
from .generic.processing import Placeholder
from .states import ImageInputs

#: Neither square nor a multiple of usual patches.
SIZE = (90, 61)


def check_image(name: str, hf: Any, processor: Any) -> None:
    """Refuse a processor whose images do not fit the model, or whose tokens of one are not those of the adapter.

    Args:
        name: of the model. hf: on the meta device: only shapes are computed.
    Raises:
        ValueError: "load: ... (got ...)".
    """
    from PIL import Image

    if not has_family(hf.config):
        # Compared with the stock model's own forward once its weights are there
        if processor.image_processor is not None:
            with reading(f"the processor of {name!r} must turn an image into what the model takes"):
                Placeholder(hf, processor).image_inputs(processor, Image.new("RGB", SIZE))
        return
    with reading(f"{name!r} must be a model that can be edited"):
        adapter = make_adapter(hf, processor)
    with reading(f"the processor of {name!r} must turn an image into what the model takes"), torch.no_grad():
        tensors, tokens = adapter.image_inputs(Image.new("RGB", SIZE))
        adapter.check_inputs(ImageInputs(key="", tensors=tensors, tokens=tokens))
        _check_order(adapter, processor, tokens)


def _check_order(adapter: Adapter, processor: Any, tokens: int) -> None:
    """Refuse a processor that puts other tokens between those of an image."""
    from PIL import Image

    if not adapter.image_text or not callable(processor):
        return
    bare = list(processor.tokenizer(adapter.image_text, add_special_tokens=False)["input_ids"])
    expected, _ = adapter.place_image(bare, tokens)
    given = processor(images=[Image.new("RGB", SIZE)], text=[adapter.image_text], return_tensors="pt")
    ids = given["input_ids"][0].tolist()
    places = range(len(ids) - len(expected) + 1)
    if not any(ids[start : start + len(expected)] == expected for start in places):
        others = sorted(set(ids) - set(expected))
        spelled = processor.tokenizer.convert_ids_to_tokens(others)
        rule = "an image's tokens must follow each other without others between them"
        raise ValueError(f"{rule} (got {len(ids)} tokens for {len(expected)}, among them {spelled[:4]})")
