"""Greedy answers written on the device: what they are is read from there every few tokens, not at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionPlan
from .packed import PackedState
from .packed_forward import packed_tail
from .token_layout import Running, TokenLayout

if TYPE_CHECKING:
    from .generation import Reader

#: Tokens that are written between two looks at what they are, by type of device. A look makes a GPU wait; what rows
#: that have ended write until then is thrown away, which a CPU would compute for nothing.
CHECK_EVERY = {"cpu": 1}
_CHECK_ELSEWHERE = 8


def write_answers(reader: Reader, first: Mapping[int, int], most: Sequence[int], answers: dict[int, list[int]]) -> None:
    """Put the tokens that come next behind the answers; arguments as ``Reader.decode`` takes them.

    Rows whose logits were not finite are added to ``reader.broken``, and do not go on.
    """
    device = reader.places.device
    check_every = CHECK_EVERY.get(device.type, _CHECK_ELSEWHERE)
    rows = sorted(first)
    coming = torch.tensor([first[row] for row in rows], dtype=torch.long, device=device)
    left = [most[row] - len(answers[row]) for row in rows]
    ahead = min(check_every, max(left, default=0))
    batch = _Writing(reader, rows, coming, [len(answers[row]) for row in rows], left, ahead)
    while rows:
        columns = [batch.accept()]
        for _ in range(ahead - 1):
            columns.append(batch.write())
        # The one look at what was written
        table = torch.stack([*columns, batch.alive, batch.sound], 1).tolist()
        kept: list[int] = []
        for number, (row, (*written, alive, sound)) in enumerate(zip(rows, table, strict=True)):
            answers[row] += [token for token in written if token >= 0]
            kept += [number] if alive else []
            reader.broken |= set() if sound else {row}
        left = [most[rows[number]] - len(answers[rows[number]]) for number in kept]
        ahead = min(check_every, max(left, default=0))
        if len(kept) < len(rows) or not batch.has_room(ahead):
            rows = [rows[number] for number in kept]
            token = batch.token[torch.tensor(kept, dtype=torch.long, device=device)]
            # The last token of each is written and not read yet
            batch = _Writing(reader, rows, token, [len(answers[row]) - 1 for row in rows], left, ahead)
        if rows:
            batch.read()


class _Writing:
    """G rows of a reader that are answered, a token each at a time; those that have ended are masked.

    What is planned for the first token serves the others: it moves on by a place.

    Args:
        reader: whose rows. rows: their numbers, rising. token: (G,), int64, what each reads next.
        read: by row, tokens behind its prompt that were read. left: tokens that may be written yet.
        ahead: tokens that will be read before somebody looks.
    """

    def __init__(
        self, reader: Reader, rows: Sequence[int], token: Tensor, read: Sequence[int], left: Sequence[int], ahead: int
    ) -> None:
        assert reader.past is not None
        device, self.token = token.device, token
        self._model, self._past, self._axes = reader.model, reader.past, reader.axes
        self._ends = torch.tensor(reader.model.end_token_ids, dtype=torch.long, device=device)
        self._read, self._left, self._lengths, chosen = (
            torch.tensor(values, dtype=torch.long, device=device)
            for values in (read, left, [reader.lengths[row] for row in rows], rows)
        )
        self._places = reader.places[chosen]
        self.alive = torch.ones(len(rows), dtype=torch.bool, device=device)
        self.sound = self.alive
        #: Places of the longest row, with the one that is read next.
        self._keys = max((reader.lengths[row] + count + 1 for row, count in zip(rows, read, strict=True)), default=0)
        if not self.has_room(ahead):
            # By half, so that a long answer is copied a few times only
            self._past.grow(max(self._keys + ahead, self._past.capacity * 3 // 2))
        #: Which rows the plan has moved on for; None where there is none yet.
        self._passed: Tensor | None = None
        known = dict(zip(rows, read, strict=True))
        counts = tuple(int(row in known) for row in range(len(reader)))
        behind = tuple(1 + known.get(row, 0) for row in range(len(reader)))
        self._steps = 1 + self._read
        self._state = PackedState(
            hidden=token.new_empty(len(rows), 0),
            position_ids=token.new_empty(0, len(rows)),
            rotary=None,
            counts=counts,
            starts=tuple(length + known.get(row, 0) for row, length in enumerate(reader.lengths)),
            wanted=torch.arange(len(rows), device=device),
            wanted_counts=counts,
            layer=0,
            stage="attention",
        )
        layout = TokenLayout(counts, behind=behind, steps_now=self._steps)
        self._state.remembered("running", lambda: Running({len(rows): layout}))

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens behind the next one fit into what is set aside for keys and values."""
        return self._keys + tokens <= self._past.capacity

    def accept(self) -> Tensor:
        """(G,) the tokens that come next, -1 for none: where a row has ended, or ends now."""
        ends = (self.token[:, None] == self._ends).any(1)
        accepted = self.alive & ~ends & (self._left > 0)
        self._left = self._left - accepted.long()
        self.alive = accepted & (self._left > 0)
        return torch.where(accepted, self.token, -1)

    def write(self) -> Tensor:
        """Read what was accepted, and accept what comes behind it."""
        self.read()
        return self.accept()

    @torch.no_grad()
    def read(self) -> None:
        """Walk the accepted tokens; ``token`` is what is likeliest behind them.

        A row that has ended puts keys and values where its next token would have them, which nobody sees.
        """
        text = self._model.adapter.text
        # Not beyond the positions that the row may have
        position = self._places + self._read - (~self.alive).long()
        position_ids = position.expand(1, self._axes, -1)
        hidden = text.enter(text.embed(self.token[None]), position_ids)
        tables = text.rotary(hidden, position_ids)
        self._steps.copy_(1 + self._read)
        state = replace(
            self._state,
            hidden=hidden[0],
            position_ids=position_ids[0],
            rotary=None if tables is None else (tables[0][0], tables[1][0]),
        )
        if self._passed is not None:
            self._keys += 1
            for key, plan in list(state.memory.items()):
                if isinstance(plan, AttentionPlan):
                    plan.move_on(self._passed, self._lengths + self._read, self._keys, window=key[0])
        largest, self.token = self._model.head(packed_tail(self._model, state, self._past)).max(dim=-1)
        finite = largest.isfinite()
        self._passed = self.alive.long()
        self._read = self._read + self._passed
        self.sound = self.sound & (finite | ~self.alive)
        self.alive = self.alive & finite
