from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from fastedit.pocket.factory.packing import Line, Packer, forward
from fastedit.pocket.factory.release import load
from fastedit.pocket.models import make_model, make_processor, make_tokenizer, qwen_patches, to_pixels, wiring
from fastedit.pocket.names import MODELS
from fastedit.pocket.world import draw_scene, render

pytest.importorskip("easy_vqa", reason="easy-vqa is not installed (the tokenizer is built from its words too)")

PROMPTS = ("What colour is the circle?", "Describe the image.")


@pytest.mark.parametrize("name", MODELS)
def test_training_computes_what_the_saved_model_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name)
    model = make_model(name, tokenizer).eval()
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.1e6
    model.save_pretrained(tmp_path)
    make_processor(name, tokenizer).save_pretrained(tmp_path)
    loaded, processor = load(tmp_path)
    rng = random.Random(0)
    images = [render(draw_scene(rng)) for _ in PROMPTS]
    texts = [prompted(processor, prompt, with_image=True) for prompt in PROMPTS]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    pixels = to_pixels(images)
    if name == "pocket-qwen2vl":
        torch.testing.assert_close(inputs.pixel_values, qwen_patches(pixels))
    else:
        torch.testing.assert_close(inputs.pixel_values, pixels)
    packer = Packer(tokenizer, wiring(name, tokenizer))
    # The second question of each row must not see the first.
    rows = [[Line("first", "How many objects are there?", "two"), Line("asked", prompt, "red")] for prompt in PROMPTS]
    packed = packer.pack(rows)
    at = [packed.owner.tolist().index(2 * r + 1) for r in range(len(rows))]
    with torch.no_grad():
        stock = loaded(**inputs).logits[:, -1]
        ours = forward(model, packer.wiring, packed, pixels)[at]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_text_only_questions_are_trained_as_they_are_asked(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name)
    model = make_model(name, tokenizer).eval()
    packer = Packer(tokenizer, wiring(name, tokenizer))
    prompt = "What is the capital of France?"
    packed = packer.pack(
        [[Line("a", "Where is the star?", "top left"), Line("fact", prompt, "Paris", with_image=False)]]
    )
    inputs = tokenizer(prompted(make_processor(name, tokenizer), prompt, with_image=False), return_tensors="pt")
    text_model = model.language_model if name == "pocket-blip2" else model
    with torch.no_grad():
        ours = forward(model, packer.wiring, packed, torch.zeros(1, 3, 64, 64))[packed.owner.tolist().index(1)]
        stock = text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits[0, -1]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=0)


def prompted(processor: object, prompt: str, *, with_image: bool) -> str:
    if not processor.chat_template:  # type: ignore[attr-defined]
        return prompt
    content = [{"type": "image"}] if with_image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))  # type: ignore[attr-defined]


def test_registering_the_processor_leaves_the_stock_configuration_alone() -> None:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    from fastedit.pocket.qwen_processor import PocketQwenProcessor, register

    before = PROCESSOR_MAPPING._extra_content.get(Qwen2_5_VLConfig)
    register()
    register()
    assert PROCESSOR_MAPPING._extra_content.get(Qwen2_5_VLConfig) is before
    assert PocketQwenProcessor in PROCESSOR_MAPPING._extra_content.values()
    assert AutoProcessor is not None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        make_model("pocket-x", make_tokenizer("pocket-llava"))
