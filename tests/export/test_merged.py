"""A merged checkpoint answers as the edits do, in programs that know nothing of them; the base is not touched."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import fastedit
from fastedit import EditRequest, Run
from fastedit.backbone import EditableModel
from fastedit.backbone.fingerprint import weights_hash
from fastedit.backbone.synthetic.processors import made_up_tokenizer
from fastedit.evaluation import exact_match
from fastedit.export import export_deltas
from tests.backbone.architectures import VOCABULARY, make_stock
from tests.engine.conftest import make_edits
from tests.export.client import ask_client


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return list(fastedit.read_edits("pocket-vqa", split="eval")[:3])


@pytest.fixture(scope="module")
def pocket() -> EditableModel:
    return fastedit.load("pocket-llava")


def fitted(model: EditableModel, edits: list[EditRequest], method: str = "lora", **settings: Any) -> Run:
    options = {"mode": "sequential", "evaluate": False, "show_progress": False, **settings}
    return fastedit.edit(model, edits, method, **options)


@pytest.mark.parametrize(
    ("name", "method"),
    [("pocket-llava", "lora"), ("pocket-llava", "ft-vision"), ("pocket-blip2", "ft"), ("pocket-blip2", "ft-vision")],
)
def test_a_program_without_fastedit_answers_as_the_edits_do(
    name: str, method: str, edits: list[EditRequest], tmp_path: Path
) -> None:
    model = fastedit.load(name)
    deltas = fitted(model, edits, method).deltas
    queries = [request.query for request in edits]
    base = model.generate(queries, max_new_tokens=12)
    with fastedit.applied(model, deltas):
        wanted = model.generate(queries, max_new_tokens=12)
    assert wanted != base
    exported = export_deltas("merged", model, deltas, tmp_path / "out", max_shard_size="500KB")
    assert len([path for path in exported.files if path.suffix == ".safetensors"]) > 10
    client = ask_client(model, tmp_path / "out", queries, tmp_path)
    assert client["answers"] == wanted
    assert client["dtype"] == "torch.float32"
    if method == "lora":
        assert client["piped"] == wanted[0]


def test_weights_of_another_processor_serve_its_family(edits: list[EditRequest], tmp_path: Path) -> None:
    model = fastedit.load("pocket-qwen2vl")
    deltas = fitted(model, edits, "ft").deltas
    export_deltas("merged", model, deltas, tmp_path / "out")
    queries = [request.query for request in edits]
    with fastedit.applied(model, deltas):
        wanted = model.generate(queries, max_new_tokens=12)
    assert fastedit.load(tmp_path / "out").generate(queries, max_new_tokens=12) == wanted


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_text_model_is_merged(kind: str, tmp_path: Path) -> None:
    make_stock(kind, torch.float32).save_pretrained(tmp_path / "base")
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(tmp_path / "base")
    model = fastedit.load(tmp_path / "base")
    edit = EditRequest("what is it?", "a red car", id="a")
    run = fastedit.edit(model, [edit], "lora", steps=60, lr=0.02, evaluate=False, show_progress=False)
    exported = export_deltas("merged", model, run.deltas, tmp_path / "out", requests=[edit], max_new_tokens=8)
    assert exported.report["held"] == {"asked": 1, "before_rounding": 1, "written": 1, "lost": []}
    assert ask_client(model, tmp_path / "out", [edit.query], tmp_path)["answers"][0] == "a red car"


def test_other_weights_are_the_base_and_configurations_are_written(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    deltas = fitted(pocket, edits).deltas
    exported = export_deltas("merged", pocket, deltas, tmp_path / "out")
    state, changed = pocket.hf.state_dict(), set(exported.report["weights"])
    again = fastedit.load(tmp_path / "out")
    assert changed
    for name, value in again.hf.state_dict().items():
        assert torch.equal(value, state[name]) is (name not in changed), name
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == pocket.hf.generation_config.eos_token_id
    assert again.processor.chat_template == pocket.processor.chat_template
    # Nothing of this machine
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_rounding_is_reported_and_edits_are_asked_again(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    deltas = fitted(pocket, edits).deltas
    exported = export_deltas("merged", pocket, deltas, tmp_path / "out", requests=edits, dtype="bfloat16")
    with fastedit.applied(pocket, deltas):
        before = pocket.generate([edit.query for edit in edits])
    written = fastedit.load(tmp_path / "out", dtype=None)
    assert written.dtype == torch.bfloat16
    after = written.generate([edit.query for edit in edits])
    held = exported.report["held"]
    assert held["before_rounding"] == sum(exact_match(a, e.target) for a, e in zip(before, edits, strict=True)) > 0
    assert held["written"] == sum(exact_match(a, e.target) for a, e in zip(after, edits, strict=True))
    for entry in exported.report["weights"].values():
        # Half a unit in the last of eight bits, of weights below two
        assert 1e-5 < entry["largest_rounding"] <= 2**-8
        assert entry["relative_rounding"] < 0.01


def test_an_edit_that_rounding_undoes_is_counted_as_lost(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.export import merged

    monkeypatch.setattr(merged, "load", lambda *_args, **_options: pocket)
    deltas = fitted(pocket, edits).deltas
    held = export_deltas("merged", pocket, deltas, tmp_path / "out", requests=edits).report["held"]
    assert held["before_rounding"] > held["written"]
    assert {lost["id"] for lost in held["lost"]} <= {edit.id for edit in edits}
    assert len(held["lost"]) == held["before_rounding"] - held["written"]
    assert all(exact_match(lost["before_rounding"], lost["target"]) for lost in held["lost"])


def test_products_of_the_base_are_asked_of_its_type_alone(edits: list[EditRequest], tmp_path: Path) -> None:
    try:
        model = fastedit.load("pocket-llava", linear="onednn")
    except ValueError as error:
        pytest.skip(str(error))
    deltas = fitted(model, edits).deltas
    for dtype in ("float32", "bfloat16"):
        exported = export_deltas("merged", model, deltas, tmp_path / dtype, requests=edits, dtype=dtype)
        assert exported.report["held"]["written"] > 0


def test_a_half_precision_base_stays_so(edits: list[EditRequest], tmp_path: Path) -> None:
    model = fastedit.load("pocket-llava", dtype="bfloat16")
    deltas = fitted(model, edits).deltas
    exported = export_deltas("merged", model, deltas, tmp_path / "out")
    assert exported.report["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_base_is_bit_identical_while_others_use_it(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    deltas = fitted(pocket, edits).deltas
    queries = [edit.query for edit in edits]
    base, weights = pocket.generate(queries), weights_hash(pocket.hf)
    config, generation = pocket.hf.config.to_dict(), pocket.hf.generation_config.to_dict()
    versions = [part._version for part in pocket.hf.parameters()]
    seen: list[list[str]] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            seen.append(pocket.generate(queries))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        export_deltas("merged", pocket, deltas, tmp_path / "out", dtype="float16")
    finally:
        done.set()
        thread.join()
    assert all(answers == base for answers in seen)
    assert weights_hash(pocket.hf) == weights
    assert [part._version for part in pocket.hf.parameters()] == versions
    assert (pocket.hf.config.to_dict(), pocket.hf.generation_config.to_dict()) == (config, generation)


def test_an_error_leaves_neither_a_folder_nor_a_changed_base(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils as library

    deltas, weights = fitted(pocket, edits).deltas, weights_hash(pocket.hf)
    written = library.safe_save_file
    calls: list[Any] = []

    def fills_up(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*args, **options)

    monkeypatch.setattr(library, "safe_save_file", fills_up)
    with pytest.raises(OSError, match="No space left"):
        export_deltas("merged", pocket, deltas, tmp_path / "out", max_shard_size="500KB")
    assert list(tmp_path.iterdir()) == []
    assert weights_hash(pocket.hf) == weights


def test_a_disk_without_room_is_refused_before_work(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(1 << 20, 0, 1 << 20))
    deltas = fitted(pocket, edits).deltas
    with pytest.raises(ValueError, match=r"export: the disk has room .* for 1.0 MiB"):
        export_deltas("merged", pocket, deltas, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_no_weights_can_stand_for_is_refused(
    pocket: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    deltas = fitted(pocket, edits, mode="single").deltas
    with pytest.raises(ValueError, match=r"was fitted alone, .* check_sequence=False"):
        export_deltas("merged", pocket, deltas, tmp_path / "out")
    export_deltas("merged", pocket, deltas, tmp_path / "out", check_sequence=False)
    with pytest.raises(ValueError, match=r"dtype 'bfloat61' is not known; did you mean 'bfloat16'"):
        export_deltas("merged", pocket, deltas[:1], tmp_path / "other", dtype="bfloat61")
    with pytest.raises(ValueError, match=r"'merged' writes changes of weights, and .* fastedit.attach"):
        export_deltas("merged", pocket, fitted(pocket, edits[:1], "grace").deltas, tmp_path / "other")
    quantized = fastedit.load("random:llava-tiny", quantize="int8")
    delta = fitted(quantized, make_edits(1), steps=1).deltas[0]
    with pytest.raises(ValueError, match=r"quantize='none', .* \(got quantize='int8'\)"):
        export_deltas("merged", quantized, delta, tmp_path / "other")
    assert not (tmp_path / "other").exists()
