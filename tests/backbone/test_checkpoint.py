"""Folders of strangers: whatever is broken in them is one ValueError with file and rule, within seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastedit.backbone import load
from fastedit.backbone.checkpoint import reading
from fastedit.backbone.headers import read_header
from fastedit.backbone.json_files import read_object
from fastedit.pocket import model_path

Damage = Callable[[Path], Any]
SHARD = "model-00001-of-00001.safetensors"
DEEP = "[" * 10_000 + "]" * 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path("pocket-llava"), tmp_path / "model"))


def put(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def entry(name: str, path: str, value: Any) -> Damage:
    """Set an entry of a JSON file."""

    def change(folder: Path) -> None:
        entries = json.loads((folder / name).read_text())
        *outer, last = path.split(".")
        inner = entries
        for key in outer:
            inner = inner[key]
        inner[last] = value
        (folder / name).write_text(json.dumps(entries))

    return change


def config(path: str, value: Any) -> Damage:
    return entry("config.json", path, value)


def index(**entries: Any) -> Damage:
    """Bring the weights into a shard, with an index that says something else of it."""

    def change(folder: Path) -> None:
        keys = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / SHARD)
        whole: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(keys, SHARD)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(whole | entries))

    return change


def header(content: bytes | dict[str, Any], length: int | None = None, data: bytes = b"") -> Damage:
    spelled = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = (len(spelled) if length is None else length).to_bytes(8, "little")
    return put("model.safetensors", start + spelled + data)


def cut(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def tensor(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "config is a list": (put("config.json", "[]"), r"config\.json must hold one object \(got a list\)"),
    "config is not UTF-8": (put("config.json", b'{"a": "\xe9"}'), r"config\.json must be UTF-8 text"),
    "config is nested": (put("config.json", f'{{"a": {DEEP}}}'), r"config\.json must be nested less than 100 deep"),
    "config has a huge number": (put("config.json", '{"a": ' + "9" * 5000 + "}"), r"config\.json must be JSON \(got"),
    "config has NaN": (config("text_config.rms_norm_eps", float("nan")), r"text_config\.rms_norm_eps must be finite"),
    "config has 10**30": (config("text_config.hidden_size", 10**30), r"hidden_size must be finite and below 2\*\*53"),
    "a million layers": (
        config("text_config.num_hidden_layers", 10**6),
        r"num_hidden_layers must be at most 1024 \(got",
    ),
    "300 layers": (
        config("text_config.num_hidden_layers", 300),
        r"at most 128 \(got .*=300; the weights have 4 layers",
    ),
    "a layer more": (
        config("text_config.num_hidden_layers", 5),
        r"every weight of its model \(got 9 missing: .*layers\.4",
    ),
    "a tower of 10**9 layers": (
        config("vision_config.num_hidden_layers", 10**9),
        r"vision_config\.num_hidden_layers must",
    ),
    "10**9 labels": (config("num_labels", 10**9), r"num_labels must be at most 100000"),
    "10**9 wide": (
        config("text_config.hidden_size", 10**9),
        r"have the shapes .*with text_config\.hidden_size=1000000000",
    ),
    "10**12 words": (config("text_config.vocab_size", 10**12), r"text_config\.vocab_size=1000000000000"),
    "images of 10**6 pixels": (
        config("vision_config.image_size", 10**6),
        r"position_embedding\.weight: .* in the file",
    ),
    "no heads": (config("text_config.num_attention_heads", 0), r"no readable configuration .*ZeroDivisionError"),
    "text for a size": (config("text_config.hidden_size", "x"), r"no readable configuration .*hidden_size"),
    "another text model": (
        config("text_config.model_type", "bert"),
        r"transformers can build \(got AttributeError: BertModel",
    ),
    "an image token far away": (config("image_token_id", 10**9), r"the tokenizer must have the image token"),
    "no such feature layer": (config("vision_feature_layer", 99), r"the processor of .* must turn an image"),
    "index is a list": (
        lambda folder: [index()(folder), put("model.safetensors.index.json", "[]")(folder)],
        r"model\.safetensors\.index\.json must hold one object \(got a list\)",
    ),
    "weight_map is a list": (index(weight_map=[1]), r"index\.json: weight_map must be an object"),
    "no metadata": (index(metadata=None), r"index\.json: metadata must be an object"),
    "weight_map names a number": (index(weight_map={"a": 1}), r"must name safetensors files of the same folder"),
    "weight_map leads out": (index(weight_map={"a": "../x.safetensors"}), r"of the same folder \(got 'a': '\.\./x"),
    "weight_map is absolute": (index(weight_map={"a": "/x.safetensors"}), r"of the same folder \(got 'a': '/x"),
    "weight_map names a pickle": (index(weight_map={"a": "x.bin"}), r"must name safetensors files"),
    "weights are a link": (linked, r"must lie in its folder \(got .*model\.safetensors, a link out of it\)"),
    "weights are cut": (
        cut,
        r"model\.safetensors must hold the \d+ bytes of its tensors \(got \d+: cut off or damaged",
    ),
    "weights are empty": (put("model.safetensors", b""), r"must hold its whole safetensors header \(got 0 bytes"),
    "header is longer": (header(b"{}", 10**12), r"whole safetensors header \(got 10 bytes, a header of 1000000000000"),
    "header is nested": (header(f'{{"a": {DEEP}}}'.encode()), r"the header must be nested less than 100 deep"),
    "header is a list": (header(b"[]"), r"the header must hold one object"),
    "header without shape": (header({"a": {"dtype": "F32"}}), r"a dtype, a shape and two data_offsets"),
    "header of another size": (header(tensor("F32", [10**30], [0, 4]), data=b"1234"), r"must be those of its shape"),
    "header with a gap": (header(tensor("F32", [1], [4, 8]), data=b"12345678"), r"must follow each other"),
    "generation settings are a list": (put("generation_config.json", "[]"), r"generation_config\.json must hold one"),
    "an end that is no token": (entry("generation_config.json", "eos_token_id", 10**9), r"eos_token_id must be tokens"),
    "tokenizer is cut": (put("tokenizer.json", "{"), r"tokenizer\.json must be JSON"),
    "tokenizer is empty": (put("tokenizer.json", "{}"), r"the processor of .* must be one that transformers can build"),
    "tokenizer of no kind": (entry("tokenizer.json", "model", None), r"the processor of .* must be one that"),
    "processor is a list": (put("processor_config.json", "[]"), r"processor_config\.json must hold one object"),
    "processor without size": (entry("processor_config.json", "patch_size", 0), r"must turn an image .*ZeroDivision"),
    "processor of other patches": (
        entry("processor_config.json", "patch_size", 7),
        r"as many tokens .*tokens=81, features=16",
    ),
    "processor of a huge image": (
        entry("processor_config.json", "image_processor.size", {"shortest_edge": 10**6}),
        r"size\.shortest_edge must be in 1\.\.16384 \(got size\.shortest_edge=1000000\)",
    ),
    "an adapter": (put("adapter_config.json", "{}"), r"must be a whole model"),
    "an unquantized checkpoint that says it is": (
        config("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"quantization_config must be absent from config\.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_file_and_rule(damage: str, folder: Path) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"^load: .*{message}"):
        load(folder)
    assert time.monotonic() - begun < 60


def test_a_whole_folder_loads_also_in_shards_and_from_a_download_cache(folder: Path) -> None:
    fingerprint = load(folder).fingerprint
    index()(folder)
    assert load(folder).fingerprint == fingerprint
    # As the library lays out what it downloads: links into the blobs beside the snapshots
    snapshot = folder.parent / "models--a--b" / "snapshots" / "0"
    shutil.copytree(folder, snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (snapshot / SHARD).rename(blobs / "c0ffee")
    (snapshot / SHARD).symlink_to("../../blobs/c0ffee")
    assert load(snapshot).fingerprint == fingerprint


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16), "c": torch.ones((), dtype=torch.int8)}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    stored = read_header(tmp_path / "some.safetensors")
    assert {name: (each.dtype, each.shape) for name, each in stored.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (0,)),
        "c": ("I8", ()),
    }


def test_numbers_are_limited_only_where_they_are_sizes(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"most": 1000000000000000019884624838656}')
    assert read_object(path)["most"] > 2**53
    with pytest.raises(ValueError, match=r"some\.json: most must be finite and below 2\*\*53 \(got most=1000"):
        read_object(path, plain_numbers=True)


def test_errors_of_others_become_ours_and_ours_stay() -> None:
    for error in (KeyError("a"), RecursionError("deep"), AttributeError("b"), Exception("c")):
        rule = rf"^load: a thing must be whole \(got {type(error).__name__}: "
        with pytest.raises(ValueError, match=rule), reading("a thing must be whole"):
            raise error
    for error in (FileNotFoundError("a"), ImportError("b"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading("a thing must be whole"):
            raise error
    with pytest.raises(ValueError, match=r"^load: ours \(got 1\)$"), reading("a thing must be whole"):
        raise ValueError("load: ours (got 1)")
