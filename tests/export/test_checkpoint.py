"""A model with other weights as a folder: tied weights, types, processors; the model in memory is only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.synthetic.processors import made_up_tokenizer
from fastedit.export.checkpoint import save_processor, size_bytes, state_dict, write_checkpoint
from tests.backbone.architectures import TEXTS, VOCABULARY, make_stock


def stored(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditableModel:
    monkeypatch.setitem(TEXTS, "llama", TEXTS["llama"] | {"tie_word_embeddings": True})
    make_stock("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(tmp_path / "base")
    return fastedit.load(tmp_path / "base", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_tied_weights_are_written_once(tied: EditableModel, dtype: torch.dtype | None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(tied, {}, tmp_path / "out", dtype=dtype)
    names, base = stored(tmp_path / "out"), stored(tmp_path / "base")
    assert set(names) == set(base)
    assert "lm_head.weight" not in names
    assert all(torch.equal(names[name].to(torch.bfloat16), base[name]) for name in base)
    size = sum(value.numel() * value.element_size() for value in names.values())
    assert size == size_bytes(tied.hf, tied.dtype, dtype)
    again = fastedit.load(tmp_path / "out", dtype=None)
    assert again.hf.lm_head.weight is again.hf.model.embed_tokens.weight
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype or tied.dtype)[6:]


def test_weights_that_are_kept_in_another_type_keep_it() -> None:
    model = fastedit.load("random:llava-tiny", dtype="bfloat16")
    layer = model.hf.model.language_model.layers[0]
    layer.input_layernorm.float()
    state = state_dict(model.hf, {}, torch.bfloat16, torch.float16)
    name = "model.language_model.layers.0.input_layernorm.weight"
    assert state.pop(name).dtype == torch.float32
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert model.dtype == torch.bfloat16


def test_unchanged_weights_are_not_copied(tied: EditableModel) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    other = torch.zeros(96, 64, dtype=torch.bfloat16)
    state = state_dict(tied.hf, {name: other}, tied.dtype, None)
    for key, value in tied.hf.state_dict().items():
        assert (state[key].data_ptr() == value.data_ptr()) is (key != name)
    assert state[name] is other


def test_adapters_in_the_model_are_refused(tied: EditableModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up_proj"], r=2), tied.hf)
    with pytest.raises(ValueError, match=r"adapters are merged or removed before \(got '.*base_layer"):
        write_checkpoint(tied, {}, tmp_path)


def test_a_processor_in_parts_comes_with_the_files_of_its_checkpoint(tmp_path: Path) -> None:
    model = fastedit.load("pocket-qwen2vl")
    write_checkpoint(model, {}, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"} <= written
    assert "model_card.json" not in written


@pytest.mark.parametrize("names", ["older", "the model's own"])
def test_weights_are_written_under_the_names_that_they_were_read_by(names: str, tmp_path: Path) -> None:
    model = fastedit.load("pocket-llava")
    model.hf.save_pretrained(tmp_path / "base")
    save_processor(model, tmp_path / "base")
    older = stored(tmp_path / "base")
    state = (
        older if names == "older" else {n: v.clone() for n, v in model.hf.state_dict().items() if n != "lm_head.weight"}
    )
    assert not set(older) <= set(model.hf.state_dict())
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    write_checkpoint(fastedit.load(tmp_path / "base"), {}, tmp_path / "out")
    assert set(stored(tmp_path / "out")) == set(state)
