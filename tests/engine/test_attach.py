"""Edits act in calls of the stock model as they do in the engine's own."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from tests.engine.conftest import make_edits, picture

NEW = 5
STRONG: dict[str, Any] = {"steps": 25, "lr": 2e-2, "stop_loss": None}
#: Settings under which an edit is felt in a moment.
METHODS: dict[str, dict[str, Any]] = {
    "ft": {**STRONG, "layers": 2},
    "lora": STRONG,
    "tpatcher": {"steps": 25, "lr": 5e-2},
    "grace": {"steps": 25},
    "wise": {"steps": 10},
    "ft-vision": STRONG,
}


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(request.param, dtype="float64")


@pytest.fixture(scope="module")
def llava() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def edits() -> list[EditRequest]:
    return [dataclasses.replace(edit, prompt=f"{edit.prompt} {'really ' * n}") for n, edit in enumerate(make_edits(2))]


def fitted(model: EditableModel, method: str, **settings: Any) -> Sequence[EditDelta]:
    options = {"evaluate": False, "show_progress": False, "pool": make_edits(5)[3:], **METHODS[method], **settings}
    return fastedit.edit(model, edits(), method, **options).deltas


def questions(model: EditableModel) -> list[Query]:
    """Of several lengths; the edits' own and others."""
    asked = [Query(edit.prompt, edit.image) for edit in edits()]
    if "blip2" in model.name:
        # Its stock generate takes no question without an image
        return [*asked, Query("what is it ?", picture(91)), Query("how many are there in it ?", picture(92))]
    return [*asked, Query("what is it ?", picture(91)), Query("of what colour is that thing over there ?")]


