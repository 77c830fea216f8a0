"""Edits change in a served model, in the middle of its calls, and every answer is that of one version."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.deltas.live import LiveHolder
from tests.deltas.test_live import Live, hooks
from tests.engine.stock_calls import fitted, inputs, load, questions, stock_answers

NAME = "random:llava-tiny"
CHANGES = 50


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return load(NAME)


def generated(model: EditableModel, given: dict[str, Any], **options: Any) -> Tensor:
    """Scores (R, steps, V) of greedy generation."""
    with torch.no_grad():
        output = model.hf.generate(
            **given, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    return torch.stack(output.logits, 1)


@pytest.mark.parametrize("method", ["grace", "lora", "ike"])
def test_the_next_call_of_the_stock_model_has_what_holds_then(model: EditableModel, method: str) -> None:
    held, asked = fitted(NAME, method), questions(model)
    versions: list[Sequence[EditDelta]] = [(), held[:1], held[1:], (), held[:1]]
    base, count = stock_answers(model, model.hf, asked), hooks(model)
    expected = []
    for deltas in versions:
        if deltas:
            with fastedit.attached(model, deltas) as hf:
                expected.append(stock_answers(model, hf, asked))
        else:
            expected.append(base)
    assert expected[1] != base
    live = Live()
    with fastedit.attached(model, live) as hf:
        for deltas, answers in zip(versions, expected, strict=True):
            live.deltas = deltas
            assert stock_answers(model, hf, asked) == answers
    attachment = fastedit.attach(model, live)
    found: list[list[str]] = []
    for deltas in versions:
        live.deltas = deltas
        thread = threading.Thread(target=lambda: found.append(stock_answers(model, model.hf, asked)))
        thread.start()
        thread.join()
    assert found == expected
    attachment.detach()
    assert stock_answers(model, model.hf, asked) == base
    assert hooks(model) == count


def test_rows_name_the_deltas_of_the_version_that_they_find(model: EditableModel) -> None:
    held, asked = fitted(NAME, "lora"), questions(model)[:2]
    live = Live(held)
    with fastedit.attached(model, held) as hf:
        expected = [stock_answers(model, hf, asked, edit_ids=ids) for ids in ([0, 1], [-1, 0])]
    with fastedit.attached(model, live) as hf:
        assert [stock_answers(model, hf, asked, edit_ids=ids) for ids in ([0, 1], [-1, 0])] == expected
        live.deltas = held[:1]
        with pytest.raises(ValueError, match="edit_ids are -1 for none, or 0 to 0"):
            stock_answers(model, hf, asked, edit_ids=[0, 1])
        live.deltas = ()
        assert stock_answers(model, hf, asked, edit_ids=[-1, -1]) == stock_answers(model, model.hf, asked)


@pytest.mark.parametrize("method", ["grace", "lora"])
def test_steps_behind_a_cache_have_what_it_was_filled_with(model: EditableModel, method: str) -> None:
    held = fitted(NAME, method)
    given = inputs(model, questions(model)[:1], left=True)
    token = given["input_ids"][:, -1:]

    def step(cache: Any) -> Tensor:
        return model.hf(input_ids=token, past_key_values=cache).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        with fastedit.attached(model, held[:1]) as hf:
            edited = [step(cache) for cache in [hf(**given, use_cache=True).past_key_values] for _ in range(2)]
        base = [step(cache) for cache in [model.hf(**given, use_cache=True).past_key_values] for _ in range(2)]
        assert not torch.equal(edited[0], base[0])
        before = model.hf(**given, use_cache=True).past_key_values
        live = Live(held[:1])
        with fastedit.attach(model, live):
            # Filled while nothing was attached: it goes on as it began
            assert torch.equal(step(before), base[0])
            cache = model.hf(**given, use_cache=True).past_key_values
            assert torch.equal(step(cache), edited[0])
            live.deltas = held[1:]
            assert torch.equal(step(cache), edited[1])
            live.deltas = ()
            empty = model.hf(**given, use_cache=True).past_key_values
            live.deltas = held[:1]
            assert [torch.equal(step(empty), each) for each in base] == [True, True]
        with fastedit.attached(model, live), pytest.raises(ValueError, match="a cache is filled while the deltas are"):
            step(before)


def test_the_versions_of_calls_and_caches_are_freed(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fitted(NAME, "lora")
    given = inputs(model, questions(model)[:1], left=True)
    versions: list[weakref.ref[Any]] = []
    made = LiveHolder._made

    def noted(holder: LiveHolder, deltas: Sequence[EditDelta]) -> Any:
        version = made(holder, deltas)
        versions.append(weakref.ref(version))
        return version

    monkeypatch.setattr(LiveHolder, "_made", noted)
    live = Live(held[:1])
    with fastedit.attach(model, live), torch.no_grad():
        cache = model.hf(**given, use_cache=True).past_key_values
        live.deltas = held[1:]
        generated(model, given)
        assert [each() is None for each in versions] == [False, False]
        del cache
        assert [each() is None for each in versions] == [True, False]
    assert [each() is None for each in versions] == [True, True]


def test_every_answer_is_that_of_one_version_while_they_change(model: EditableModel) -> None:
    held = fitted(NAME, "grace")
    given = inputs(model, questions(model), left=True)
    versions: list[Sequence[EditDelta]] = [(), held[:1], held, held[1:]]
    base = generated(model, given)
    expected = [base]
    for deltas in versions[1:]:
        with fastedit.attached(model, deltas):
            expected.append(generated(model, given))
    untouched = [row for row in range(len(base)) if all(torch.equal(each[row], base[row]) for each in expected)]
    assert 0 < len(untouched) < len(base) - 1
    assert len({each.sum().item() for each in expected}) == 4
    live, stop = Live(), threading.Event()
    wrong: list[str] = []
    seen: set[int] = set()
    # Numbers of versions that are about to hold, and of those that do
    begun, done = [0], [0]

    def serve() -> None:
        while not stop.is_set():
            first = len(done) - 1
            scores = generated(model, given)
            matching = [n for n in begun[first : len(begun)] if torch.equal(scores, expected[n])]
            seen.update(matching)
            if not matching:
                wrong.append(f"no version of {begun[first:]}")
            if not torch.equal(scores[untouched], base[untouched]):
                wrong.append("a row in which none acts is not that of the base model")

    attachment = fastedit.attach(model, live)
    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, CHANGES + 1):
        begun.append(number % 4)
        live.deltas = versions[number % 4]
        done.append(number % 4)
        stop.wait(0.06)
    attachment.detach()
    begun.append(0)
    done.append(0)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(seen) >= 3
    assert torch.equal(generated(model, given), base)
