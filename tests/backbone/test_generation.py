"""Greedy decoding against the stock `generate`, alone and in batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastedit.backbone import EditableModel, Encoded, load
from fastedit.backbone.generation import greedy
from fastedit.requests import Query

from .conftest import TINY, cached_model, largest_gap, mixed_queries, picture, stock_logits

NEW_TOKENS = 9


def stock_tokens(model: EditableModel, row: Encoded) -> list[int]:
    """Greedy continuation of one row by the stock model, the end token excluded."""
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "eos_token_id": list(model.end_token_ids),
        "pad_token_id": model.tokenizer.pad_token_id,
    }
    inputs = row.model_inputs
    text_only = row.images[0] is None and model.adapter.family == "BLIP-2"
    stock = model.hf.language_model if text_only else model.hf
    tokens = stock.generate(**inputs, **settings)[0].tolist()
    if tokens[: row.input_ids.shape[1]] == row.input_ids[0].tolist():
        tokens = tokens[row.input_ids.shape[1] :]
    ends = [place for place, token in enumerate(tokens) if token in model.end_token_ids]
    return tokens[: ends[0]] if ends else tokens


def extended(row: Encoded, tokens: list[int]) -> Encoded:
    """One row with tokens appended."""
    new = torch.tensor([tokens], dtype=torch.long, device=row.input_ids.device)
    return dataclasses.replace(
        row,
        input_ids=torch.cat([row.input_ids, new], dim=1),
        attention_mask=torch.cat([row.attention_mask, torch.ones_like(new, dtype=torch.bool)], dim=1),
        image_mask=torch.cat([row.image_mask, torch.zeros_like(new, dtype=torch.bool)], dim=1),
    )


@pytest.mark.parametrize("name", TINY)
def test_a_ragged_mixed_batch_equals_stock_generation_of_each_row(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=False)
    ours = greedy(model, encoded, NEW_TOKENS)
    expected = [stock_tokens(model, encoded.select([row])) for row in range(len(encoded))]
    assert ours == expected


@pytest.mark.parametrize("name", TINY)
def test_logits_of_every_step_equal_the_stock_forward_over_what_was_written(name: str) -> None:
    # Sharper than tokens: random weights repeat themselves whatever the positions are.
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=False)
    steps: list[torch.Tensor] = []
    handle = model.adapter.head.register_forward_hook(lambda _m, _i, output: steps.append(output))
    try:
        tokens = greedy(model, encoded, NEW_TOKENS)
    finally:
        handle.remove()
    logits = torch.stack(steps, dim=1)
    for row, written in enumerate(tokens):
        whole = stock_logits(model, extended(encoded.select([row]), written))
        start = int(encoded.last_prompt[row])
        assert largest_gap(logits[row, : len(written) + 1], whole[start : start + logits.shape[1]]) < 1e-5


@pytest.mark.parametrize("name", ["random:llava-tiny", "random:qwen2vl-tiny"])
def test_rows_that_end_stop_and_the_others_go_on(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=False)
    free = greedy(model, encoded, NEW_TOKENS)
    # Make a token that some row generates in the middle an end token.
    stop = free[1][3]
    kept = model.end_token_ids
    model.end_token_ids = (*kept, stop)
    try:
        stopped = greedy(model, encoded, NEW_TOKENS)
        expected = [stock_tokens(model, encoded.select([row])) for row in range(len(encoded))]
    finally:
        model.end_token_ids = kept
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free] == expected
    assert len(stopped[1]) < NEW_TOKENS


def test_batches_singles_and_order_agree() -> None:
    model = cached_model("random:llava-next-tiny")
    queries = mixed_queries()
    together = model.generate(queries, max_new_tokens=6)
    assert model.generate(queries, max_new_tokens=6, batch_size=2) == together
    assert [model.answer(query.image, query.prompt, max_new_tokens=6) for query in queries] == together
    assert model.generate(queries[::-1], max_new_tokens=6) == together[::-1]
    assert model.generate([], max_new_tokens=6) == []


def test_hooks_change_their_own_row_only_and_see_every_step() -> None:
    model = cached_model("random:blip2-tiny")
    queries = mixed_queries()
    plain = greedy(model, model.encode(queries, answers=False), 6)
    shapes = []

    def hook(_module, inputs, output):
        # Tokens of all rows, one after another: whose they are is written down
        layout = model.running.layouts[inputs[0].shape[1]]
        shapes.append((inputs[0].shape[0], layout.counts))
        push = torch.zeros(1, sum(layout.counts), 1, device=output.device)
        start = layout.counts[0]
        push[:, start : start + layout.counts[1]] = 40.0
        return output + push * torch.linspace(-1, 1, output.shape[-1], device=output.device)

    handle = model.module(model.sites([1], ["down"])[0]).register_forward_hook(hook)
    try:
        pushed = greedy(model, model.encode(queries, answers=False), 6)
    finally:
        handle.remove()
    assert pushed[1] != plain[1]
    assert [row for number, row in enumerate(pushed) if number != 1] == [
        row for number, row in enumerate(plain) if number != 1
    ]
    assert shapes[0][0] == 1
    assert len(shapes[0][1]) == len(queries)
    assert shapes[1:] == [(1, (1,) * len(queries))] * 5
    assert model.running is None


def test_decoding_ends_where_positions_end() -> None:
    model = cached_model("random:llava-tiny")  # 256 positions
    row = model.encode([Query("is " * 215, picture(0))], answers=False)
    length = row.input_ids.shape[1]
    assert 240 < length < 256, length
    assert len(greedy(model, row, 64)[0]) <= 256 - length + 1


def test_wrong_sizes_are_refused() -> None:
    model = cached_model("random:llava-tiny")
    with pytest.raises(ValueError, match=r"must be at least 1 \(got max_new_tokens=0, batch_size=64\)"):
        model.generate(mixed_queries(), max_new_tokens=0)


def test_the_embedded_model_answers_as_recorded_and_its_text_encodes_to_what_it_wrote() -> None:
    from fastedit.data import read_edits

    model = load("pocket-llava")
    edits = [*read_edits("pocket-vqa", split="eval", limit=12), *read_edits("pocket-caption", split="eval", limit=4)]
    queries = [Query(edit.prompt, edit.image) for edit in edits]
    recorded = [edit.prediction for edit in edits]
    queries += [Query(edit.locality_prompt) for edit in edits]
    recorded += [edit.locality_answer for edit in edits]
    tokens = greedy(model, model.encode(queries, answers=False), 64)
    texts = [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    assert texts == recorded
    answered = [Query(query.prompt, query.image, text) for query, text in zip(queries, texts, strict=True)]
    encoded = model.encode(answered, answers=True)
    for row, written in enumerate(tokens):
        assert encoded.labels[row][encoded.label_mask[row]].tolist() == [*written, model.end_token_ids[0]]
