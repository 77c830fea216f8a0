"""The question inside of a row of tokens that somebody else has made, and the row of another question in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .encoding import RowError, row_tokens

if TYPE_CHECKING:
    from .model import EditableModel

#: Stands for a question while a template is looked at; no text holds it.
_MARK = "\ue000"


@dataclass(frozen=True)
class RewrittenRow:
    """A row of tokens whose question was exchanged.

    Args:
        ids: tokens. image: of those of images and what stands between them, (first, last + 1) in the new row.
        image_before: where that began in the row of before.
    """

    ids: list[int]
    image: tuple[int, int]
    image_before: int


def rewrite_row(model: EditableModel, ids: Sequence[int], rewrite: Callable[[str], str]) -> RewrittenRow:
    """Return a prompt's row in which another question is asked, tokens of images as they were.

    Args:
        model: whose template the prompt was made by. ids: tokens of the prompt, those of its image in place.
        rewrite: from the question to the one in its place.
    Raises:
        ValueError: tokens that the model's template does not make of any question, or another question that does not
            fit into the model.
    """
    kept, images = list(ids), [n for n, token in enumerate(ids) if token == model.adapter.image_token_id]
    for question in dict.fromkeys(_candidates(model, kept, images)):
        around = _around(model, question, len(images))
        if around is None:
            continue
        first, end = len(around[0]), len(kept) - len(around[1])
        inside = not images or (first <= images[0] and images[-1] < end)
        if inside and kept[:first] == around[0] and kept[end:] == around[1] and (images or first == end):
            before, after = _around(model, rewrite(question), len(images), strict=True) or ([], [])
            middle = kept[first:end]
            return RewrittenRow([*before, *middle, *after], (len(before), len(before) + len(middle)), first)
    shown = model.tokenizer.decode([token for n, token in enumerate(kept) if n not in set(images)])
    raise ValueError(
        "attach: a prompt in which another question is asked is one that the model's own template makes of a question "
        f"(got {shown!r:.120})"
    )


def _around(
    model: EditableModel, question: str, image_tokens: int, *, strict: bool = False
) -> tuple[list[int], list[int]] | None:
    """Tokens of a question's row before those of its image, and behind them; all are before where it has none."""
    try:
        ids, marks, _ = row_tokens(model, question, image_tokens or None, None)
    except RowError as error:
        if strict:
            raise ValueError(f"attach: {error}") from error
        return None
    if not image_tokens:
        return ids, []
    first, last = marks.index(True), len(marks) - 1 - marks[::-1].index(True)
    return ids[:first], ids[last + 1 :]


def _candidates(model: EditableModel, ids: list[int], images: list[int]) -> Iterator[str]:
    """What the question of a row may be; whoever asks compares the tokens that are made of it."""
    rendered = model.prompts.text(_MARK, bool(images))
    if rendered.count(_MARK) != 1:
        return
    head, tail = rendered.split(_MARK)
    placeholder, part = model.adapter.image_text, ids
    if images:
        # Of what stands for an image the part before or behind its own tokens is text like any other
        opens, _, closes = placeholder.partition(str(model.tokenizer.convert_ids_to_tokens(ids[images[0]])))
        if placeholder and placeholder in tail:
            part, tail = ids[: images[0]], tail.partition(placeholder)[0] + opens
        else:
            part = ids[images[-1] + 1 :]
            head = closes + head.rpartition(placeholder)[2] if placeholder in head and placeholder else head
    # A token that opens every text is no part of a question, though tokens of one that spells it are the same
    for skip in (True, False):
        text = str(model.tokenizer.decode(part, skip_special_tokens=skip, clean_up_tokenization_spaces=False))
        opening, closing = head.strip(), tail.strip()
        start = text.find(opening) + len(opening) if opening in text else 0
        end = text.rfind(closing) if closing and closing in text[start:] else len(text)
        piece = text[start:end]
        # White space of the template beside the question, which decoding may or may not keep
        exact = piece.removeprefix(head[len(head.rstrip()) :]).removesuffix(tail[: len(tail) - len(tail.lstrip())])
        yield from (exact, exact.strip(" "), piece.strip(), f"{piece.strip()} ", f" {piece.strip()}", piece)
