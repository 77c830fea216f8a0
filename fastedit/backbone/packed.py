"""Rows without padding: the tokens of all rows one after another, and attention over them.

Every linear map runs on (1, T, d), T being the tokens that there are; only attention sees rows, and there the keys of a
row may begin with constant ones that are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .states import Encoded

if TYPE_CHECKING:
    from .generic.door import Row

KeyValue = tuple[Tensor, Tensor]
Made = TypeVar("Made")


@dataclass(slots=True)
class PackedState:
    """What the decoder needs of R rows from one point on. Tokens are sorted by row and by place.

    Args:
        hidden: (T, d). The residual stream entering `layer` (stage "attention") or its feed-forward block ("ffn").
        position_ids: (A, T), int64.
        rotary: cosine and sine tables (T, d_head), or None for learned positions.
        counts: tokens of each row here.
        starts: tokens of each row before those, constant or another row's; the first token here has that place.
        wanted: (M,), int64, rising. The tokens whose final hidden states are asked for (those that carry labels).
        wanted_counts: how many of each row.
        layer, stage: where the decoder continues.
        deep: visual features (T, d) by the layer whose output they are added to, from `layer` on.
        constant: keys and values (sum(starts), heads, d_head) of the constant tokens by layer.
        live: (T,), bool, where a delta that leaves some tokens alone acts; None is everywhere.
        image: (T,), bool, the tokens of images; None where there are none.
        seen: at the stage "vision", what the vision tower puts out for each row's image, None without; else ().
        behind: of rows that go on behind prompts, how many tokens behind its prompt's last one each begins; () is 0.
        back: how many rows before a row the one stands whose first `starts` tokens are its own too; 0 is none, () is 0.
        entries: what a stock decoder is handed of each row, where that is what is walked; None of a row without tokens.
    """

    hidden: Tensor
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    wanted: Tensor
    wanted_counts: tuple[int, ...]
    layer: int
    stage: str
    deep: dict[int, Tensor] = field(default_factory=dict)
    constant: dict[int, KeyValue] = field(default_factory=dict)
    live: Tensor | None = None
    image: Tensor | None = None
    seen: tuple[Tensor | None, ...] = ()
    behind: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    entries: tuple[Row | None, ...] = ()
    # Attention plans and the like, made at the first use
    memory: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.counts)

    def remembered(self, key: Any, make: Callable[[], Made]) -> Made:
        """What was made of these tokens under a key, or else is made now."""
        if key not in self.memory:
            self.memory[key] = make()
        made: Made = self.memory[key]
        return made

    @property
    def n_bytes(self) -> int:
        """Size of the kept tensors in bytes."""
        parts = [self.hidden, self.position_ids, *(self.rotary or ()), *self.deep.values()]
        parts += [part for pair in self.constant.values() for part in pair]
        parts += [part for part in self.seen if part is not None]
        size: int = sum(part.numel() * part.element_size() for part in parts)
        return size + sum(entry.n_bytes for entry in self.entries if entry is not None)

    def of_row(self, row: int) -> PackedState:
        """Return one row, sharing memory."""
        a, b = _span(self.counts, row)
        c, d = _span(self.starts, row)
        e, f = _span(self.wanted_counts, row)
        return replace(
            self,
            hidden=self.hidden[a:b],
            position_ids=self.position_ids[:, a:b],
            rotary=None if self.rotary is None else (self.rotary[0][a:b], self.rotary[1][a:b]),
            counts=self.counts[row : row + 1],
            starts=self.starts[row : row + 1],
            wanted=self.wanted[e:f] - a,
            wanted_counts=self.wanted_counts[row : row + 1],
            deep={layer: part[a:b] for layer, part in self.deep.items()},
            constant={layer: (k[c:d], v[c:d]) for layer, (k, v) in self.constant.items()},
            live=None if self.live is None else self.live[a:b],
            image=None if self.image is None else self.image[a:b],
            seen=self.seen[row : row + 1],
            back=self.back[row : row + 1],
            entries=self.entries[row : row + 1],
            memory={},
        )

    def map(self, change: Any) -> PackedState:
        """Return the state with every tensor replaced by `change(tensor)` (a copy, another device)."""
        return replace(
            self,
            hidden=change(self.hidden),
            position_ids=change(self.position_ids),
            rotary=None if self.rotary is None else (change(self.rotary[0]), change(self.rotary[1])),
            wanted=change(self.wanted),
            deep={layer: change(part) for layer, part in self.deep.items()},
            constant={layer: (change(k), change(v)) for layer, (k, v) in self.constant.items()},
            live=None if self.live is None else change(self.live),
            image=None if self.image is None else change(self.image),
            seen=tuple(None if part is None else change(part) for part in self.seen),
            entries=tuple(None if entry is None else entry.map(change) for entry in self.entries),
            memory={},
        )

    def only(self, kept: Tensor) -> PackedState:
        """Return the tokens where `kept` (T,) bool, for a state whose other tokens nobody sees any more.

        The rows' counts shrink; a wanted token must be kept. `starts` and constants stay as they are.
        """
        number = torch.cumsum(kept, 0) - 1
        parts = torch.split(kept, list(self.counts))
        return replace(
            self,
            hidden=self.hidden[kept],
            position_ids=self.position_ids[:, kept],
            rotary=None if self.rotary is None else (self.rotary[0][kept], self.rotary[1][kept]),
            counts=tuple(torch.stack([part.sum() for part in parts]).tolist()),
            wanted=number[self.wanted],
            deep={layer: part[kept] for layer, part in self.deep.items()},
            live=None if self.live is None else self.live[kept],
            image=None if self.image is None else self.image[kept],
            memory={},
        )

    @staticmethod
    def cat(states: Sequence[PackedState]) -> PackedState:
        """Return the rows of several states as one.

        Raises:
            ValueError: no states, or states at different points.
        """
        if not states:
            raise ValueError("PackedState.cat: at least one state is needed (got 0)")
        first = states[0]
        points = {(state.layer, state.stage) for state in states}
        if len(points) > 1:
            raise ValueError(f"PackedState.cat: states must agree on (layer, stage) (got {sorted(points)})")
        if len(states) == 1:
            return first
        before = accumulate((state.hidden.shape[0] for state in states), initial=0)
        return replace(
            first,
            hidden=torch.cat([state.hidden for state in states]),
            position_ids=torch.cat([state.position_ids for state in states], 1),
            rotary=_cat_pairs([state.rotary for state in states]),
            counts=tuple(count for state in states for count in state.counts),
            starts=tuple(start for state in states for start in state.starts),
            wanted=torch.cat([state.wanted + shift for state, shift in zip(states, before, strict=False)]),
            wanted_counts=tuple(count for state in states for count in state.wanted_counts),
            deep={
                layer: torch.cat([state.deep.get(layer, torch.zeros_like(state.hidden)) for state in states])
                for layer in sorted({layer for state in states for layer in state.deep})
            },
            constant=_cat_constants([state.constant for state in states]),
            live=_cat_marks(states, "live", True),
            image=_cat_marks(states, "image", False),
            seen=tuple(part for state in states for part in state.seen),
            back=_cat_back(states),
            entries=tuple(entry for state in states for entry in state.entries),
            memory={},
        )


@dataclass(slots=True)
class PaddedStart:
    """What enters layer 0, R rows padded on the right to N tokens.

    Args:
        hidden: (R, N, d), the residual stream.
        position_ids: (R, A, N), int64. A = 1, or 3 where positions have a time, a height and a width.
        rotary: tables (R, N, d_head), or None.
        deep: visual features (R, N, d), zero at other tokens, by the layer whose output they are added to.
    """

    hidden: Tensor
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None
    deep: dict[int, Tensor]


def pack(encoded: Encoded, start: PaddedStart, wanted: Tensor) -> PackedState:
    """Return rows without their padding; wanted (R, N), bool."""
    kept, rotary = encoded.attention_mask, start.rotary
    number = torch.cumsum(kept.flatten(), 0) - 1
    return PackedState(
        hidden=start.hidden[kept],
        position_ids=start.position_ids.transpose(0, 1)[:, kept],
        rotary=None if rotary is None else (rotary[0][kept], rotary[1][kept]),
        counts=tuple(encoded.lengths.tolist()),
        starts=(0,) * len(encoded),
        wanted=number[wanted.flatten()],
        wanted_counts=tuple(wanted.sum(1).tolist()),
        layer=0,
        stage="attention",
        deep={layer: part[kept] for layer, part in start.deep.items()},
    )


def token_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    """(T,), int64: the row of each token."""
    sizes = torch.tensor(counts, device=device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), sizes, output_size=sum(counts))


def token_indices(state: PackedState, device: torch.device) -> Tensor:
    """(T,), int64: the place of each token in its row, constant ones counted."""
    row = token_rows(state.counts, device)
    first = torch.tensor(state.starts, device=device) - first_tokens(state.counts, device)
    return torch.arange(len(row), device=device) + first[row]


def first_tokens(counts: Sequence[int], device: torch.device) -> Tensor:
    """(R,), int64: the index of the first token of each row."""
    return torch.tensor([0, *accumulate(counts)][: len(counts)], device=device)


def _span(counts: Sequence[int], row: int) -> tuple[int, int]:
    start = sum(counts[:row])
    return start, start + counts[row]


def _cat_marks(states: Sequence[PackedState], name: str, absent: bool) -> Tensor | None:
    """Marks of the tokens of several states, where any has such marks; ``absent`` is what none of its own means."""
    found = [getattr(state, name) for state in states]
    if all(marks is None for marks in found):
        return None
    return torch.cat(
        [
            torch.full(state.hidden.shape[:1], absent, device=state.hidden.device) if marks is None else marks
            for state, marks in zip(states, found, strict=True)
        ]
    )


def _cat_back(states: Sequence[PackedState]) -> tuple[int, ...]:
    if not any(any(state.back) for state in states):
        return ()
    return tuple(back for state in states for back in state.back or (0,) * len(state))


def _cat_pairs(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return None
    return torch.cat([pair[0] for pair in known]), torch.cat([pair[1] for pair in known])


def _cat_constants(found: Sequence[dict[int, KeyValue]]) -> dict[int, KeyValue]:
    # Questions in text only that were prepared by themselves have none at any layer
    known = [each for each in found if each]
    return {
        layer: (torch.cat([each[layer][0] for each in known]), torch.cat([each[layer][1] for each in known]))
        for layer in (known[0] if known else ())
    }
