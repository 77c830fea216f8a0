"""Questions read once, then answered or continued from stored keys and values, as often as wanted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import StoredPast
from .decoding import write_answers
from .generic.adapter import GenericAdapter, generic
from .packed import PackedState, token_rows
from .packed_forward import packed_prefix, packed_start, packed_tail
from .states import STAGES, Encoded
from .vision import VISION, watched

if TYPE_CHECKING:
    from fastedit.requests import Query

    from .model import EditableModel

#: Stages of a layer in the order of a walk.
ORDER = (VISION, *STAGES)


class Reader:
    """R prompts whose keys and values are kept, layer by layer.

    What lies below a point of the decoder is computed once (`read_below`). What lies above is computed by each
    `read`, with whatever is hooked in at that time, and overwrites what the `read` before it stored.

    Args:
        model: frozen. encoded: the prompts, without answers.
        room: tokens behind a prompt that memory is set aside for; more are taken as well.
    """

    def __init__(self, model: EditableModel, encoded: Encoded, room: int) -> None:
        self.model, self.room = model, room
        self.lengths: list[int] = encoded.lengths.tolist()
        self.past: StoredPast | None = StoredPast(len(encoded), max(self.lengths) + room)
        self._generic = generic(model.adapter)
        #: By row, the tokens behind its prompt that were read last.
        self._behind: dict[int, list[int]] = {}
        if self._generic is not None and not self._generic.walker.stores:
            self.past = None
        #: Rows whose answer ended because logits were not finite, until somebody empties it.
        self.broken: set[int] = set()
        self._encoded, self._state = encoded, packed_start(model, encoded)
        if model.watching:
            self.read_below(0, VISION)
        row = token_rows(self._state.counts, encoded.input_ids.device)
        furthest = torch.zeros(len(encoded), dtype=torch.long, device=row.device)
        #: The position of the first token behind each prompt: one more than the largest in it.
        self.places = furthest.scatter_reduce(0, row, self._state.position_ids.amax(0), "amax") + 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def axes(self) -> int:
        """Numbers that a position has: 1, or 3 where positions have a time, a height and a width."""
        return self._state.position_ids.shape[0]

    def read_below(self, layer: int, stage: str) -> None:
        """Walk the prompts up to a point; every `read` starts there."""
        if (layer, stage) == (0, VISION):
            if self._state.stage != VISION:
                self._state = watched(self.model, self._state, self._encoded)
            return
        self._state = packed_prefix(self.model, self._state, layer, stage, self.past)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Walk the prompts from there to the end; return the final hidden states (R, d) of their last tokens.

        On the way routers choose what acts on which prompt.
        """
        state = self._state
        for holder in sorted(self.model.holders, key=lambda each: each.point):
            if not holder.rewrites_prompts:
                if (state.layer, ORDER.index(state.stage)) < (holder.point[0], ORDER.index(holder.point[1])):
                    state = packed_prefix(self.model, state, *holder.point, self.past)
                holder.route(state)
        return packed_tail(self.model, state, self.past)

    @torch.no_grad()
    def extend(self, tokens: Mapping[int, Sequence[int]], behind: Mapping[int, int]) -> Tensor:
        """Walk tokens behind the prompts of some rows; return their final hidden states (T, d), rows in order.

        Args:
            tokens: at least one, by row. behind: how many tokens after its prompt a row has already read.
        """
        model, text, device = self.model, self.model.adapter.text, self.places.device
        rows = sorted(tokens)
        counts = [len(tokens.get(row, ())) for row in range(len(self))]
        if self.past is not None:
            self.past.grow(max(self.lengths[row] + behind[row] + counts[row] for row in rows))
        if self._generic is not None:
            return packed_tail(model, self._further(self._generic, tokens, behind), self.past)
        ids = torch.tensor([[token for row in rows for token in tokens[row]]], device=device)
        ahead = torch.tensor([behind[row] + number for row in rows for number in range(counts[row])], device=device)
        position_ids = (self.places[token_rows(counts, device)] + ahead).expand(1, self.axes, -1)
        hidden = text.enter(text.embed(ids), position_ids)
        tables = text.rotary(hidden, position_ids)
        state = PackedState(
            hidden=hidden[0],
            position_ids=position_ids[0],
            rotary=None if tables is None else (tables[0][0], tables[1][0]),
            counts=tuple(counts),
            starts=tuple(length + behind.get(row, 0) for row, length in enumerate(self.lengths)),
            wanted=torch.arange(hidden.shape[1], device=device),
            wanted_counts=tuple(counts),
            layer=0,
            stage="attention",
            behind=tuple(1 + behind.get(row, 0) for row in range(len(self))),
        )
        return packed_tail(model, state, self.past)

    def _further(
        self, adapter: GenericAdapter, tokens: Mapping[int, Sequence[int]], behind: Mapping[int, int]
    ) -> PackedState:
        """The state of tokens behind prompts; of whole rows where what comes before a token is not stored."""
        for row in tokens:
            self._behind[row] = [*self._behind.get(row, [])[: behind[row]], *tokens[row]]
        firsts = {row: self.lengths[row] + behind[row] for row in tokens}
        more = {row: self._behind[row] for row in tokens}
        return adapter.further(self._encoded, self._state, more, firsts, stored=self.past is not None)

    def rooms(self, wanted: int) -> list[int]:
        """How many tokens each row may be answered with: as many as wanted, or as the model has positions for."""
        limit = getattr(self.model.adapter.text.config, "max_position_embeddings", None)
        if limit is None:
            return [wanted] * len(self)
        return [max(1, min(wanted, limit - place + 1)) for place in self.places.tolist()]

    def decode(
        self, first: Mapping[int, int], most: Sequence[int], written: Mapping[int, Sequence[int]] | None = None
    ) -> dict[int, list[int]]:
        """Answer greedily.

        Args:
            first: by row, the token that comes next. most: tokens of an answer by row.
            written: by row, tokens that are answered and read already.
        Returns:
            By row the tokens of the answer, those already written included, the end token not. It ends as well where
            the logits are not finite; `broken` says whose.
        """
        answers = {row: list((written or {}).get(row, ())) for row in first}
        if self._generic is None:
            write_answers(self, first, most, answers)
        else:
            self._decode_by_row(first, most, answers)
        return answers

    def _decode_by_row(self, first: Mapping[int, int], most: Sequence[int], answers: dict[int, list[int]]) -> None:
        """The same where a stock decoder is handed the tokens of each row."""
        model, ends = self.model, set(self.model.end_token_ids)
        coming = dict(first)
        while coming:
            going: dict[int, list[int]] = {}
            for row, token in sorted(coming.items()):
                if token in ends or len(answers[row]) >= most[row]:
                    continue
                answers[row].append(token)
                if len(answers[row]) < most[row]:
                    going[row] = [token]
            if not going:
                break
            hidden = self.extend(going, {row: len(answers[row]) - 1 for row in going})
            with torch.no_grad():
                chosen, sound = likeliest(model.head(hidden))
            self.broken |= {row for row, good in zip(going, sound, strict=True) if not good}
            coming = {row: token for row, token in zip(going, chosen, strict=True) if row not in self.broken}


def likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """The token of the largest logit of every position (T, V), and whether it is a number: no NaN, not infinite.

    A logit of -inf rules its token out, and only where all are is there nothing to choose from.
    """
    largest, tokens = logits.max(dim=-1)
    return tokens.tolist(), largest.isfinite().tolist()


def greedy(model: EditableModel, encoded: Encoded, max_new_tokens: int) -> list[list[int]]:
    """Return the greedily generated tokens of each row, the end token excluded. Plain argmax.

    Decoding ends early where the model has no positions left.
    """
    reader = Reader(model, encoded, max_new_tokens)
    with torch.no_grad():
        first, sound = likeliest(model.head(reader.read()))
    begun = {row: token for row, token in enumerate(first) if sound[row]}
    answers = reader.decode(begun, reader.rooms(max_new_tokens))
    broken = len(reader.broken) + len(first) - len(begun)
    if broken:
        message = f"generate: the logits were not finite in {broken} of {len(reader)} answers, which end there"
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    return [answers.get(row, []) for row in range(len(reader))]


def answers(
    model: EditableModel, queries: Sequence[Query], max_new_tokens: int, batch_size: int, edits: Any = None
) -> list[str]:
    """What ``EditableModel.generate`` does."""
    if edits is not None:
        from fastedit.engine.acting import acting
        from fastedit.engine.stacking import Checks

        with acting(model, edits, Checks()):
            return model.generate(queries, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if max_new_tokens < 1 or batch_size < 1:
        got = f"max_new_tokens={max_new_tokens}, batch_size={batch_size}"
        raise ValueError(f"generate: max_new_tokens and batch_size must be at least 1 (got {got})")
    found: list[str] = []
    for start in range(0, len(queries), batch_size):
        asked = queries[start : start + batch_size]
        for holder in model.holders:
            asked = holder.rewrite_prompts(asked)
        encoded = model.encode(asked, answers=False)
        for ids in greedy(model, encoded, max_new_tokens):
            found.append(model.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found
