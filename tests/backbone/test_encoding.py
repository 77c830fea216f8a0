"""Rows, labels and masks; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastedit.backbone.encoding import answer_tokens, own_answer_tokens, row_size
from fastedit.requests import Query

from .conftest import TINY, cached_model, mixed_queries, picture


@pytest.mark.parametrize("name", TINY)
def test_labels_are_the_next_tokens_of_the_answer_and_its_end(name: str) -> None:
    model = cached_model(name)
    queries = mixed_queries()
    encoded = model.encode(queries, answers=True)
    prompts = model.encode(queries, answers=False)
    assert not prompts.label_mask.any()
    for row, query in enumerate(queries):
        length, prompt = int(encoded.lengths[row]), int(prompts.lengths[row])
        ids = encoded.input_ids[row, :length]
        labels = encoded.labels[row][encoded.label_mask[row]]
        assert encoded.last_prompt[row] == prompts.last_prompt[row] == prompt - 1
        assert torch.equal(ids[:prompt], prompts.input_ids[row, :prompt])
        # The labels are the answer that follows in the row, then the end token, which is no input.
        assert torch.equal(labels[:-1], ids[prompt:])
        assert labels[-1] == model.end_token_ids[0]
        assert model.tokenizer.decode(labels[:-1]).strip() == query.answer
        assert encoded.label_mask[row].nonzero().flatten().tolist() == list(range(prompt - 1, length))
        assert encoded.label_positions()[row][: len(labels)].tolist() == list(range(prompt - 1, length))
        image = encoded.images[row]
        assert (image is None) == (query.image is None)
        assert encoded.image_mask[row].sum() == (image.tokens if image else 0)
        assert torch.equal(encoded.image_mask[row, :length], ids == model.adapter.image_token_id)
    assert encoded.images[0].key == encoded.images[3].key != encoded.images[1].key


@pytest.mark.parametrize("name", TINY)
def test_the_text_of_an_answer_encodes_to_its_own_tokens(name: str) -> None:
    # What greedy decoding returns is decoded and stripped; encoding that must give the generated tokens back.
    model = cached_model(name)
    for answer in ("red", "a yellow zebra", "two", "zyx, 12.5 °C", "Yes"):
        encoded = model.encode([Query("what is it?", picture(0), answer)], answers=True)
        tokens = encoded.labels[encoded.label_mask].tolist()
        text = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert text == answer
        again = model.encode([Query("what is it?", picture(0), text)], answers=True)
        assert again.labels[again.label_mask].tolist() == tokens


def test_model_inputs_are_what_the_stock_processor_makes() -> None:
    for name in ("random:llava-tiny", "random:llava-next-tiny", "random:blip2-tiny"):
        model = cached_model(name)
        query = Query("what is it?", picture(1, 64, 30))
        ours = model.encode([query], answers=False).model_inputs
        text = model.prompts.text(query.prompt, with_image=True)
        stock = model.processor(images=[query.image], text=[text], return_tensors="pt")
        for key in ("input_ids", "pixel_values"):
            assert torch.equal(ours[key].cpu(), stock[key]), (name, key)


def test_rows_are_selected_and_trimmed() -> None:
    model = cached_model("random:qwen2vl-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    part = encoded.select(torch.tensor([False, False, True, True, False]))
    assert len(part) == 2
    assert part.input_ids.shape[1] == int(encoded.lengths[[2, 3]].max())
    assert part.images == (None, encoded.images[3])
    assert torch.equal(part.last_prompt, encoded.last_prompt[2:4])
    assert set(part.model_inputs) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
    }


def test_what_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    model = cached_model("random:llava-tiny")
    good = Query("what?", None, "red")
    with pytest.raises(ValueError, match=r"at least one query is needed \(got 0\)"):
        model.encode([], answers=True)
    with pytest.raises(ValueError, match=r"row 1: the answer must not be empty \(got answer=None\)"):
        model.encode([good, Query("what?")], answers=True)
    with pytest.raises(FileNotFoundError, match=r"row 1: image: no such file \(got 'absent\.png'\)"):
        model.encode([good, Query("what?", str(tmp_path / "absent.png"))], answers=False)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"row 0: image: must be one of PNG, JPEG, .*text\.png"):
        model.encode([Query("what?", tmp_path / "text.png")], answers=False)
    with pytest.raises(ValueError, match=r"row 0: a prompt must hold one image placeholder.*\(got 2 placeholders"):
        model.encode([Query("what is <image>?", picture(0))], answers=False)
    with pytest.raises(ValueError, match=r"row 1: a row may have at most 256 tokens \(got \d+ tokens"):
        model.encode([good, Query("is " * 300, None, "red")], answers=True)


@pytest.mark.parametrize("name", TINY)
def test_answers_hold_no_special_tokens(name: str) -> None:
    model = cached_model(name)
    end = model.tokenizer.convert_ids_to_tokens(model.end_token_ids[0])
    specials = {end, model.tokenizer.convert_ids_to_tokens(model.adapter.image_token_id)}
    for special in specials:
        for answer in (special, f"red{special}", f"a {special} b"):
            query = Query("what?", picture(0), answer)
            for make in (
                lambda query=query: model.encode([Query("what?", None, "red"), query], answers=True),
                lambda query=query: row_size(model, query),
                lambda query=query: answer_tokens(model, query, 10),
            ):
                with pytest.raises(
                    ValueError, match=r"an answer must not hold special tokens of the model.* in answer="
                ):
                    make()
            # What the model has said itself is not refused
            assert own_answer_tokens(model, query, 10)[-1] == model.end_token_ids[0]


def test_an_answer_of_the_models_own_is_cut_to_the_positions_there_are() -> None:
    model = cached_model("random:llava-tiny")
    query = Query("what?", None, "a yellow photo of two zebras")
    whole = answer_tokens(model, query, 10)
    assert own_answer_tokens(model, query, 10) == whole
    # The last label is predicted at the last position
    assert own_answer_tokens(model, query, 256 - len(whole) + 1) == whole
    assert own_answer_tokens(model, query, 256 - len(whole) + 2) == (*whole[:-2], whole[-1])
    assert own_answer_tokens(model, query, 256) == whole[-1:]
