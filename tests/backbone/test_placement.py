"""Layers in host memory and on disk, or on several devices: all is as for the model that is wholly in memory."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel, weights_hash
from fastedit.backbone.device_map import checked_map
from fastedit.backbone.generic.decoder import find_decoder
from fastedit.backbone.packed_forward import packed_start, packed_tail
from fastedit.backbone.placement import device_of, is_offloaded
from fastedit.backbone.synthetic.processors import made_up_tokenizer
from fastedit.requests import EditRequest, Query

from .architectures import VOCABULARY, make_editable, make_stock
from .claimed_devices import FIRST, SECOND, ClaimedDevices, place
from .conftest import picture

pytest.importorskip("accelerate")
#: Checkpoints with a fast path, and stock models that are walked by tracing: windows, experts, text alone.
LOADED = ("pocket-llava", "pocket-qwen2vl", "pocket-blip2")
WRAPPED = ("gemma3", "qwen3_vl_moe", "llama")


def layer_map(hf: Any) -> dict[str, str]:
    """Every other decoder layer on disk, and the head of a model that has one of its own."""
    layers: Any = find_decoder(hf).layers
    path = next(path for path, module in hf.named_modules() if module is layers)
    places = {f"{path}.{index}": ("cpu", "disk")[index % 2] for index in range(len(layers))}
    return {"": "cpu", **places}


@functools.cache
def folder_of(key: str) -> str:
    """A checkpoint of a tiny stock model."""
    folder = tempfile.mkdtemp()
    make_stock(key, torch.float64).save_pretrained(folder)
    return folder


@functools.cache
def whole(key: str) -> EditableModel:
    if key in LOADED:
        return fastedit.load(key, dtype="float64")
    return make_editable(key, stored(key))


def stored(key: str, **options: Any) -> Any:
    """A checkpoint as a caller loads it who then wraps it. The grouped kernels of experts refuse float64."""
    kind = type(make_stock(key))
    return kind.from_pretrained(folder_of(key), dtype=torch.float64, experts_implementation="eager", **options)


@pytest.fixture(scope="module", params=[*LOADED, *WRAPPED])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model in memory, and the same with parts of it on disk."""
    key = request.param
    memory = whole(key)
    if key in LOADED:
        yield memory, fastedit.load(key, dtype="float64", device_map=layer_map(memory.hf))
        return
    asked = checked_map(layer_map(memory.hf), None, None, tmp_path_factory.mktemp("weights"), key)
    assert asked is not None
    options = asked.settled(memory.hf, quantized=False).options(asked.offload_folder)
    yield memory, make_editable(key, stored(key, **options))


def questions(model: EditableModel) -> list[Query]:
    tall, wide = (None, None) if model.name == "llama" else (picture(0, 64, 30), picture(1, 40, 70))
    return [
        Query("what is it?", tall, "red"),
        Query("what color is the large square on the left side?", wide, "a yellow photo of two zebras"),
        Query("what?", None, "blue"),
    ]


def requests(model: EditableModel) -> list[EditRequest]:
    wide, tall = (None, None) if model.name == "llama" else (picture(0), picture(1, 64, 30))
    local = {"locality_prompt": "how many?", "locality_answer": "two"}
    return [EditRequest("what is it?", "red", wide, **local), EditRequest("what color?", "a zebra", tall, **local)]


def test_logits_answers_and_fingerprint_are_those_of_the_model_in_memory(pair: Any) -> None:
    memory, spread = pair
    assert is_offloaded(spread.hf)
    assert not is_offloaded(memory.hf)
    assert all(part.is_meta for part in spread.adapter.text.layers[1].parameters())
    encoded = memory.encode(questions(memory), answers=True)
    expected = memory.head(packed_tail(memory, packed_start(memory, encoded)))
    encoded = spread.encode(questions(spread), answers=True)
    assert torch.equal(spread.head(packed_tail(spread, packed_start(spread, encoded))), expected)
    asked = questions(memory)
    assert spread.generate(asked, max_new_tokens=6) == memory.generate(asked, max_new_tokens=6)
    assert spread.fingerprint == memory.fingerprint
    assert all(part.is_meta for part in spread.adapter.text.layers[1].parameters())


