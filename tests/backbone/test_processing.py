"""Prompts with images as a checkpoint's own processor makes them, to the token."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastedit.backbone import EditableModel
from fastedit.backbone.generic.adapter import GenericAdapter
from fastedit.backbone.loading import end_tokens
from fastedit.backbone.processors import _any_class
from fastedit.backbone.synthetic.processors import made_up_tokenizer
from fastedit.requests import Query

from .architectures import VOCABULARY, make_stock


def pillow(folder: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}"), name)


def tokenizer(marked: bool = False, **named: str) -> Any:
    made = made_up_tokenizer(VOCABULARY, end="</s>", opens=not marked)
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def gemma3() -> Any:
    from transformers import Gemma3Processor

    words = tokenizer(boi_token="<|vision_start|>", eoi_token="<|vision_end|>", image_token="<image>")
    images = pillow("gemma3", "Gemma3ImageProcessorPil")(size={"height": 32, "width": 32})
    return Gemma3Processor(images, words, image_seq_length=4)


def paligemma() -> Any:
    from transformers import PaliGemmaProcessor

    images = pillow("siglip", "SiglipImageProcessorPil")(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer())


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLProcessor

    images = pillow("qwen2_vl", "Qwen2VLImageProcessorPil")(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 4096}
    )
    lenient = type("Qwen3VLProcessor", (Qwen3VLProcessor,), {"check_argument_for_proper_class": _any_class})
    return lenient(image_processor=images, tokenizer=tokenizer(marked=True), video_processor=None)


def phi3() -> Any:
    from transformers import LlavaProcessor

    images = pillow("clip", "CLIPImageProcessorPil")(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "qwen3_vl_moe": qwen3_vl_moe,
    "llava+phi3": phi3,
}


@pytest.mark.parametrize("key", sorted(MAKERS))
def test_prompts_are_those_of_the_processor(key: str) -> None:
    hf, processor = make_stock(key), MAKERS[key]()
    model = EditableModel(
        hf,
        processor,
        GenericAdapter(hf, processor),
        name=key,
        quantize="none",
        dtype=hf.dtype,
        template="{image}\nwhat of {}",
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=16,
    )
    sizes = np.random.default_rng(0).integers(9, 90, (25, 2)).tolist()
    queries = [Query("the red bus?", Image.new("RGB", (width, height))) for width, height in sizes]
    encoded = model.encode(queries, answers=False)
    for row, query in enumerate(queries):
        expected = processor(
            text=[model.prompts.text(query.prompt, with_image=True)], images=[query.image], return_tensors="pt"
        )
        assert encoded.input_ids[row, : int(encoded.lengths[row])].tolist() == expected["input_ids"][0].tolist()
