"""Questions that are asked again say exactly what an export changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastedit
from fastedit.export import asking
from fastedit.export.asking import compare_answers
from tests.engine.stock_calls import edits, fitted, load

NAME = "random:llava-tiny"


def test_the_same_deltas_change_nothing() -> None:
    deltas = fitted(NAME, "lora")
    asked = compare_answers(load(NAME), edits(), deltas, list, together=False)
    assert (asked["edits"], asked["changed"]) == (2, [])
    assert all(score["exact"] == score["written"] for score in asked["scores"].values())


@pytest.mark.parametrize("batch", [1, 16])
def test_what_changed_is_named_with_both_answers(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "BATCH", batch)
    model, deltas = load(NAME), fitted(NAME, "lora")
    gone = dataclasses.replace(deltas[1], tensors={n: torch.zeros_like(t) for n, t in deltas[1].tensors.items()})
    asked = compare_answers(
        model, edits(), deltas, lambda some: [gone if each is deltas[1] else each for each in some], together=False
    )
    assert {each["request"] for each in asked["changed"]} == {"edit-1"}
    first = next(each for each in asked["changed"] if each["score"] == "reliability")
    query = fastedit.Query(edits()[1].prompt, edits()[1].image)
    assert first["written"] == model.generate([query], max_new_tokens=48)[0]
    with fastedit.applied(model, deltas[1]):
        assert first["exact"] == model.generate([query], max_new_tokens=48)[0]
    score = asked["scores"]["reliability"]
    assert (score["exact"], score["written"]) == (1.0, 0.5)


def test_a_sequence_is_asked_with_all_of_it() -> None:
    model, deltas = load(NAME), fitted(NAME, "lora", mode="sequential")
    asked = compare_answers(model, edits(), deltas, lambda some: some[:1], together=True)
    query = fastedit.Query(edits()[1].prompt, edits()[1].image)
    changed = next(each for each in asked["changed"] if (each["request"], each["score"]) == ("edit-1", "reliability"))
    for acting, answer in ((deltas, changed["exact"]), (deltas[:1], changed["written"])):
        with fastedit.applied(model, acting):
            assert model.generate([query], max_new_tokens=48) == [answer]
