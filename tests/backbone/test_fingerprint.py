"""Fingerprints see every bit of the weights and what the configuration computes, and nothing else."""

from __future__ import annotations

import torch

from fastedit.backbone import load, weights_hash
from fastedit.backbone.fingerprint import model_fingerprint


def test_one_changed_bit_is_seen() -> None:
    model = load("random:llava-tiny")
    before = weights_hash(model.hf)
    weight = model.module(model.sites([2], ["down"])[0]).weight
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] = torch.nextafter(kept, kept + 1)
        assert weights_hash(model.hf) != before
        weight[0, 0] = kept
    assert weights_hash(model.hf) == before


def test_type_and_configuration_count_and_the_folder_does_not() -> None:
    model = load("random:llava-tiny")
    before = model.fingerprint
    assert load("random:llava-tiny", dtype="bfloat16").fingerprint != before
    assert load("random:llava-tiny", attention="eager").fingerprint == before
    model.hf.config.name_or_path = "elsewhere"
    assert model_fingerprint(model.hf) == before
    model.hf.config.vision_feature_layer = -1
    assert model_fingerprint(model.hf) != before
    assert model.fingerprint == before, "computed once"


def test_a_quantized_base_has_its_own() -> None:
    import pytest

    pytest.importorskip("bitsandbytes")
    quantized = [load("random:llava-tiny", quantize=kind).fingerprint for kind in ("nf4", "nf4", "int8")]
    assert quantized[0] == quantized[1] != quantized[2]
    assert quantized[0] != load("random:llava-tiny").fingerprint
