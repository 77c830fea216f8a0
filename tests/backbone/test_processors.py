"""Processors that transformers cannot build are put together from their parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.backbone import FAMILIES, load
from fastedit.backbone.probe_image import check_image
from fastedit.backbone.processors import PartsProcessor, load_processor
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
    for family in FAMILIES.values():
        assert family.image_processor_class()().model_input_names


@pytest.mark.parametrize("name", ["random:llava-tiny", "random:llava-next-tiny", "random:blip2-tiny"])
def test_what_older_files_do_not_say_comes_from_the_model(name: str, tmp_path: Path) -> None:
    model = cached_model(name)
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    said = json.loads(path.read_text())
    fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "num_image_tokens")
    for field in (*fields, "num_query_tokens", "image_token", "vision_aspect_ratio"):
        said.pop(field, None)
    path.write_text(json.dumps(said))
    again = load(tmp_path)
    first, second = (each.encode([Query("what is it?", picture(0))], answers=False) for each in (model, again))
    assert torch.equal(first.input_ids, second.input_ids)
    for field in fields:
        assert getattr(again.processor, field, None) == getattr(model.processor, field, None)
    if callable(again.processor):
        image, text = picture(0), model.adapter.image_text + "what is it?"
        ids = [each.processor(images=[image], text=[text])["input_ids"] for each in (model, again)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("random:llava-tiny", {"patch_size": 4}, r"as many tokens of an image .*\(got tokens=64, features=16\)"),
        ("random:llava-tiny", {"num_additional_image_tokens": 3}, r"\(got tokens=18, features=16\)"),
        ("random:llava-tiny", {"vision_feature_select_strategy": "full"}, r"\(got tokens=17, features=16\)"),
        ("random:qwen2vl-tiny", {"patch_size": 4}, r"the processor of .* must turn an image into what the model takes"),
        ("random:qwen2vl-tiny", {"min_pixels": 10**12, "size": None}, r"image processor's \S+ must be in 1\.\."),
        (
            "random:llava-next-tiny",
            {"image_grid_pinpoints": [[10**6, 32]]},
            r"image_grid_pinpoints must be in 1\.\.16384",
        ),
        ("random:llava-next-tiny", {"image_grid_pinpoints": [[32, 64]]}, r"image_grid_pinpoints must be the same"),
        ("random:blip2-tiny", {"size": {"height": 64, "width": 64}}, r"must turn an image into what the model takes"),
    ],
)
def test_a_processor_of_another_model_is_told_before_weights_are_read(
    name: str, entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = cached_model(name)
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = tmp_path / file
        if not path.is_file():
            continue
        said = json.loads(path.read_text())
        inner = said.get("image_processor", said)
        for field, value in entries.items():
            (inner if field in inner or field == "min_pixels" else said)[field] = value
        path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_tokens_between_those_of_an_image_are_refused() -> None:
    model = cached_model("random:llava-tiny")

    class Broken:
        """As Pixtral's: another token after some of the image's."""

        image_processor, tokenizer = model.processor.image_processor, model.tokenizer

        def __call__(self, **inputs: Any) -> Any:
            batch = model.processor(**inputs)
            ids = batch["input_ids"][0].tolist()
            batch["input_ids"] = torch.tensor([[*ids[:6], 7, *ids[6:]]])
            return batch

    with pytest.raises(
        ValueError, match=r"tokens must follow each other without others between them \(got 1\d tokens for"
    ):
        check_image("a", model.hf, Broken())
