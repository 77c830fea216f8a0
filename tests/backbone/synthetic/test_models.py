"""Models with random weights: sizes, types, reproducibility."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastedit.backbone import SHAPES, load
from fastedit.backbone.synthetic.models import EmptyOnMeta, WeightSource, make_config
from fastedit.backbone.synthetic.processors import made_up_processor
from fastedit.requests import Query
from tests.backbone.conftest import cached_model, picture
from tests.backbone.padded import prefix, tail

# Millions of parameters of the published models, to two digits (the text model of MiniGPT-4 is Vicuna 7B).
PUBLISHED = {
    "llava-1.5-7b": 7063,
    "llava-1.5-13b": 13351,
    "llava-next-mistral-7b": 7566,
    "llava-onevision-7b": 8031,
    "blip2-opt-2.7b": 3745,
    "minigpt4-7b": 7831,
    "qwen2-vl-2b": 2209,
    "qwen2-vl-7b": 8291,
    "qwen2.5-vl-7b": 8292,
    "qwen3-vl-8b": 8767,
    "qwen2vl-77m": 77,
}


@pytest.mark.parametrize("shape_name", [name for name in SHAPES if not name.endswith("-tiny")])
def test_stock_shapes_have_the_published_size(shape_name: str) -> None:
    from transformers import AutoModelForImageTextToText

    shape = SHAPES[shape_name]
    # A small tokenizer knows the special tokens as well and is made faster.
    small = dataclasses.replace(shape, text=shape.text | {"vocab_size": 640})
    config = make_config(shape, made_up_processor(small))
    with EmptyOnMeta():
        hf = AutoModelForImageTextToText.from_config(config)
    hf.tie_weights()
    millions = sum(parameter.numel() for parameter in hf.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[shape_name], rel=0.01)


def test_the_benchmark_model_is_as_specified() -> None:
    model = load("random:qwen2vl-77m")
    text = model.adapter.text.config
    sizes = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size)
    assert sizes == (512, 12, 8, 1376)
    assert model.vocab_size == 32000
    assert not text.tie_word_embeddings
    vision = model.hf.config.vision_config
    assert (vision.depth, vision.embed_dim, vision.patch_size, vision.spatial_merge_size) == (6, 256, 14, 2)
    encoded = model.encode([Query("What color is the bus?", picture(0, 224, 224), "red")], answers=True)
    assert int(encoded.image_mask.sum()) == 64
    assert tail(model, prefix(model, encoded, 11, "ffn")).isfinite().all()


def test_the_seed_decides_the_weights_and_the_type_is_drawn_directly() -> None:
    first, same, other = load("random:llava-tiny"), load("random:llava-tiny"), load("random:llava-tiny", seed=1)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    half = load("random:llava-tiny", dtype="bfloat16")
    types = {parameter.dtype for parameter in half.hf.parameters()}
    assert types == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in half.hf.parameters())
    assert not any(buffer.is_meta for buffer in half.hf.buffers())


def test_position_tables_are_real_and_not_rounded() -> None:
    # Buffers that the constructor computes must not be drawn, nor lose precision with the weights' type.
    model = cached_model("random:qwen2vl-tiny", dtype="bfloat16")
    frequencies = model.adapter.text.root.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies, 1e6 ** (-torch.arange(0, 16, 2).float() / 16), rtol=1e-6)


def test_ties_hold() -> None:
    tied, untied = cached_model("random:qwen2vl-tiny"), cached_model("random:llava-tiny")
    assert tied.adapter.head.weight is tied.adapter.text.root.embed_tokens.weight
    assert untied.adapter.head.weight is not untied.adapter.text.root.embed_tokens.weight


def test_weights_are_what_the_shape_says() -> None:
    model = cached_model("random:blip2-tiny")
    drawn = torch.cat([p.flatten() for n, p in model.hf.named_parameters() if p.dim() == 2])
    assert abs(drawn.std().item() / SHAPES["blip2-tiny"].std - 1) < 0.01
    norms = torch.cat([p for n, p in model.hf.named_parameters() if n.endswith("layer_norm.weight")])
    assert abs(norms.mean().item() - 1) < 0.05


def test_large_weights_are_filled_without_repeating_rows() -> None:
    source = WeightSource(0.02, torch.bfloat16, torch.device("cpu"), 0)
    weight = source.draw("weight", torch.empty(9000, 4096, device="meta"))
    assert weight.dtype == torch.bfloat16
    assert abs(weight.float().std().item() / 0.02 - 1) < 0.01
    # Two full turns of the pool: equal values, but never in whole rows.
    assert torch.equal(weight.flatten()[0], weight.flatten()[source.POOL])
    assert len(torch.unique(weight[:, :8], dim=0)) == 9000
    other = source.draw("weight", torch.empty(9000, 4096, device="meta"))
    assert not torch.equal(weight[0], other[0])
