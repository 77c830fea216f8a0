"""Deltas that change while a model answers: each call has those that it began with, and the next one the new ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.active import active_key
from fastedit.deltas import EditDelta
from fastedit.deltas.live import LiveHolder, is_live
from fastedit.deltas.mapped import MappedStack
from tests.deltas.test_mapped import Counted
from tests.engine.stock_calls import engine_logits, fitted, load, questions

NAME = "random:llava-tiny"
NEW = 4


class Live:
    """Deltas as a ledger hands them out."""

    def __init__(self, deltas: Sequence[EditDelta] = ()) -> None:
        self.deltas = deltas
        self.asked = 0

    def current(self) -> Sequence[EditDelta]:
        self.asked += 1
        return self.deltas


class Watched(Live):
    """Tells what is about to hold before it holds."""

    def watch(self, prepare: Callable[[Sequence[EditDelta]], bool]) -> None:
        self.prepare = prepare

    def change(self, deltas: Sequence[EditDelta]) -> None:
        self.prepare(deltas)
        self.deltas = deltas


def answers(model: EditableModel, **options: Any) -> list[str]:
    return model.generate(questions(model), max_new_tokens=NEW, **options)


def hooks(model: EditableModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


@pytest.mark.parametrize("method", ["grace", "lora"])
def test_the_next_call_has_what_holds_then(method: str) -> None:
    model, held = load(NAME), fitted(NAME, method)
    lives: list[Sequence[EditDelta]] = [(), held[:1], held[1:], ()]
    lives += [[*held], held[:1]] if method == "grace" else []
    base, count = answers(model), hooks(model)
    expected, logits = [], []
    for deltas in lives:
        if not deltas:
            expected.append(base)
            logits.append(engine_logits(model, questions(model)))
            continue
        with fastedit.applied(model, deltas):
            expected.append(answers(model))
            logits.append(engine_logits(model, questions(model)))
    assert len({tuple(each) for each in expected}) >= 3, "the case needs deltas that are felt"
    live = Live()
    assert is_live(live)
    assert not is_live(held)
    with fastedit.applied(model, live) as same:
        assert same is model
        for deltas, texts, last in zip(lives, expected, logits, strict=True):
            live.deltas = deltas
            assert answers(model) == texts
            assert torch.equal(engine_logits(model, questions(model)), last)
            assert bool(active_key(model)) == bool(deltas)
    live.deltas = ()
    for deltas, texts in zip(lives, expected, strict=True):
        live.deltas = deltas
        assert answers(model, edits=live) == texts
        assert model.answer(None, "what is it ?", max_new_tokens=2, edits=live) is not None
        if deltas:
            assert answers(model, edits=deltas) == texts
    assert answers(model) == base
    assert hooks(model) == count


def test_a_call_ends_with_what_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = load(NAME), fitted(NAME, "lora")
    live = Live(held[:1])
    with fastedit.applied(model, held[:1]):
        first = answers(model)
    with fastedit.applied(model, held[1:]):
        second = answers(model)
    assert first != second
    # What is called for every token but the first of an answer
    writing, keys = fastedit.backbone.decoding._Writing, []
    read = writing.read

    def changing(batch: Any) -> None:
        live.deltas = held[1:]
        keys.append(active_key(model))
        read(batch)

    with fastedit.applied(model, live):
        monkeypatch.setattr(writing, "read", changing)
        assert answers(model) == first
        assert answers(model) == second
    assert len(set(keys)) == 2


def test_stock_calls_inside_of_applied_have_one_version_each() -> None:
    model, held = load(NAME), fitted(NAME, "lora")
    given = model.encode(questions(model)[:1], answers=False).model_inputs
    with torch.no_grad():
        with fastedit.applied(model, held[:1]):
            cache = model.hf(**given, use_cache=True)
            first = cache.logits
        live = Live(held[:1])
        with fastedit.applied(model, live):
            output = model.hf(**given, use_cache=True)
            assert torch.equal(output.logits, first)
            live.deltas = held[1:]
            step = {"input_ids": given["input_ids"][:, -1:], "past_key_values": output.past_key_values}
            behind = model.hf(**step).logits
            assert not torch.equal(model.hf(**given).logits, first)
            with pytest.raises(ValueError, match="save_pretrained: inside of applied"):
                model.hf.save_pretrained("nowhere")
        with fastedit.applied(model, held[:1]):
            step = {"input_ids": given["input_ids"][:, -1:], "past_key_values": cache.past_key_values}
            assert torch.equal(model.hf(**step).logits, behind)
        live.deltas = fitted(NAME, "grace")
        with fastedit.applied(model, live), pytest.raises(ValueError, match="acts with router='ball'"):
            model.hf(**given)


def test_what_cannot_act_is_refused_when_it_is_to_act() -> None:
    model = load(NAME)
    live = Live(fitted(NAME, "lora"))
    with (
        pytest.raises(ValueError, match="was fitted alone, not on top of those before it"),
        fastedit.applied(model, live),
    ):
        pass
    live.deltas = ()
    with fastedit.applied(model, live):
        base = answers(model)
        live.deltas = fitted(NAME, "lora")
        with pytest.raises(ValueError, match="was fitted alone, not on top of those before it"):
            answers(model)
        live.deltas = ()
        assert answers(model) == base


def test_a_version_takes_over_what_it_can_and_is_freed() -> None:
    model, held = load(NAME), fitted(NAME, "grace")
    live = Live(Counted(held[:1]))
    with fastedit.applied(model, live):
        answers(model)
        (holder,) = model.holders
        assert isinstance(holder.stacked, MappedStack)  # type: ignore[attr-defined]
        old = weakref.ref(holder.stacked)  # type: ignore[attr-defined]
        second = Counted(held)
        live.deltas = second
        del holder
        with fastedit.applied(model, held):
            expected = answers(model)
        # One was read to see what they are, and the new one
        answers(model)
        assert "all" not in second.reads
        assert answers(model, edits=live) == expected
        gc.collect()
        assert old() is None
    count = live.asked
    assert count < 60


def test_a_version_is_made_before_it_holds_where_the_store_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = load(NAME), fitted(NAME, "grace")
    live = Watched(Counted(held[:1]))
    made: list[str] = []
    build = LiveHolder._made

    def noted(holder: LiveHolder, deltas: Any) -> Any:
        before = holder._ahead
        version = build(holder, deltas)
        if version is not before:
            made.append(threading.current_thread().name)
        return version

    monkeypatch.setattr(LiveHolder, "_made", noted)
    with fastedit.applied(model, held):
        expected = answers(model)
    with fastedit.applied(model, live):
        answers(model)
        writer = threading.Thread(target=live.change, args=(Counted(held),), name="writer")
        writer.start()
        writer.join()
        assert answers(model) == expected
    assert made == ["MainThread", "writer"]
    prepare = live.prepare
    model.stacks._kept.clear()
    gc.collect()
    assert prepare(held) is False


def test_threads_have_versions_of_their_own_calls() -> None:
    model, held = load(NAME), fitted(NAME, "grace")
    asked = questions(model)[:3]
    versions: list[Sequence[EditDelta]] = [(), held[:1], held[1:], held]
    expected = []
    for deltas in versions:
        expected.append(model.generate(asked, max_new_tokens=2, edits=deltas or None))
    live, wrong, stop = Live(), [], threading.Event()
    # Numbers of versions that are about to hold, and of those that do
    begun, done = [0], [0]

    def serve() -> None:
        while not stop.is_set():
            first = len(done) - 1
            found = model.generate(asked, max_new_tokens=2, edits=live)
            if found not in [expected[number] for number in begun[first : len(begun)]]:
                wrong.append(found)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 51):
        begun.append(number % 4)
        live.deltas = versions[number % 4]
        done.append(number % 4)
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