@pytest.mark.parametrize("method", ["ft", "lora", "grace", "odedit+lora", "wise"])
def test_deltas_are_those_of_the_model_in_memory(pair: Any, method: str) -> None:
    memory, spread = pair
    sites = memory.adapter.text.site_paths
    names = tuple(name for name in ("up", "gate_up", "block") if name in sites)[:1]
    options: dict[str, Any] = {"views": "record", "evaluate": False, "steps": 4, "layers": (1, 2), "names": names}
    if method in ("grace", "wise"):
        options = {"views": "record", "evaluate": False, "steps": 4}
        if "down" not in sites:
            pytest.skip("its experts have no map that this method edits")
    before = weights_hash(spread.hf)
    runs = [fastedit.edit(model, requests(model), method=method, **options) for model in pair]
    for delta, other in zip(*(run.deltas for run in runs), strict=True):
        assert delta.model_fingerprint == other.model_fingerprint
        for name, tensor in delta.tensors.items():
            assert (tensor - other.tensors[name]).abs().max() <= 1e-8 * tensor.abs().max().clamp(min=1), name
    answers = []
    for model in pair:
        request = requests(model)[0]
        # What was fitted on the one acts on the other
        with fastedit.applied(model, runs[0].deltas[0]):
            answers.append(model.answer(request.image, request.prompt, max_new_tokens=6))
    assert answers[0] == answers[1]
    assert weights_hash(spread.hf) == before


def test_what_is_kept_outlives_calls_that_exchange_the_weights(pair: Any, count_calls: Any) -> None:
    _, spread = pair
    first = spread.fingerprint
    spread.generate(questions(spread), max_new_tokens=2)
    tower = next((part for path, part in spread.hf.named_modules() if path.endswith(("vision_tower", "visual"))), None)
    calls = [] if tower is None else count_calls(tower)
    spread.generate(questions(spread), max_new_tokens=2)
    assert not calls
    assert spread._fingerprint == first


def test_a_trainers_model_on_disk_stays_what_it_is() -> None:
    memory = fastedit.load("pocket-llava", dtype="float64")
    spread = fastedit.load("pocket-llava", dtype="float64", device_map=layer_map(memory.hf))
    hf = spread.hf.train()
    layers: Any = find_decoder(hf).layers
    for part in hf.parameters():
        part.requires_grad_(False)
    for part in layers[1].parameters():
        part.requires_grad_(True)
    model = fastedit.wrap(hf, spread.processor)
    with model.frozen():
        assert not any(part.requires_grad for part in hf.parameters())
        answer = model.answer(picture(0), "what is it?")
    assert answer == memory.answer(picture(0), "what is it?")
    assert hf.training
    trained = [name for name, part in hf.named_parameters() if part.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)


