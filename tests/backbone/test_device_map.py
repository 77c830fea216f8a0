"""Places for the parts of a checkpoint: what is asked for, what accelerate makes of it, what is refused."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone.device_map import DISK, DeviceMap, checked_map
from fastedit.backbone.settings import settled_dtype
from fastedit.backbone.synthetic.processors import made_up_tokenizer

from .architectures import VOCABULARY, make_stock

pytest.importorskip("accelerate")
LAYERS = "model.language_model.layers"


def load(**options: Any) -> Any:
    return fastedit.load("pocket-llava", **options)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to read weights."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", read)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "atuo"}, "device_map must be one of auto, .*nearest is 'auto'"),
        ({"device_map": {}}, "or devices by module path"),
        ({"device_map": 3}, "or devices by module path"),
        ({"device_map": {"": "gpu"}}, "device_map of '': 'disk', a GPU's number, or a device must be one of"),
        ({"device_map": {"": 7}}, "device must be one that this machine has .*cuda:7"),
        ({"device_map": {1: "cpu"}}, "must have module paths for keys"),
        ({"device_map": "auto", "device": "cpu"}, "device or device_map must be given, not both"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory must come with a device_map"),
        ({"offload_folder": "there"}, "offload_folder must come with a device_map"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"}}, "max_memory must come with one of auto"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory must be bytes, or '10GiB'"),
        ({"device_map": "auto", "max_memory": {"cpu": True}}, "max_memory must be bytes, or '10GiB'"),
        ({"device_map": "auto", "max_memory": 5}, "max_memory must be bytes, or '10GiB'"),
        ({"device_map": {"": "cpu"}, "offload_folder": __file__}, "offload_folder must be a folder"),
        ({"device_map": {LAYERS: "cpu"}}, 'a place for every weight, "" for the rest'),
        ({"device_map": {"": "cpu", "model.language_model.layrs": "disk"}}, f"nearest is '{LAYERS}'"),
        ({"device_map": {"": DISK}, "quantize": "nf4"}, "quantized weights must be on devices, not on disk"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(options: dict[str, Any], said: str) -> None:
    if options.get("quantize"):
        pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=said):
        load(**options)


def test_random_weights_are_of_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="must be of a checkpoint's weights"):
        fastedit.load("random:llava-tiny", device_map="auto")


def test_without_accelerate_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        load(device_map="auto")


def test_a_layer_stays_on_one_device() -> None:
    hf = load().hf
    places: dict[str, Any] = {"": torch.device("cuda", 0), f"{LAYERS}.1.mlp": torch.device("cuda", 1)}
    with pytest.raises(ValueError, match=f"keep a decoder layer on one device .*{LAYERS}.1"):
        DeviceMap(places).settled(hf, quantized=False)
    places[f"{LAYERS}.1.mlp"] = DISK
    settled = DeviceMap(places).settled(hf, quantized=False)
    assert settled.places[f"{LAYERS}.1.mlp"] == DISK
    assert settled.places[f"{LAYERS}.1.self_attn"] == torch.device("cuda", 0)
    assert settled.device == torch.device("cuda", 0)


def test_what_is_left_of_a_device_goes_to_the_next() -> None:
    whole = load()
    everything = load(device_map="auto")
    assert everything.fingerprint == whole.fingerprint
    assert not any(part.is_meta for part in everything.hf.parameters())
    some = load(device_map="auto", max_memory={"cpu": "1MiB"})
    assert any(part.is_meta for part in some.hf.parameters())
    assert some.fingerprint == whole.fingerprint
    assert some.answer(None, "what is it?") == whole.answer(None, "what is it?")


def test_weights_that_are_written_anew_go_with_their_model(tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "offloaded"
    make_stock("qwen3_moe", torch.float32).save_pretrained(checkpoint)
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="offload_folder must be given"):
        fastedit.load(checkpoint, device_map={"": "disk"})
    whole = fastedit.load(checkpoint)
    model = fastedit.load(checkpoint, device_map={"": "disk"}, offload_folder=folder)
    assert list(folder.rglob("*.safetensors"))
    assert model.answer(None, "what is it?", max_new_tokens=4) == whole.answer(None, "what is it?", max_new_tokens=4)
    del model
    gc.collect()
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_a_failed_load_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", read)
    with pytest.raises(ValueError, match="must be readable"):
        load(device_map={"": "disk"}, offload_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_asked_for_without_a_map() -> None:
    assert checked_map(None, "cpu", None, None, "pocket-llava") is None


def test_the_type_is_the_checkpoints_own_off_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settled_dtype("auto", torch.device("cpu")) == "auto"
    assert settled_dtype("auto", torch.device("cuda")) is None
    assert settled_dtype("float32", torch.device("cuda")) == "float32"
    make_stock("llama", torch.bfloat16).save_pretrained(tmp_path)
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(tmp_path)
    assert fastedit.load(tmp_path).dtype == torch.float32
    # A GPU that there is none of: everything else is as it would be there
    monkeypatch.setattr("fastedit.backbone.loading.checked_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.from_pretrained",
        lambda *_args, **options: (_ for _ in ()).throw(ValueError(f"asked for {options['dtype']}")),
    )
    with pytest.raises(ValueError, match=r"asked for torch\.bfloat16"):
        fastedit.load(tmp_path)
