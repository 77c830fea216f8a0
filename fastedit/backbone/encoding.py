"""Queries to right-padded rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from fastedit.visuals import Video, images_of

from .generic.adapter import generic
from .prompts import replace_token
from .states import Encoded, ImageInputs

if TYPE_CHECKING:
    from fastedit.requests import Query

    from .model import EditableModel


def encode_queries(model: EditableModel, queries: Sequence[Query], *, answers: bool) -> Encoded:
    """Return the rows of some questions, see `EditableModel.encode`."""
    if not queries:
        raise ValueError("encode: at least one query is needed (got 0)")
    rows = [_row(model, number, query, answers) for number, query in enumerate(queries)]
    read: tuple[tuple[int, ...], ...] = ()
    if (start := _decoder_start(model)) is not None:
        read = tuple(tuple(ids[:length]) for ids, _, length, _ in rows)
        rows = [([start, *ids[length:]], [], 1, image) for ids, _, length, image in rows]
    width = max(len(ids) - 1 if answers else len(ids) for ids, _, _, _ in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, padding_id(model), dtype=torch.long)
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
        read=read,
    )
    return encoded.to(model.device)


def row_size(model: EditableModel, query: Query) -> tuple[int, int]:
    """Return the tokens and the labels of a row, as `EditableModel.encode` would make it; no labels without answer."""
    answered = query.answer is not None and bool(query.answer.strip())
    ids, _, prompt_length, _ = _row(model, 0, query, answered)
    if model.reads_prompts_by_encoder:
        return len(ids) - prompt_length + (not answered), len(ids) - prompt_length
    return (len(ids) - 1, len(ids) - prompt_length) if answered else (len(ids), 0)


def _decoder_start(model: EditableModel) -> int | None:
    """The one token that a decoder has of every prompt, where an encoder reads those."""
    traced = generic(model.adapter)
    return None if traced is None else traced.start_token_id


def answer_tokens(model: EditableModel, query: Query, prompt_length: int) -> tuple[int, ...]:
    """Return the tokens of a query's answer, the end token last, as `encode_queries` would put them behind the prompt.

    Args:
        prompt_length: tokens of the encoded prompt.
    Raises:
        ValueError: an empty answer, one that holds special tokens, or more tokens than the model has positions for.
    """
    if query.answer is None or not query.answer.strip():
        raise ValueError(f"encode: the answer must not be empty (got answer={query.answer!r})")
    text = prompt_text(model, query)
    try:
        ids = _answer_ids(model, text, query.answer)
        _check_length(model, prompt_length + len(ids), query.prompt)
    except RowError as error:
        raise ValueError(f"encode: {error}") from error
    return ids


def own_answer_tokens(model: EditableModel, query: Query, prompt_length: int) -> tuple[int, ...]:
    """Return the tokens of an answer that the model itself has generated: as `answer_tokens`, and never refused.

    What there are no positions for is left out before the end token. Text that spells a special token stays.

    Args:
        query: with the answer, not empty. prompt_length: tokens of the encoded prompt.
    """
    text = prompt_text(model, query)
    ids = model.prompts.answer_ids(text, query.answer or "")
    limit = position_limit(model)
    # The last label is predicted and never read
    room = len(ids) if limit is None else max(1, limit - prompt_length + 1)
    return ids if len(ids) <= room else (*ids[: room - 1], ids[-1])


def prompt_text(model: EditableModel, query: Query) -> str:
    """Return the text of a question's prompt, placeholders of what it is about in it."""
    visual = query.image
    count = len(images_of(visual)) if isinstance(visual, (list, tuple)) else 1
    return model.prompts.text(query.prompt, visual is not None, images=count, video=isinstance(visual, Video))


class RowError(ValueError):
    """What a row cannot be made for.

    Attributes:
        part: "prompt" or "answer". rule: that is broken. got: what breaks it.
    """

    def __init__(self, part: str, rule: str, got: str) -> None:
        super().__init__(f"{rule} (got {got})")
        self.part, self.rule, self.got = part, rule, got


