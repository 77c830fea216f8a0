"""Prompts with images as a checkpoint's own processor makes them, to the token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastedit.backbone import EditableModel
from fastedit.backbone.generic.adapter import GenericAdapter
from fastedit.backbone.generic.cross import SEEN
from fastedit.backbone.generic.processing import OF_PROMPT
from fastedit.backbone.loading import end_tokens
from fastedit.backbone.states import ImageInputs
from fastedit.requests import Query

from .architectures import make_stock
from .checkpoint_processors import MAKERS


def editable(key: str, template: str) -> tuple[EditableModel, GenericAdapter]:
    hf, processor = make_stock(key), MAKERS[key]()
    adapter = GenericAdapter(hf, processor)
    ends = end_tokens(hf, processor.tokenizer)
    model = EditableModel(
        hf,
        processor,
        adapter,
        name=key,
        quantize="none",
        dtype=hf.dtype,
        template=template,
        end_token_ids=ends,
        image_cache_mib=16,
    )
    return model, adapter


@pytest.mark.parametrize("key", sorted(MAKERS))
def test_prompts_are_those_of_the_processor(key: str) -> None:
    model, adapter = editable(key, "{image}\nwhat of {}")
    processor = model.processor
    sizes = np.random.default_rng(0).integers(9, 90, (25, 2)).tolist()
    queries = [Query("the red bus?", Image.new("RGB", (width, height))) for width, height in sizes]
    encoded = model.encode(queries, answers=False)
    for row, query in enumerate(queries):
        expected = processor(
            text=[model.prompts.text(query.prompt, with_image=True)], images=[query.image], return_tensors="pt"
        )
        assert encoded.input_ids[row, : int(encoded.lengths[row])].tolist() == expected["input_ids"][0].tolist()
        image = encoded.images[row]
        assert image is not None
        for name in OF_PROMPT & set(expected):
            assert torch.equal(image.tensors[name], expected[name])
        if SEEN in expected:
            ids = encoded.input_ids[row, : int(encoded.lengths[row])].tolist()
            assert torch.equal(adapter.inputs(ids, image, len(ids))[SEEN], expected[SEEN])


def test_an_image_is_looked_at_anew_for_every_prompt() -> None:
    hf, processor = make_stock("instructblip"), MAKERS["instructblip"]()
    adapter = GenericAdapter(hf, processor)
    image = Image.new("RGB", (40, 30))
    tensors, tokens, ids, _ = adapter.image_inputs(image)
    assert not OF_PROMPT & set(tensors)
    read = [adapter.asked(ImageInputs("image", tensors, tokens, ids), text) for text in ("red?", "blue?", "red?")]
    assert read[0].key == read[2].key != read[1].key
    rows = [adapter._row([*ids, 40, 41], each, tokens + 2).values["inputs_embeds"] for each in read]
    assert torch.equal(rows[0], rows[2])
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3


def test_a_processor_that_does_not_read_for_the_qformer_is_refused() -> None:
    processor = MAKERS["instructblip"]()
    processor.qformer_tokenizer = None
    with pytest.raises(ValueError, match="qformer_input_ids"):
        GenericAdapter(make_stock("instructblip"), processor)


def test_what_opens_a_prompt_is_not_put_behind_its_image_where_its_text_spells_it() -> None:
    model, _ = editable("mllama", "<s>user: {image}what of {}")
    image = Image.new("RGB", (40, 30))
    encoded = model.encode([Query("the red bus?", image)], answers=False)
    text = model.prompts.text("the red bus?", with_image=True)
    expected = model.processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")
    assert encoded.input_ids.tolist() == expected["input_ids"].tolist()
