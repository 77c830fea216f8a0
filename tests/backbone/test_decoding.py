"""Answers written on the device: token by token what a walk that looks at each of them gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastedit
from fastedit.backbone import EditableModel, decoding
from fastedit.backbone import attention as attention_module
from fastedit.backbone import packed_forward as walk_module
from fastedit.backbone.generation import Reader, likeliest
from fastedit.requests import Query

from .conftest import cached_model, mixed_queries, picture

NAMES = ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny", "random:qwen3vl-tiny"]


@contextmanager
def looking(monkeypatch: pytest.MonkeyPatch, every: int) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "CHECK_EVERY", {"cpu": every})
        yield


def begun(model: EditableModel, queries: list[Query], room: int) -> tuple[Reader, dict[int, int]]:
    reader = Reader(model, model.encode(queries, answers=False), room)
    with torch.no_grad():
        first, _ = likeliest(model.head(reader.read()))
    return reader, dict(enumerate(first))


def by_row(reader: Reader, first: dict[int, int], most: list[int], written: Any = None) -> dict[int, list[int]]:
    """By a walk of its own for every token, as where a stock decoder is handed them."""
    answers = {row: list((written or {}).get(row, ())) for row in first}
    reader._decode_by_row(first, most, answers)
    return answers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("every", [1, 3, 8])
def test_answers_are_those_of_a_walk_that_looks_at_every_token(
    name: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that end in the middle, at once, by their number of tokens, or are not asked."""
    model = cached_model(name)
    queries = [*mixed_queries(), Query("is it?", picture(3)), Query("why", None)]
    reader, first = begun(model, queries, 14)
    free = by_row(reader, first, [14] * len(queries))
    monkeypatch.setattr(model, "end_token_ids", (free[1][3], free[0][6]))
    del first[2]
    most = [14, 14, 14, 5, 1, 14, 14][: len(queries)]
    wanted = by_row(reader, first, most)
    with looking(monkeypatch, every):
        for _ in range(2):
            # Again from what the first left behind
            assert reader.decode(first, most) == wanted
    assert len({len(tokens) for tokens in wanted.values()}) > 2
    # Behind what was read before
    longest = max(wanted, key=lambda row: len(wanted[row]))
    some = {row: tokens[:2] for row, tokens in wanted.items() if len(tokens) > 3}
    reader.extend(some, dict.fromkeys(some, 0))
    coming = {row: wanted[row][2] for row in some}
    with looking(monkeypatch, every):
        assert reader.decode(coming, most, some) == {row: wanted[row] for row in some}
    assert longest in some
    assert not reader.broken


@pytest.mark.parametrize("every", [1, 8])
def test_windows_and_shared_keys(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastedit.load("random:qwen2vl-tiny")
    text = model.adapter.text
    assert text.config.num_key_value_heads < text.config.num_attention_heads
    kinds = ["sliding_attention" if layer % 2 else "full_attention" for layer in range(model.n_layers)]
    monkeypatch.setattr(text, "kinds", kinds)
    monkeypatch.setattr(text.config, "sliding_window", 6, raising=False)
    reader, first = begun(model, mixed_queries(), 12)
    wanted = by_row(reader, first, [12] * len(reader))
    with looking(monkeypatch, every):
        assert reader.decode(first, [12] * len(reader)) == wanted
    monkeypatch.setattr(text, "kinds", ["full_attention"] * model.n_layers)
    assert reader.decode(first, [12] * len(reader)) != wanted


@pytest.mark.parametrize("every", [1, 8])
def test_more_tokens_than_there_was_room_for(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cached_model("random:llava-tiny")
    reader, first = begun(model, mixed_queries(), 40)
    wanted = by_row(reader, first, [40] * len(reader))
    small, _ = begun(model, mixed_queries(), 2)
    grown: list[int] = []
    assert small.past is not None
    grow = small.past.grow
    monkeypatch.setattr(small.past, "grow", lambda capacity: (grown.append(capacity), grow(capacity)))
    with looking(monkeypatch, every):
        assert small.decode(first, [40] * len(reader)) == wanted
    # By half every time
    assert 1 <= len(grown) <= 4


@pytest.mark.parametrize("every", [1, 8])
def test_a_row_whose_logits_are_not_finite_ends_and_says_so(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastedit.load("random:llava-tiny")
    queries = mixed_queries()
    reader, first = begun(model, queries, 12)
    wanted = by_row(reader, first, [12] * len(queries))
    calls: list[int] = []

    def spoilt(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 4:
            output = output.clone()
            output[1] = float("nan")
        return output

    handle = model.adapter.head.register_forward_hook(spoilt)
    with looking(monkeypatch, every):
        answers = reader.decode(first, [12] * len(queries))
    handle.remove()
    assert reader.broken == {1}
    assert answers.pop(1) == wanted.pop(1)[:4]
    assert answers == wanted
    # What the broken row left is not seen by who asks again
    reader.broken = set()
    reader.read()
    assert {row: reader.decode(first, [12] * len(queries))[row] for row in wanted} == wanted


def test_an_edit_that_follows_the_steps_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float32")
    edits = [
        fastedit.EditRequest("what is it?", "left up down", image=picture(1)),
        fastedit.EditRequest("which way?", "up left", image=picture(2)),
    ]
    run = fastedit.edit(model, edits, "grace", values=3, steps=8, evaluate=False, show_progress=False)
    queries = [Query(edit.prompt, edit.image) for edit in edits] + [Query("other", picture(1))]
    with fastedit.applied(model, run.deltas):
        reader, first = begun(model, queries, 9)
        wanted = by_row(reader, first, [9] * len(queries))
        for every in (1, 8):
            with looking(monkeypatch, every):
                assert reader.decode(first, [9] * len(queries)) == wanted
    reader, first = begun(model, queries, 9)
    assert by_row(reader, first, [9] * len(queries)) != wanted


class Waits(TorchDispatchMode):
    """Counts what makes a GPU wait: scalars and lists read off tensors, and indices of unknown number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_every_eighth_token_and_planned_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cached_model("random:llava-tiny")
    monkeypatch.setattr(model, "end_token_ids", ())
    reader, first = begun(model, mixed_queries(), 24)
    plans: list[Any] = []
    plan = walk_module.plan_attention
    monkeypatch.setattr(walk_module, "plan_attention", lambda *a, **k: plans.append(1) or plan(*a, **k))
    lists: list[Any] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with looking(monkeypatch, 8), Waits() as waits:
        reader.decode(first, [24] * len(reader))
    assert len(lists) == 3
    # What a plan looks at when it is made
    assert len(plans) == 1
    assert waits.count <= 2
    assert attention_module.plan_attention is plan