def row_tokens(
    model: EditableModel, prompt: str, image: ImageInputs | int | None, answer: str | None
) -> tuple[list[int], list[bool], int]:
    """Return the tokens of a row, which of them are image tokens, and the length of its prompt.

    Args:
        prompt: the question. image: what it is about, or how many tokens its one image takes. answer: None for a
            prompt alone.
    Raises:
        RowError: a placeholder typed into the prompt, a prompt without tokens, special tokens in the answer, an empty
            answer, more tokens than the model has positions for.
    """
    seen = image if isinstance(image, ImageInputs) else None
    count, video = (1, False) if seen is None else (len(seen.each), seen.video)
    text = model.prompts.text(prompt, image is not None, images=count, video=video)
    ids, marks = _prompt_tokens(model, text, prompt, image)
    if not ids:
        raise RowError("prompt", "the prompt must have tokens", f"prompt={prompt!r:.80}")
    length = len(ids)
    if answer is not None:
        if not answer.strip():
            raise RowError("answer", "the answer must not be empty", f"answer={answer!r}")
        ids += _answer_ids(model, text, answer)
        marks += [False] * (len(ids) - 1 - length)
    _check_length(model, len(ids), prompt)
    return ids, marks, length


def _prompt_tokens(
    model: EditableModel, text: str, prompt: str, image: ImageInputs | int | None
) -> tuple[list[int], list[bool]]:
    """The tokens of a prompt's text with those of its image in place, and which of them are image tokens."""
    adapter = model.adapter
    ids: list[int] = list(model.prompts.ids(text))
    traced = generic(adapter)
    placeholder = adapter.image_token_id if traced is None else traced.placeholder.typed_id
    seen = image.each if isinstance(image, ImageInputs) else ()
    if seen and seen[0].video:
        placeholder = adapter.video_token_id
    count = ids.count(placeholder)
    if count != (max(1, len(seen)) if image is not None and adapter.image_text else 0):
        rule = "a prompt must hold one image placeholder, the template's, if it has an image, and else none"
        if len(seen) > 1 or (seen and seen[0].video):
            rule = "a prompt must hold one placeholder, the template's, for each image or for a video"
        raise RowError("prompt", rule, f"{count} placeholders, prompt={prompt!r:.80}")
    if image is None:
        return ids, [False] * len(ids)
    if traced is not None:
        return traced.place_image(text, model.prompts, image)
    if seen and seen[0].video:
        placed = replace_token(ids, placeholder, [seen[0].expansion])
        return placed, [token == seen[0].features_id for token in placed]
    return adapter.place_image(ids, *([image] if isinstance(image, int) else [part.tokens for part in seen]))


def special_token(model: EditableModel, ids: Iterable[int]) -> str:
    """Return the first token among these that no text may spell, or ""."""
    for token in ids:
        shown = token in (model.adapter.image_token_id, model.adapter.video_token_id)
        if shown or token in model.prompts.special_ids:
            return str(model.tokenizer.convert_ids_to_tokens(token))
    return ""


def position_limit(model: EditableModel) -> int | None:
    """Return how many tokens a row may have, None where the model does not say."""
    limit: int | None = getattr(model.adapter.text.config, "max_position_embeddings", None)
    return limit


#: Of what special tokens stand in; they would be learned and never be shown.
SPECIAL_RULE = "must not hold special tokens of the model, or characters that it does not know"


def _answer_ids(model: EditableModel, text: str, answer: str) -> tuple[int, ...]:
    ids = model.prompts.answer_ids(text, answer)
    special = special_token(model, ids[:-1])
    if special:
        raise RowError("answer", f"an answer {SPECIAL_RULE}", f"{special!r} in answer={answer!r:.80}")
    return ids


def _check_length(model: EditableModel, tokens: int, prompt: str) -> None:
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise RowError("prompt", f"a row may have at most {limit} tokens", f"{tokens} tokens, prompt={prompt!r:.60}")


def _row(
    model: EditableModel, number: int, query: Query, answers: bool
) -> tuple[list[int], list[bool], int, ImageInputs | None]:
    """Return tokens, image marks, prompt length and image of one row."""
    if answers and query.answer is None:
        raise ValueError(f"encode: row {number}: the answer must not be empty (got answer=None)")
    try:
        image = None if query.image is None else model.images.read(query.image)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"encode: row {number}: {error}") from error
    try:
        tokens = row_tokens(model, query.prompt, image, query.answer if answers else None)
    except RowError as error:
        raise ValueError(f"encode: row {number}: {error}") from error
    traced = generic(model.adapter)
    if image is not None and traced is not None:
        image = traced.asked(image, prompt_text(model, query))
    return (*tokens, image)


def padding_id(model: EditableModel) -> int:
    """Padding never reaches a result; any token that is not the image's will do."""
    padding = model.tokenizer.pad_token_id
    if padding is None or padding == model.adapter.image_token_id:
        padding = model.end_token_ids[0]
    return int(padding)
