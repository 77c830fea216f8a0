"""Edits of questions about several images, from preflight to scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.data import RecordErrors
from fastedit.requests import EditRequest, Probe, Query

from ..backbone.conftest import cached_model, picture
from ..backbone.test_several import editable

A, B, C = picture(0, 40, 70), picture(1, 64, 30), picture(2, 33, 33)


def two_images() -> list[EditRequest]:
    """Edits about two images, one inside of its question, with everything that an edit may be asked besides."""
    return [
        EditRequest(
            "which one is red?",
            "the left one",
            [A, B],
            rephrase="which of the two is red?",
            image_rephrase=[C, B],
            locality_prompt="how many?",
            locality_answer="two",
            image_locality_image=[B, C],
            image_locality_prompt="what is it?",
            image_locality_answer="a dog",
            portability=[Query("what is on {image} and {image}?", [B, A], "a bus")],
            probes=[
                Probe("near", "which one is red?", [B, A]),
                Probe("near", "which one is red?", A),
                Probe("blind", "which one is red?"),
                Probe("same", "is it day?", [A, B]),
            ],
            id="first",
        ),
        EditRequest(
            "is {image} above {image}?", "no", [C, A], locality_prompt="who?", locality_answer="a man", id="second"
        ),
    ]


def first_logits(model: EditableModel, query: Query) -> torch.Tensor:
    """First logits behind a prompt, as the model acts."""
    from fastedit.backbone.packed_forward import packed_start, packed_tail

    return model.head(packed_tail(model, packed_start(model, model.encode([query], answers=False))))


@pytest.mark.parametrize("method", ["lora", "odedit+lora"])
@pytest.mark.parametrize("name", ["random:qwen2vl-tiny", "random:llava-onevision-tiny", "gemma3"])
def test_an_edit_about_two_images_is_learned_and_scored(name: str, method: str) -> None:
    model = editable(name) if name == "gemma3" else cached_model(name)
    edits = two_images()
    run = fastedit.edit(model, edits, method, views="record", steps=60, lr=0.02, positions="after_image")
    assert run.scores["legacy"]["reliability"].mean == 1.0
    answers = run.edit_scores[0].answers
    asked = [answer["score"] for answer in answers]
    for score in ("image_generality", "image_locality", "portability", "blind", "same"):
        assert asked.count(score) == 1
    # Another order and one image alone are other questions, each with what the base model says of it
    near = [answer["before"] for answer in answers if answer["score"] == "near"]
    expected = [model.answer(image, "which one is red?", max_new_tokens=6) for image in ([B, A], A)]
    assert all(said.startswith(start) for said, start in zip(near, expected, strict=True))
    assert near[0] != near[1]
    assert json.loads(json.dumps(answers)) == list(answers)
    with fastedit.applied(model, run.deltas[0]):
        assert model.answer([A, B], "which one is red?", max_new_tokens=8) == "the left one"
    queries = [Query("which one is red?", image) for image in ([A, B], [B, A], A, None)]
    before = [first_logits(model, query) for query in queries]
    assert all(not torch.equal(a, b) for n, a in enumerate(before) for b in before[:n])


def test_a_batch_equals_singles() -> None:
    model = cached_model("random:qwen2vl-tiny", "float64")
    edits = [*two_images(), EditRequest("what is it?", "red", A, id="one"), EditRequest("what?", "blue", id="none")]
    edits.append(EditRequest("what are they?", "dogs", [C, B, A], id="three"))
    together = fastedit.edit(model, edits, "lora", steps=6, batch_size=5, evaluate=False)
    for number, edit in enumerate(edits):
        (alone,) = fastedit.edit(model, [edit], "lora", steps=6, evaluate=False).deltas
        for name, tensor in together.deltas[number].tensors.items():
            assert torch.allclose(tensor, alone.tensors[name], atol=1e-9), (edit.id, name)


def test_a_sequence_tells_lists_apart_by_order() -> None:
    model = cached_model("random:qwen2vl-tiny")
    edits = [EditRequest("which?", "left", [A, B], id="1"), EditRequest("which?", "right", [B, A], id="2")]
    fastedit.edit(model, edits, "lora", mode="sequential", steps=2, evaluate=False)
    with pytest.raises(ValueError, match=r"two answers|conflict"):
        fastedit.edit(model, [edits[0], replace(edits[1], image=[A, B])], "lora", mode="sequential", evaluate=False)


def test_what_a_model_does_not_take_is_told_before_work_with_every_place(tmp_path: Path) -> None:
    model = cached_model("random:blip2-tiny")
    with pytest.raises(RecordErrors) as caught:
        fastedit.edit(model, two_images(), "lora")
    text = str(caught.value)
    for field in ("image:", "image_rephrase:", "image_locality_image:", "portability[0].image:", "probes[0].image:"):
        assert f"edits[0] (id 'first'), {field} random:blip2-tiny takes 1 image a question (got 2 images)" in text
    assert "probes[1]" not in text
    A.save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = tmp_path / "edits.jsonl"
    record = {"prompt": "which?", "target": "left", "image": ["a.png", "broken.png", "a.png"]}
    records.write_text(json.dumps(record) + "\n")
    edits = fastedit.read_edits(records, images=tmp_path)
    with pytest.raises(RecordErrors, match=r"record 0 \(line 1\), image\[1\]: must be one of PNG"):
        fastedit.edit(cached_model("random:qwen2vl-tiny"), edits, "lora")


def test_a_row_of_many_images_that_is_too_long_is_told_before_work() -> None:
    model = cached_model("random:llava-tiny")
    edits = [EditRequest("which?", "left", [A] * 10), EditRequest("which?", "left", [A, B] * 12, id="long")]
    with pytest.raises(RecordErrors) as caught:
        fastedit.edit(model, edits, "lora")
    assert "edits[1] (id 'long'), target: a row may have at most 256 tokens (got 4" in str(caught.value)
    assert "edits[0]" not in str(caught.value)


def test_memory_is_planned_for_all_images_of_a_row() -> None:
    model = cached_model("random:qwen2vl-tiny")
    one = fastedit.plan_memory(model, method="lora", edits=[EditRequest("which?", "left", A)], evaluate=False)
    many = fastedit.plan_memory(model, method="lora", edits=[EditRequest("which?", "left", [A, B, C])], evaluate=False)
    assert many.held["image caches"] > 2 * one.held["image caches"] > 0


def test_an_attached_delta_acts_on_a_stock_call_with_two_images() -> None:
    model = cached_model("random:qwen2vl-tiny")
    run = fastedit.edit(model, two_images()[:1], "lora", steps=60, lr=0.02, positions="after_image", evaluate=False)
    inputs = model.encode([Query("which one is red?", [A, B])], answers=False).model_inputs
    with fastedit.attached(model.hf, run.deltas[0], processor=model.processor):
        told = model.hf.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=list(model.end_token_ids))
    added = told[0, inputs["input_ids"].shape[1] :]
    assert model.tokenizer.decode(added, skip_special_tokens=True).strip() == "the left one"
    inputs = model.encode([Query("is it day?", [A, B])], answers=False).model_inputs
    with torch.no_grad(), fastedit.attached(model.hf, run.deltas[0], processor=model.processor):
        stock = model.hf(**inputs).logits[0, -1]
    with torch.no_grad(), fastedit.applied(model, run.deltas[0]):
        expected = first_logits(model, Query("is it day?", [A, B]))
    assert float((stock - expected).abs().max()) < 1e-4
