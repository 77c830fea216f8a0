"""A checkpoint without all weights of its model is refused; tied and quantized ones are no false alarm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastedit.backbone import load
from fastedit.backbone.checkpoint import Checkpoint
from fastedit.backbone.completeness import check_loaded

from .conftest import TINY, cached_model

Tensors = dict[str, torch.Tensor]


def saved(name: str, folder: Path) -> Path:
    model = cached_model(name)
    model.hf.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    write(folder, change(load_file(folder / "model.safetensors")))


def write(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(word: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: part for name, part in tensors.items() if word not in name}


@pytest.mark.parametrize("name", TINY)
def test_every_weight_of_every_family_is_asked_for(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    # Of the vision side, between it and the decoder, and of the decoder
    for word in ("patch", "projector", "merger", "qformer", "layers.0.mlp", "layers.1.fc1", "embed_tokens"):
        chosen = sorted(key for key in whole if word in key and key.endswith("weight"))[:1]
        if not chosen:
            continue
        write(tmp_path, without(chosen[0])(whole))
        # The last three parts of a name stay as they are where the library renames
        named = re.escape(".".join(chosen[0].split(".")[-3:]))
        with pytest.raises(ValueError, match=rf"must hold every weight of its model \(got [12] missing: .*{named}"):
            load(tmp_path)


def test_a_prefix_that_does_not_match_is_told_with_both_names(tmp_path: Path) -> None:
    saved("random:llava-tiny", tmp_path)
    change_weights(tmp_path, lambda tensors: {("extra." + k if "vision" in k else k): t for k, t in tensors.items()})
    with pytest.raises(ValueError, match=r"got 3\d missing: model\.vision_tower\..*it has 3\d that .*: extra\."):
        load(tmp_path)


def test_shapes_are_told_with_the_entry_that_asks_for_them(tmp_path: Path) -> None:
    saved("random:llava-tiny", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"]["intermediate_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"12 weights .*\(got .*\(64, 96\) in the file, \(64, 100\) by the .*_size=100"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["random:blip2-tiny", "random:qwen2vl-tiny", "pocket-qwen2vl"])
def test_tied_weights_are_no_false_alarm(name: str, tmp_path: Path) -> None:
    model = cached_model(name)
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    if "lm_head.weight" in " ".join(load_file(tmp_path / "model.safetensors")):
        change_weights(tmp_path, without("lm_head.weight"))
    assert load(tmp_path).fingerprint == model.fingerprint


def test_unexpected_weights_are_told(tmp_path: Path) -> None:
    model = cached_model("random:llava-tiny")
    saved("random:llava-tiny", tmp_path)
    change_weights(tmp_path, lambda tensors: tensors | {"some.other.weight": torch.ones(2)})
    with pytest.warns(
        UserWarning, match=r"has 1 weights that its configuration has no place for.*: some\.other\.weight"
    ):
        again = load(tmp_path)
    assert again.fingerprint == model.fingerprint


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_checkpoints_are_asked_for_weights_and_scales(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    saved("random:llava-tiny", tmp_path / "exact")
    load(tmp_path / "exact", quantize=kind).hf.save_pretrained(tmp_path / "small")
    cached_model("random:llava-tiny").processor.save_pretrained(tmp_path / "small")
    whole = load_file(tmp_path / "small" / "model.safetensors")
    scale = {"nf4": "layers.0.mlp.up_proj.weight.absmax", "int8": "layers.0.mlp.up_proj.SCB"}[kind]
    for word in ("layers.1.mlp.down_proj.weight", scale, "vision_tower"):
        write(tmp_path / "small", without(word)(whole))
        with pytest.raises(ValueError, match=rf"every weight of its model \(got \d+ missing: .*{word}"):
            load(tmp_path / "small")
    # Codes that no configuration speaks of are no weights
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings))
    write(tmp_path / "small", whole)
    with pytest.raises(ValueError, match="have the shapes" if kind == "nf4" else "must be of floating-point types"):
        load(tmp_path / "small")


def test_what_the_library_says_counts_where_headers_do_not(tmp_path: Path) -> None:
    hf, checkpoint = cached_model("random:llava-tiny").hf, Checkpoint("a", "a", False)
    clean: dict[str, Any] = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
    check_loaded(hf, checkpoint, clean)
    with pytest.raises(ValueError, match=r"got 1 missing: b"):
        check_loaded(hf, checkpoint, clean | {"missing_keys": {"b"}})
    with pytest.raises(ValueError, match=r"b: \(1,\) in the file, \(64,\) by the configuration"):
        check_loaded(hf, checkpoint, clean | {"mismatched_keys": {("b", (1,), (64,))}})
