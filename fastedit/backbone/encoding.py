"""Queries to right-padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .states import Encoded, ImageInputs

if TYPE_CHECKING:
    from fastedit.requests import Query

    from .model import EditableModel


def encode_queries(model: EditableModel, queries: Sequence[Query], *, answers: bool) -> Encoded:
    """Return the rows of some questions, see `EditableModel.encode`."""
    if not queries:
        raise ValueError("encode: at least one query is needed (got 0)")
    rows = [_row(model, number, query, answers) for number, query in enumerate(queries)]
    width = max(len(ids) - 1 if answers else len(ids) for ids, _, _, _ in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, _padding_id(model), dtype=torch.long)
    attention_mask, image_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    label_mask, labels = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    last_prompt = torch.zeros(len(rows), dtype=torch.long)
    for row, (ids, marks, prompt_length, _) in enumerate(rows):
        # With an answer the last id is the end token: a label, not an input.
        length = len(ids) - 1 if answers else len(ids)
        input_ids[row, :length] = torch.tensor(ids[:length])
        attention_mask[row, :length] = True
        image_mask[row, : len(marks)] = torch.tensor(marks)
        last_prompt[row] = prompt_length - 1
        if answers:
            labels[row, :length] = torch.tensor(ids[1:])
            label_mask[row, prompt_length - 1 : length] = True
    images = tuple(image for _, _, _, image in rows)
    encoded = Encoded(
        input_ids=input_ids,
        attention_mask=attention_mask,
        label_mask=label_mask,
        labels=labels,
        last_prompt=last_prompt,
        image_mask=image_mask,
        images=images,
        token_types=model.adapter.token_types,
    )
    return encoded.to(model.device)


def row_size(model: EditableModel, query: Query) -> tuple[int, int]:
    """Return the tokens and the labels of a row, as `EditableModel.encode` would make it; no labels without answer."""
    answered = query.answer is not None and bool(query.answer.strip())
    ids, _, prompt_length, _ = _row(model, 0, query, answered)
    return (len(ids) - 1, len(ids) - prompt_length) if answered else (len(ids), 0)


def answer_tokens(model: EditableModel, query: Query, prompt_length: int) -> tuple[int, ...]:
    """Return the tokens of a query's answer, the end token last, as `encode_queries` would put them behind the prompt.

    Args:
        prompt_length: tokens of the encoded prompt.
    Raises:
        ValueError: an empty answer, or more tokens than the model has positions for.
    """
    if query.answer is None or not query.answer.strip():
        raise ValueError(f"encode: the answer must not be empty (got answer={query.answer!r})")
    text = model.prompts.text(query.prompt, with_image=query.image is not None)
    ids = model.prompts.answer_ids(text, query.answer)
    _check_length(model, prompt_length + len(ids), query, "")
    return ids


def _check_length(model: EditableModel, tokens: int, query: Query, where: str) -> None:
    limit = getattr(model.adapter.text.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        got = f"{tokens} tokens, prompt={query.prompt!r:.60}"
        raise ValueError(f"encode: {where}a row may have at most {limit} tokens (got {got})")


def _row(
    model: EditableModel, number: int, query: Query, answers: bool
) -> tuple[list[int], list[bool], int, ImageInputs | None]:
    """Return tokens, image marks, prompt length and image of one row."""
    prompts, adapter = model.prompts, model.adapter
    try:
        image = None if query.image is None else model.images.read(query.image)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"encode: row {number}: {error}") from error
    text = prompts.text(query.prompt, with_image=image is not None)
    ids: list[int] = list(prompts.ids(text))
    expected = 1 if image is not None and adapter.image_text else 0
    if ids.count(adapter.image_token_id) != expected:
        rule = "a prompt must hold one image placeholder, the template's, if it has an image, and else none"
        got = f"{ids.count(adapter.image_token_id)} placeholders, prompt={query.prompt!r:.80}"
        raise ValueError(f"encode: row {number}: {rule} (got {got})")
    marks: list[bool] = [False] * len(ids)
    if image is not None:
        ids, marks = adapter.place_image(ids, image.tokens)
    if not ids:
        raise ValueError(f"encode: row {number}: the prompt has no tokens (got prompt={query.prompt!r:.80})")
    prompt_length = len(ids)
    if answers:
        if query.answer is None or not query.answer.strip():
            raise ValueError(f"encode: row {number}: the answer must not be empty (got answer={query.answer!r})")
        ids += prompts.answer_ids(text, query.answer)
        marks += [False] * (len(ids) - 1 - prompt_length)
    _check_length(model, len(ids), query, f"row {number}: ")
    return ids, marks, prompt_length, image


def _padding_id(model: EditableModel) -> int:
    """Padding never reaches a result; any token that is not the image's will do."""
    padding = model.tokenizer.pad_token_id
    if padding is None or padding == model.adapter.image_token_id:
        padding = model.end_token_ids[0]
    return int(padding)
