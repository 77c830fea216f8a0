"""Processors that transformers cannot build are put together from their parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastedit.backbone import FAMILIES, load
from fastedit.backbone.processors import _PLAIN_IMAGE_PROCESSORS, PartsProcessor, _plain_image_processor, load_processor
from fastedit.requests import Query

from .conftest import TINY, cached_model, picture


@pytest.mark.parametrize("name", TINY)
def test_a_saved_processor_gives_the_same_prompts_and_pixels(name: str, tmp_path: Path) -> None:
    model = cached_model(name)
    model.processor.save_pretrained(tmp_path)
    model.hf.config.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path), model.hf.config.model_type, local_only=True)
    pixels = [
        part.image_processor(images=[picture(0)], return_tensors="pt")["pixel_values"]
        for part in (model.processor, again)
    ]
    assert torch.equal(*pixels)
    assert again.tokenizer("what is it?")["input_ids"] == model.tokenizer("what is it?")["input_ids"]
    assert getattr(again, "chat_template", None) == getattr(model.processor, "chat_template", None)


def test_older_folders_hold_the_template_in_json(tmp_path: Path) -> None:
    model = cached_model("random:qwen2vl-tiny")
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['role'] }}:"}))
    again = load(tmp_path)
    assert isinstance(again.processor, PartsProcessor)
    assert again.prompts.text("what?", with_image=False) == "user:"
    with pytest.raises(ValueError, match="row 0: a prompt must hold one image placeholder"):
        again.encode([Query("what?", picture(0))], answers=False)


def test_every_family_has_a_pillow_image_processor() -> None:
    assert set(_PLAIN_IMAGE_PROCESSORS) == set(FAMILIES)
    for model_type in FAMILIES:
        assert _plain_image_processor(model_type)().model_input_names
