"""The model of a 7B shape, small: it has the weights of one layer, and can be traced again and again."""

from __future__ import annotations

import torch

from benchmarks.self_check import self_check_seconds, shaped_model

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 640}


def test_layers_share_the_weights_of_one_and_are_traced() -> None:
    hf = shaped_model(torch.float32, SMALL)
    first, last = hf.model.layers[0], hf.model.layers[-1]
    assert all(a is b for a, b in zip(first.parameters(), last.parameters(), strict=True))
    assert not any(part.is_meta for part in hf.parameters())
    before = {path: module.__dict__.get("forward") for path, module in hf.named_modules()}
    assert self_check_seconds(hf) > 0
    assert self_check_seconds(hf) > 0
    assert {path: module.__dict__.get("forward") for path, module in hf.named_modules()} == before