def test_deltas_act_in_the_stock_model_on_disk() -> None:
    memory = fastedit.load("pocket-llava", dtype="float64")
    spread = fastedit.load("pocket-llava", dtype="float64", device_map=layer_map(memory.hf))
    (delta,) = fastedit.edit(
        memory, requests(memory)[:1], "lora", views="record", steps=20, lr=1e-2, evaluate=False
    ).deltas
    asked = Query(requests(memory)[0].prompt, requests(memory)[0].image)
    inputs = spread.encode([asked], answers=False).model_inputs
    before = spread.hf.generate(**inputs, do_sample=False, max_new_tokens=4)
    with fastedit.attached(spread.hf, [delta], processor=spread.processor):
        edited = spread.hf.generate(**inputs, do_sample=False, max_new_tokens=4)
    with fastedit.applied(memory, delta):
        expected = memory.answer(asked.image, asked.prompt, max_new_tokens=4)
    told = spread.tokenizer.decode(edited[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert told == expected
    assert not torch.equal(edited, before)
    assert torch.equal(spread.hf.generate(**inputs, do_sample=False, max_new_tokens=4), before)


def test_threads_take_turns_on_a_model_whose_weights_come_and_go() -> None:
    model = fastedit.load("pocket-llava", device_map={"": "disk"})
    expected = model.answer(picture(0), "what is it?", max_new_tokens=2)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(model.answer, picture(0), "what is it?", max_new_tokens=2) for _ in range(4)]
    assert {each.result() for each in asked} == {expected}


@pytest.mark.parametrize("key", ["pocket-llava", "pocket-blip2", "gemma3", "qwen3_5"])
def test_layers_on_several_devices(key: str) -> None:
    memory = whole(key)
    hf = fastedit.load(key, dtype="float64").hf if key in LOADED else stored(key)
    layers: Any = find_decoder(hf).layers
    path = next(path for path, module in hf.named_modules() if module is layers)
    places = {"": FIRST, **{f"{path}.{index}": SECOND for index in range(2, len(layers))}}
    head = hf.get_output_embeddings()
    if head.weight is not hf.get_input_embeddings().weight:
        places |= {name: SECOND for name, module in hf.named_modules() if module is head}
    options: dict[str, Any] = {"views": "record", "evaluate": False, "steps": 2}
    names = tuple(name for name in ("up", "down") if name in memory.adapter.text.site_paths)
    methods = {
        "odedit+lora": {"layers": (1, 2), "names": names},
        "ft": {"layers": (1,), "names": ("down",)},
    }
    with ClaimedDevices() as mode:
        place(hf, places)
        spread = fastedit.wrap(hf, memory.processor) if key in LOADED else make_editable(key, hf)
        assert spread.device == SECOND
        assert device_of(spread.adapter.text.layers[0]) == FIRST
        encoded = spread.encode(questions(spread), answers=True)
        logits = spread.head(packed_tail(spread, packed_start(spread, encoded)))
        assert logits.device == SECOND
        answers = spread.generate(questions(spread), max_new_tokens=5)
        deltas = [
            fastedit.edit(spread, requests(spread), method, **options, **fields).deltas
            for method, fields in methods.items()
        ]
        with fastedit.applied(spread, deltas[0][0]):
            edited = spread.answer(requests(spread)[0].image, "what is it?", max_new_tokens=5)
        assert mode.moves
    encoded = memory.encode(questions(memory), answers=True)
    assert torch.equal(logits, memory.head(packed_tail(memory, packed_start(memory, encoded))))
    assert answers == memory.generate(questions(memory), max_new_tokens=5)
    for (method, fields), found in zip(methods.items(), deltas, strict=True):
        expected = fastedit.edit(memory, requests(memory), method, **options, **fields).deltas
        for delta, other in zip(found, expected, strict=True):
            for name, tensor in delta.tensors.items():
                assert (tensor - other.tensors[name]).abs().max() <= 1e-8 * tensor.abs().max().clamp(min=1), name
    with fastedit.applied(memory, deltas[0][0]):
        assert memory.answer(requests(memory)[0].image, "what is it?", max_new_tokens=5) == edited


#: Answers of a model that is on disk as a whole, in a process of its own: its size, and what the process grew by.
MEASURED = """
import resource, sys, torch, fastedit
from fastedit.backbone.synthetic.skeleton import weight_bytes
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
fastedit.load("pocket-llava").answer(None, "what?")
before = peak()
model = fastedit.load(sys.argv[1], device_map={"": "disk"})
model.answer(None, "what is it?", max_new_tokens=3)
print(weight_bytes(model.hf), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no record of the process's peak")
def test_a_model_on_disk_takes_a_small_part_of_its_size_in_memory(tmp_path: Path) -> None:
    config = importlib.import_module("transformers").LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=VOCABULARY,
        eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    importlib.import_module("transformers").LlamaForCausalLM(config).save_pretrained(tmp_path)
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 190 << 20
    # The file that weights are read from is mapped: its pages count as the process's while nobody else wants them
    assert grown < size // 3, f"{grown >> 20} of {size >> 20} MiB"
