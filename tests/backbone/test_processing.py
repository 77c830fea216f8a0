"""Prompts with images as a checkpoint's own processor makes them, to the token."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastedit.backbone import EditableModel
from fastedit.backbone.generic.adapter import GenericAdapter
from fastedit.backbone.loading import end_tokens
from fastedit.requests import Query

from .architectures import make_stock
from .checkpoint_processors import MAKERS


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
