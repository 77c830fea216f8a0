"""Tiled images: as many tokens as the stock processor gives, whatever their shape."""

from __future__ import annotations

import pytest
import torch

from fastedit.requests import Query
from tests.backbone.padded import prefix, tail

from .conftest import cached_model, largest_gap, picture, stock_logits

SHAPES = ((32, 32), (40, 70), (64, 30), (16, 90), (90, 17))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tile_counts_equal_those_of_the_processor(height: int, width: int) -> None:
    model = cached_model("random:llava-next-tiny")
    image = picture(0, height, width)
    _, tokens = model.adapter.image_inputs(image)
    stock = model.processor(images=[image], text=["<image>"], return_tensors="pt")["input_ids"]
    assert tokens == int((stock == model.adapter.image_token_id).sum())


@pytest.mark.parametrize("name", ["random:llava-next-tiny", "random:llava-onevision-tiny"])
def test_images_of_different_tilings_share_a_batch(name: str) -> None:
    model = cached_model(name)
    queries = [Query("what is it?", picture(seed, *shape), "red") for seed, shape in enumerate(SHAPES)]
    encoded = model.encode(queries, answers=True)
    counts = encoded.image_mask.sum(1)
    assert len(set(counts.tolist())) > 2
    logits = model.head(tail(model, prefix(model, encoded, 1, "ffn")))
    for row in range(len(queries)):
        reference = stock_logits(model, encoded.select([row]))
        assert largest_gap(logits[row, : len(reference)], reference) < 1e-5


def test_an_image_with_the_wrong_number_of_features_is_refused() -> None:
    model = cached_model("random:llava-tiny")
    encoded = model.encode([Query("what is it?", picture(77))], answers=False)
    kept = model.adapter.image_features
    try:
        model.adapter.image_features = lambda images: [type(part)(part.tokens[:-1]) for part in kept(images)]
        with pytest.raises(ValueError, match=r"as many features as tokens \(got features=15, tokens=16\)"):
            prefix(model, encoded, 0)
    finally:
        del model.adapter.image_features
    assert torch.is_tensor(prefix(model, encoded, 0).hidden)