def inputs(model: EditableModel, asked: Sequence[Query], *, left: bool) -> dict[str, Tensor]:
    """Arguments of the stock forward, padded on one side."""
    given = model.encode(asked, answers=False).model_inputs
    if not left:
        return given
    mask = given["attention_mask"].bool()
    order = torch.argsort(mask.int(), dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in given:
            given[name] = torch.gather(given[name], 1, order)
    return given


def stock_answers(model: EditableModel, hf: Any, asked: Sequence[Query], **options: Any) -> list[str]:
    given = inputs(model, asked, left=True)
    ids = hf.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
    new = ids[:, given["input_ids"].shape[1] :] if ids.shape[1] > NEW else ids
    texts = []
    for row in new.tolist():
        end = next((n for n, token in enumerate(row) if token in model.end_token_ids), len(row))
        texts.append(model.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("method", list(METHODS))
def test_stock_generation_equals_the_engines_own(model: EditableModel, method: str) -> None:
    if method == "tpatcher" and model.name != "random:llava-tiny":
        pytest.skip("once is enough: the same kind of delta as others")
    deltas = fitted(model, method, mode="sequential")
    asked = questions(model)
    base = stock_answers(model, model.hf, asked)
    assert base == model.generate(asked, max_new_tokens=NEW)
    with fastedit.applied(model, deltas):
        expected = model.generate(asked, max_new_tokens=NEW)
    assert expected != base, "the case needs a delta that is felt"
    with fastedit.attached(model, deltas) as hf:
        assert stock_answers(model, hf, asked) == expected
        assert model.generate(asked, max_new_tokens=NEW) == expected
        alone = [stock_answers(model, hf, [query])[0] for query in asked]
    assert alone == expected
    assert stock_answers(model, model.hf, asked) == base


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("method", ["ft", "grace"])
def test_a_stock_forward_with_labels_equals_the_engines_logits(llava: EditableModel, method: str, left: bool) -> None:
    deltas = fitted(llava, method, mode="sequential")
    asked = [dataclasses.replace(query, answer="seven red cats") for query in questions(llava)]
    encoded = llava.encode(asked, answers=True)
    labels = torch.full_like(encoded.input_ids, -100)
    for row in range(len(asked)):
        first, length = int(encoded.last_prompt[row]) + 1, int(encoded.lengths[row])
        labels[row, first:length] = encoded.input_ids[row, first:length]
    given = {**encoded.model_inputs, "labels": labels}
    if left:
        order = torch.argsort(encoded.attention_mask.int(), dim=1, stable=True)
        for name in ("input_ids", "attention_mask", "labels"):
            given[name] = torch.gather(given[name], 1, order)
    with torch.no_grad():
        plain = llava.hf(**given)
        with fastedit.attached(llava, deltas) as hf:
            edited = hf(**given)
        alone = []
        for row, query in enumerate(asked):
            with fastedit.attached(llava, deltas) as hf:
                one = llava.encode([query], answers=True)
                alone.append(hf(**one.model_inputs, labels=labels[row : row + 1, : int(one.lengths[0])]).logits[0])
    assert not torch.equal(edited.loss, plain.loss)
    for row, logits in enumerate(alone):
        mask = given["attention_mask"][row].bool()
        # Padding on the left shifts positions, and rotary tables are float32
        torch.testing.assert_close(edited.logits[row][mask], logits, rtol=0, atol=1e-4 if left else 1e-10)


def test_rows_that_nothing_acts_on_are_those_of_the_base_model_to_the_bit(llava: EditableModel) -> None:
    deltas = fitted(llava, "ft")
    given = inputs(llava, questions(llava), left=True)
    with torch.no_grad():
        plain = llava.hf(**given).logits
        with fastedit.attached(llava, deltas) as hf:
            chosen = hf(**given, edit_ids=[0, 1, -1, -1]).logits
            each = [hf(**given, edit_ids=[number] * 4).logits for number in (0, 1)]
    assert torch.equal(chosen[2:], plain[2:])
    for row in (0, 1):
        assert not torch.equal(chosen[row], plain[row])
        torch.testing.assert_close(chosen[row], each[row][row], rtol=0, atol=1e-12)


def test_requests_say_which_edit_acts_on_their_rows(llava: EditableModel) -> None:
    deltas, asked = fitted(llava, "ft"), questions(llava)
    base = llava.generate(asked, max_new_tokens=NEW)
    expected = []
    for delta in deltas:
        with fastedit.applied(llava, delta):
            expected.append(llava.generate(asked, max_new_tokens=NEW))
    with fastedit.attached(llava, deltas) as hf:
        got = stock_answers(llava, hf, asked, edit_ids=[0, 1, -1, 1])
        assert got == [expected[0][0], expected[1][1], base[2], expected[1][3]]
        with pytest.raises(ValueError, match="act on the rows that name them"):
            stock_answers(llava, hf, asked)
        with pytest.raises(ValueError, match="0 to 1"):
            stock_answers(llava, hf, asked, edit_ids=[2, 0, 0, 0])
    by_row = fastedit.attached(llava, deltas, select=lambda given: [None] * (len(given["input_ids"]) - 1) + [0])
    with by_row as hf:
        assert stock_answers(llava, hf, asked) == [*base[:3], expected[0][3]]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("method", ["ft", "grace"])
def test_beams_and_other_caches(llava: EditableModel, method: str, options: dict[str, Any]) -> None:
    deltas, asked = fitted(llava, method, mode="sequential"), questions(llava)
    with fastedit.attached(llava, deltas) as hf:
        together = stock_answers(llava, hf, asked, **options)
        alone = [stock_answers(llava, hf, [query], **options)[0] for query in asked]
        plain = stock_answers(llava, hf, asked)
    assert together == alone
    if "num_beams" not in options:
        assert together == plain


def test_an_attachment_acts_in_all_threads_until_it_is_detached(llava: EditableModel) -> None:
    deltas, asked = fitted(llava, "grace", mode="sequential"), questions(llava)
    base = stock_answers(llava, llava.hf, asked)
    with fastedit.applied(llava, deltas):
        expected = llava.generate(asked, max_new_tokens=NEW)
    handle = fastedit.attach(llava, deltas)
    results: list[list[str]] = []
    try:
        threads = [
            threading.Thread(target=lambda: results.append(stock_answers(llava, llava.hf, asked))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 3
        assert llava.generate(asked, max_new_tokens=NEW) == expected
    finally:
        threading.Thread(target=handle.detach).start()
        handle.detach()
    assert stock_answers(llava, llava.hf, asked) == base
    assert llava.generate(asked, max_new_tokens=NEW) == base
    assert "forward" not in llava.hf.__dict__
    assert "generate" not in llava.hf.__dict__


def test_threads_have_attachments_of_their_own(llava: EditableModel) -> None:
    deltas, asked = fitted(llava, "ft"), questions(llava)
    expected = []
    for delta in deltas:
        with fastedit.attached(llava, delta) as hf:
            expected.append(stock_answers(llava, hf, asked))
    wrong: list[int] = []

    def serve(number: int) -> None:
        for _ in range(2):
            with fastedit.attached(llava, deltas[number]) as hf:
                if stock_answers(llava, hf, asked) != expected[number]:
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_cannot_act_in_a_stock_call_says_why(llava: EditableModel) -> None:
    asking = fastedit.edit(llava, edits()[:1], "ike", k=0, evaluate=False).deltas[0]
    deltas = fitted(llava, "grace", mode="sequential")
    given = inputs(llava, questions(llava)[:1], left=True)
    with (
        fastedit.attached(llava, asking) as hf,
        pytest.raises(ValueError, match="asks another question, which a stock call cannot"),
    ):
        hf(**given)
    filled = llava.hf(**given, use_cache=True).past_key_values
    with fastedit.attached(llava, deltas) as hf:
        with pytest.raises(ValueError, match="a cache is filled while the deltas are attached"):
            hf(input_ids=given["input_ids"][:, -1:], past_key_values=filled)
        with pytest.raises(ValueError, match="leave no prompt"):
            hf(**given, labels=given["input_ids"])
        with pytest.raises(ValueError, match="still those of the base model"):
            hf.save_pretrained("nowhere")


def test_another_fastedit_model_around_the_same_stock_model_says_what_to_do(llava: EditableModel) -> None:
    other = fastedit.wrap(llava.hf, llava.processor)
    asked = edits()[0]
    for deltas in (fitted(llava, "grace", mode="sequential"), fitted(llava, "grace", mode="sequential")[:1]):
        with (
            fastedit.attached(llava.hf, deltas, llava.processor, check_sequence=False),
            pytest.raises(ValueError, match=r"attach them to the one that is called, fastedit.attach\(model, deltas\)"),
        ):
            other.answer(asked.image, asked.prompt)
    apart = fitted(llava, "lora")
    with fastedit.attached(llava, apart), pytest.raises(ValueError, match=r"edit_ids= or select=.*\(got 2 deltas\)"):
        llava.answer(asked.image, asked.prompt)
    # One change of weights needs no choice
    with fastedit.attached(llava, apart[0]):
        assert other.answer(asked.image, asked.prompt) == llava.answer(asked.image, asked.prompt)
    assert other.answer(asked.image, asked.prompt) == llava.answer(asked.image, asked.prompt)


def test_a_model_with_adapters_of_others_is_edited_on_top_of_them() -> None:
    peft = pytest.importorskip("peft")
    own = fastedit.load("random:llava-tiny", dtype="float64")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(own.hf, config)
    model = fastedit.wrap(adapted, own.processor)
    asked = questions(model)
    before = stock_answers(model, adapted, asked)
    assert model.generate(asked, max_new_tokens=NEW) == before
    deltas = fitted(model, "ft", mode="sequential")
    with fastedit.applied(model, deltas):
        expected = model.generate(asked, max_new_tokens=NEW)
    assert expected != before
    with fastedit.attached(adapted, deltas, own.processor):
        assert stock_answers(model, adapted, asked) == expected
        edited = adapted(**inputs(model, asked, left=True)).logits
    assert not torch.equal(edited, adapted(**inputs(model, asked, left=True)).logits)
    assert stock_answers(model, adapted, asked) == before
