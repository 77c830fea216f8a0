"""Positions with time, height and width against the stock computation."""

from __future__ import annotations

import pytest
import torch

from fastedit.requests import Query
from tests.backbone.padded import prefix

from .conftest import cached_model, mixed_queries, picture


@pytest.mark.parametrize("name", ["random:qwen2vl-tiny", "random:qwen2.5vl-tiny", "random:qwen3vl-tiny"])
def test_positions_equal_the_stock_ones(name: str) -> None:
    model = cached_model(name)
    wide = Query("where is it?", picture(3, 16, 200), "left")
    encoded = model.encode([*mixed_queries(), wide], answers=True)
    ours = model.adapter.position_ids(encoded.lengths, encoded.image_mask, encoded.images)
    inputs = encoded.model_inputs
    stock, _ = model.hf.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    for row, length in enumerate(encoded.lengths.tolist()):
        assert torch.equal(ours[row, :, :length], stock[:, row, :length]), row
    grids = {tuple(image.tensors["image_grid_thw"][0].tolist()) for image in encoded.images if image}
    assert len(grids) > 1, "images of one shape only"


def test_visual_features_are_added_only_while_their_layers_lie_ahead() -> None:
    model = cached_model("random:qwen3vl-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    ahead = {
        (layer, stage): set(prefix(model, encoded, layer, stage).deep)
        for layer in range(4)
        for stage in ("attention", "ffn")
    }
    assert ahead[0, "attention"] == ahead[0, "ffn"] == {0, 1}
    assert ahead[1, "attention"] == ahead[1, "ffn"] == {1}
    assert ahead[2, "attention"] == ahead[3, "ffn"] == set()
    deep = prefix(model, encoded, 0).deep[1]
    assert torch.equal(deep.abs().sum(-1) > 0, encoded.image_mask)
