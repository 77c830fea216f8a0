"""Query tokens before the opening token, and what BLIP-2 cannot be made of."""

from __future__ import annotations

import types

import pytest

from fastedit.backbone.blip2 import Blip2Adapter
from fastedit.requests import Query

from .conftest import cached_model, picture


@pytest.mark.parametrize("name", ["random:blip2-tiny", "random:minigpt4-tiny"])
def test_image_tokens_come_before_the_opening_token(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode([Query("what is it?", picture(0))], answers=False)
    opening = model.tokenizer.bos_token_id
    assert encoded.input_ids[0, :7].tolist() == [model.adapter.image_token_id] * 6 + [opening]
    text = model.encode([Query("what is it?")], answers=False)
    assert text.input_ids[0].tolist() == encoded.input_ids[0, 6:].tolist()


def test_encoder_decoder_text_models_are_refused() -> None:
    text = types.SimpleNamespace(model_type="t5")
    config = types.SimpleNamespace(use_decoder_only_language_model=False, text_config=text)
    with pytest.raises(ValueError, match=r"needs a decoder-only text model \(got model_type='t5'\)"):
        Blip2Adapter(types.SimpleNamespace(config=config), None)
