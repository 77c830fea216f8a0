"""Deltas of every method on several models, and calls of the stock models that they act in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.backbone.generation import Reader
from fastedit.backbone.generic.adapter import generic
from fastedit.deltas import EditDelta
from fastedit.methods import resolve
from fastedit.training import Artifact
from tests.backbone.architectures import make_editable, make_stock
from tests.engine.conftest import make_edits, picture

NEW = 5
STRONG: dict[str, Any] = {"steps": 25, "lr": 2e-2, "stop_loss": None}
#: Settings under which an edit is felt in a moment.
METHODS: dict[str, dict[str, Any]] = {
    "ft": {**STRONG, "layers": 2},
    "ft-vision": STRONG,
    "lora": STRONG,
    "mend": {},
    "ke": {},
    "tpatcher": {"steps": 25, "lr": 5e-2},
    "unike": {"steps": 25, "lr": 5e-2},
    "ldke": {"steps": 15},
    "wise": {"steps": 10},
    "grace": {"steps": 25},
    "serac": {},
    "ike": {"k": 2},
    "odedit+lora": {"steps": 8, "lr": 2e-2},
    "odedit+unike": {"steps": 8, "lr": 5e-2},
}
#: Trained parts that are made in a moment.
HASTY: dict[str, Any] = {"steps": 2, "batch_size": 2, "valid_every": 2, "warmup": 0}
#: Computed changes of hardly trained parts are too small to be felt.
FELT = {"mend": 3.0, "ke": 3.0}


def load(name: str, dtype: str = "float64") -> EditableModel:
    """A tiny random or embedded model, or, after "generic:", one of an architecture that is walked by tracing."""
    return _loaded(name, dtype)


@functools.cache
def _loaded(name: str, dtype: str) -> EditableModel:
    if name.startswith("generic:"):
        key = name.partition(":")[2]
        return make_editable(key, make_stock(key, getattr(torch, dtype)))
    return fastedit.load(name, dtype=dtype)


def edits() -> list[EditRequest]:
    """Two, of different lengths."""
    return [dataclasses.replace(edit, prompt=f"{edit.prompt} {'really ' * n}") for n, edit in enumerate(make_edits(2))]


def records() -> list[EditRequest]:
    """To learn from: none of them is edited."""
    return [dataclasses.replace(edit, id=f"train-{edit.id}") for edit in make_edits(12)[6:]]


@functools.cache
def artifact(name: str, dtype: str, kind: str) -> Artifact:
    """Trained parts of a method on a model."""
    known = {field.name for field in dataclasses.fields(resolve(kind, {}).config)}
    few = {key: value for key, value in {"steps": 2, "valid_records": 2}.items() if key in known}
    return fastedit.train(load(name, dtype), kind, records(), trainer=HASTY, show_progress=False, **few)


@functools.cache
def fitted(name: str, method: str, dtype: str = "float64", mode: str = "single", **settings: Any) -> list[EditDelta]:
    """The deltas of two edits by a method."""
    model, plan = load(name, dtype), resolve(method, {})
    options: dict[str, Any] = {"evaluate": False, "show_progress": False, "pool": records(), "mode": mode}
    options |= METHODS[method] | settings
    kind = plan.artifact_kind
    if kind is not None:
        options["artifact"] = artifact(name, dtype, kind)
    deltas = list(fastedit.edit(model, edits(), method, **options).deltas)
    scale = FELT.get(method)
    if scale is None:
        return deltas
    return [
        dataclasses.replace(delta, tensors={key: tensor * scale for key, tensor in delta.tensors.items()})
        for delta in deltas
    ]


def questions(model: EditableModel) -> list[Query]:
    """Of several lengths: the edits' own, one reworded, the same of another image, others with and without image."""
    own = [Query(edit.prompt, edit.image) for edit in edits()]
    again = Query(str(edits()[0].rephrase), edits()[0].image)
    near, other = Query(edits()[0].prompt, picture(91)), Query("what is it ?", picture(92))
    if needs_images(model):
        return [*own, again, near, other, Query("how many are there in it ?", picture(93))]
    return [*own, again, near, other, Query("of what colour is that thing over there ?")]


def needs_images(model: EditableModel) -> bool:
    """Whether its stock generate takes no question without an image."""
    return "blip2" in model.name


def inputs(model: EditableModel, asked: Sequence[Query], *, left: bool, answers: bool = False) -> dict[str, Tensor]:
    """Arguments of the stock forward, padded on one side; with answers, labels too."""
    encoded = model.encode(asked, answers=answers)
    given = dict(encoded.model_inputs)
    traced = generic(model.adapter)
    if traced is not None and traced._block_types:
        given["token_type_ids"] = encoded.image_mask.long()
    if answers:
        place = torch.arange(encoded.input_ids.shape[1])
        answered = (place > encoded.last_prompt[:, None]) & encoded.attention_mask
        given["labels"] = torch.where(answered, encoded.input_ids, -100)
    if not left:
        return given
    order = torch.argsort(given["attention_mask"], dim=1, stable=True)
    for name, tensor in given.items():
        if tensor.shape == order.shape:
            given[name] = torch.gather(tensor, 1, order)
    return given


def stock_answers(model: EditableModel, hf: Any, asked: Sequence[Query], **options: Any) -> list[str]:
    """Answers of the stock model's own generate, greedy unless options say otherwise."""
    given = inputs(model, asked, left=True)
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": list(model.end_token_ids)}
    ids = hf.generate(**given, **settings | options)
    new = ids[:, given["input_ids"].shape[1] :] if ids.shape[1] > NEW else ids
    return texts(model, new)


def texts(model: EditableModel, ids: Tensor) -> list[str]:
    """Answers of generated tokens (R, N)."""
    found = []
    for row in ids.tolist():
        end = next((n for n, token in enumerate(row) if token in model.end_token_ids), len(row))
        found.append(model.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def engine_logits(model: EditableModel, asked: Sequence[Query]) -> Tensor:
    """(R, V) of the next tokens after every question, by the engine's own walk."""
    for holder in model.holders:
        asked = holder.rewrite_prompts(asked)
    return model.head(Reader(model, model.encode(asked, answers=False), 4).read())


@torch.no_grad()
def stock_logits(model: EditableModel, hf: Any, asked: Sequence[Query], **options: Any) -> Tensor:
    """(R, V) of the next tokens after every question, by the stock forward of rows padded on the left."""
    logits: Tensor = hf(**inputs(model, asked, left=True), **options).logits[:, -1]
    return logits
