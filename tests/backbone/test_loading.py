"""Names, folders and checkpoints; every mistake refused with what was given and what is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastedit.backbone import load
from tests.backbone.padded import prefix, tail

from .conftest import TINY, cached_model, largest_gap, mixed_queries


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = cached_model("random:llava-tiny")
    model.hf.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = cached_model(name)
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == model.fingerprint
    first, second = (each.encode(mixed_queries(), answers=True) for each in (model, again))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)
    hidden = [tail(each, prefix(each, first, 1)) for each in (model, again)]
    assert largest_gap(*hidden) < 1e-5
    assert again.end_token_ids == model.end_token_ids


def test_types_are_as_asked_for(saved: Path) -> None:
    assert load(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert load(saved, dtype=None).dtype == torch.float32
    assert load("random:blip2-tiny", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen3vl-tiny"])
def test_bfloat16_runs_and_stays_near(name: str) -> None:
    model, exact = cached_model(name, dtype="bfloat16"), cached_model(name)
    encoded = model.encode(mixed_queries(), answers=True)
    mask = encoded.attention_mask
    logits = [each.head(tail(each, prefix(each, encoded, 1)))[mask].float() for each in (model, exact)]
    assert model.head(tail(model, prefix(model, encoded, 1))).dtype == torch.bfloat16
    assert largest_gap(*logits) < 0.6
    assert len(model.generate(mixed_queries(), max_new_tokens=3)) == len(mixed_queries())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "nf5"}, r"quantize must be one of none, nf4, int8 \(got quantize='nf5'; the nearest is 'nf4'\)"),
        ({"dtype": "fp32"}, r"dtype must be one of float32, .*\(got dtype='fp32'"),
        ({"attention": "flash"}, r"attention must be one of .*\(got attention='flash'; the nearest is 'flash_att"),
        ({"state_cache_mib": -1}, r"state_cache_mib must not be negative \(got state_cache_mib=-1\)"),
        ({"image_cache_mib": -1}, r"image_cache_mib must not be negative \(got image_cache_mib=-1\)"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("random:llava-tiny", **arguments)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"random shape must be one of .*nearest is 'llava-1.5-7b'"):
        load("random:llava-1.5-7")
    with pytest.raises(ValueError, match=r"got name_or_path='poket-llava'; the nearest known name is 'pocket-llava'"):
        load("poket-llava")
    with pytest.raises(ValueError, match="a folder that exists"):
        load("./absent/folder")


def test_folders_lacking_parts_are_refused_naming_all(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json, weights .*, an image processor .*, a tokenizer"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"lacks weights \(\*\.safetensors\)$"):
        load(tmp_path)
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors$"):
        load(tmp_path)


def test_unknown_families_are_refused_before_weights_are_read(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    # Not readable as weights: reaching them would be another error.
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(
        ValueError, match=r"must be one that transformers makes .* \(got model_type='clip'; the nearest"
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ValueError, match=r"no readable configuration \(got name_or_path="):
        load(tmp_path)


def test_end_tokens_come_from_the_generation_settings(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((saved / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 2]}))
    # The tokenizer's own end token first.
    assert load(tmp_path).end_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    assert load(tmp_path).end_token_ids == (7,)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:77", r"device must be one that this machine has \(got device='cuda:77'; there "),
        ("tpu", r"device must be one of cpu, cuda, mps, xpu, .* \(got device='tpu'\)"),
        ("meta", r"device must be one of cpu, .* \(got device='meta'\)"),
        ("cpu:3", r"device 'cpu' is a single one \(got device='cpu:3'\)"),
        ("", r"device must be one of cpu, .* \(got device=''\)"),
        (5, r"device must be one of cpu, .* \(got device=5\)"),
        (torch.device("cuda", 88), r"this machine has \(got device='cuda:88'"),
    ],
)
def test_devices_that_are_not_there_are_refused_before_anything_else(device: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("./absent/folder", device=device)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"got device='cuda'; there is none of this kind that torch"):
            load("./absent/folder", device="cuda")


@pytest.mark.parametrize("name", ["random:llava-tiny", "folder"])
def test_a_model_loaded_without_gradients_can_be_edited(name: str, saved: Path) -> None:
    with torch.inference_mode():
        model = load(saved if name == "folder" else name)
    with torch.no_grad():
        again = load(saved if name == "folder" else name)
    for each in (model, again):
        parts = [*each.hf.parameters(), *each.hf.buffers()]
        assert not any(part.is_inference() for part in parts)
    module = model.module(model.sites([3], ["down"])[0])
    scale = torch.ones(module.out_features, requires_grad=True)
    handle = module.register_forward_hook(lambda _m, _a, output: output * scale)
    encoded = model.encode(mixed_queries(), answers=True)
    model.head(tail(model, prefix(model, encoded, 2))).sum().backward()
    handle.remove()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0


def test_an_empty_list_of_end_tokens_is_none(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "a")
    settings = json.loads((saved / "generation_config.json").read_text())
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": []}))
    assert load(tmp_path / "a").end_token_ids == (2,)


def test_what_the_configuration_decides_is_said_before_weights_are_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "a")
    # Not readable as weights: reaching them would be another error.
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    config = json.loads((saved / "config.json").read_text())

    def refused(message: str, **entries: object) -> None:
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | entries))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a")

    refused(r"must have a decoder-only text model, .* with the text model 'bart'\)", text_config={"model_type": "bart"})
    refused(r"must be of bitsandbytes \(got quant_method='awq'\)", quantization_config={"quant_method": "awq"})
    refused(
        r"must be of type nf4 \(got bnb_4bit_quant_type='fp4'\)",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    )
