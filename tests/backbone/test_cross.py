"""Layers that read images by cross-attention: rows of text pass by, and text goes on behind an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastedit
from fastedit.backbone.generic.adapter import generic
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.requests import EditRequest, Query

from .conftest import picture
from .test_architectures import editable, stock_logits


@torch.no_grad()
def test_rows_of_text_alone_skip_layers_that_read_images() -> None:
    model = editable("mllama")
    texts = [Query("what is it?", None, "red"), Query("how many are there on the left?", None, "two")]
    encoded = model.encode(texts, answers=True)
    expected = stock_logits(model, encoded)
    start = packed_start(model, encoded)
    for layer in range(model.n_layers):
        for stage in ("attention", "ffn"):
            state = packed_prefix(model, start, layer, stage)
            assert float((model.head(packed_tail(model, state)) - expected).abs().max()) <= 1e-12
    mixed = model.encode([texts[0], Query("what is it?", picture(0), "red"), texts[1]], answers=True)
    state = packed_prefix(model, packed_start(model, mixed), 1, "ffn")
    alone = packed_prefix(model, start, 1, "ffn")
    ends = state.of_row(0).hidden, state.of_row(2).hidden
    assert float((torch.cat(ends) - alone.hidden).abs().max()) <= 1e-12


def test_an_image_is_looked_at_once_and_text_goes_on_from_stored_keys(
    count_calls: Callable[[Any], list[int]],
) -> None:
    model = editable("mllama")
    adapter = generic(model.adapter)
    assert adapter is not None
    assert adapter.follows
    assert adapter.walker.stores
    tower = count_calls(model.hf.model.vision_model.transformer)
    looked = picture(7, 50, 41)
    model.generate([Query("what is it?", looked), Query("is it red?", looked), Query("what?", None)], max_new_tokens=6)
    assert len(tower) == 1


def test_an_edit_beside_layers_that_read_images_leaves_text_alone() -> None:
    model = editable("mllama")
    request = EditRequest("what is it?", "red", picture(0), locality_prompt="how many?", locality_answer="two")
    (delta,) = fastedit.edit(
        model, [request], method="lora", names=("up", "down"), layers=(1,), lr=3e-2, steps=60, views="record",
        evaluate=False,
    ).deltas  # fmt: skip
    text = model.encode([Query("how many?", None, "two")], answers=True)
    seen = model.encode([Query("what is it?", picture(0), "red")], answers=True)
    before = [packed_tail(model, packed_start(model, rows)) for rows in (text, seen)]
    with fastedit.applied(model, delta):
        after = [packed_tail(model, packed_start(model, rows)) for rows in (text, seen)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
