"""Attention over packed rows: where queries and keys stand, and keys and values that are there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .branches import read_elsewhere
from .cpu_attention import attention
from .packed import KeyValue, PackedState, first_tokens, token_indices, token_rows

#: What `flash_attn.flash_attn_varlen_func` is, or stands for it.
VarlenFunction = Callable[..., Tensor]


@dataclass(slots=True)
class PackedLayout:
    """Rows of packed tokens as attention kernels for them take it.

    Args:
        query_starts, key_starts: (R + 1,), int32: where rows begin and the last one ends.
        most_queries, most_keys: tokens of the longest row. window: places a query sees, itself included; None is all.
    """

    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    window: int | None

    def to(self, device: torch.device) -> PackedLayout:
        """Return the layout for a kernel on a device."""
        return replace(self, query_starts=self.query_starts.to(device), key_starts=self.key_starts.to(device))


@dataclass(slots=True)
class AttentionPlan:
    """Where the queries and keys of packed tokens stand in padded rows.

    Args:
        rows: R. queries, keys: padded widths. capacity: places that a row of stored keys has, at least `keys`.
        query_slots: (Tq,), int64, index into R * queries; None where rows are full and nothing needs moving.
        key_slots: (T,), int64, index into R * capacity; None likewise. Behind those of the keys there are (S,) of
            ``repeated``.
        repeated: (S,), int64, the keys that other rows read as well; None where each row has its own.
        mask: (R, 1, queries, keys), bool; None is the causal mask over rows whose queries are their keys.
        present: (R,), int64, of all rows those that are meant here, where others have no tokens; None is all.
        packed: the same for a kernel that takes packed tokens; None where the queries are not the last of their rows'
            keys, or where some of those are kept elsewhere.
        folded: by how many heads share keys, the mask for all of their queries, made at the first use.
    """

    rows: int
    queries: int
    keys: int
    capacity: int
    query_slots: Tensor | None
    key_slots: Tensor | None
    mask: Tensor | None
    present: Tensor | None = None
    packed: PackedLayout | None = None
    repeated: Tensor | None = None
    folded: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> AttentionPlan:
        """Return the plan for queries and keys on a device."""
        if self.query_slots is None and self.key_slots is None and self.mask is None and self.packed is None:
            return self
        moved = {
            name: part.to(device)
            for name in ("query_slots", "key_slots", "mask", "present", "repeated")
            if (part := getattr(self, name)) is not None
        }
        packed = None if self.packed is None else self.packed.to(device)
        return replace(self, **moved, packed=packed, folded={})

    def move_on(self, passed: Tensor, place: Tensor, keys: int, *, window: int | None) -> None:
        """Let a plan of one query a row and of stored keys serve the tokens behind those that it was made for.

        Args:
            passed: (Tq,), int64, how far each row has moved. place: (Tq,), int64, where its query stands now.
            keys: padded width from now on. window: see ``plan_attention``.
        """
        assert self.key_slots is not None
        device = self.key_slots.device
        self.key_slots, self.keys, self.folded = self.key_slots + passed.to(device), keys, {}
        asked = padded(place.to(device), self.query_slots, self.rows, self.queries)[:, None, :, None]
        self.mask = _seen(asked, keys, window)

    def folded_mask(self, share: int) -> Tensor:
        """(R, 1, share * queries, keys), the mask for heads that share keys as so many more queries; made once."""
        assert self.mask is not None
        if self.queries == 1:
            return self.mask
        if share not in self.folded:
            self.folded[share] = self.mask.repeat(1, 1, share, 1)
        return self.folded[share]


def plan_attention(
    state: PackedState, chosen: Tensor | None, counts: Sequence[int], *, window: int | None, capacity: int | None = None
) -> AttentionPlan:
    """Return the plan for the tokens of a state as keys and some of them as queries.

    Args:
        state: where tokens are.
        chosen: (Tq,), int64: the query tokens; None is all. counts: how many of each row.
        window: how many places back a query sees, itself included; None is all.
        capacity: places of a row in stored keys; None where keys are not stored.
    """
    device, rows = state.hidden.device, len(state)
    ends = [start + count for start, count in zip(state.starts, state.counts, strict=True) if count]
    keys, width = max(ends), max(counts)
    full = not any(state.starts) and len(set(state.counts)) == 1 and capacity is None
    causal = chosen is None and not any(state.starts) and (window is None or window >= keys)
    row, place = token_rows(state.counts, device), token_indices(state, device)
    key_slots = None if full else row * (keys if capacity is None else capacity) + place
    elsewhere = read_elsewhere(state, keys)
    if elsewhere is not None:
        if capacity is not None or key_slots is None:
            raise ValueError(f"attention: keys that rows share are not stored (got capacity={capacity!r})")
        key_slots = torch.cat([key_slots, elsewhere[1]])
    row_q, place_q = (row, place) if chosen is None else (row[chosen], place[chosen])
    rank = torch.arange(len(row_q), device=device) - first_tokens(counts, device)[row_q]
    present = None
    if capacity is not None and 2 * len(ends) <= rows:
        # Most rows have nothing to ask: stored keys of the others are picked out
        present = torch.tensor([number for number, count in enumerate(state.counts) if count], device=device)
        number_of = torch.zeros(rows, dtype=torch.long, device=device)
        number_of[present] = torch.arange(len(present), device=device)
        row_q, rows, counts = number_of[row_q], len(present), [count for count in counts if count]
    query_slots = None if len(set(counts)) == 1 else row_q * width + rank
    mask = None
    if not causal:
        places = torch.zeros(rows * width, dtype=torch.long, device=device)
        places[row_q * width + rank] = place_q
        mask = _seen(places.view(rows, 1, width, 1), keys, window)
    packed = None
    if capacity is None and not any(state.starts) and _are_last(place_q, state.counts, counts, row_q):
        starts = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (counts, ends)]
        packed = PackedLayout(starts[0], starts[1], width, keys, window)
    repeated = None if elsewhere is None else elsewhere[0]
    return AttentionPlan(rows, width, keys, capacity or keys, query_slots, key_slots, mask, present, packed, repeated)


def _seen(asked: Tensor, keys: int, window: int | None) -> Tensor:
    """(R, 1, queries, keys), bool: which places queries at the places asked (R, 1, queries, 1) see."""
    known = torch.arange(keys, device=asked.device)
    return known <= asked if window is None else (known <= asked) & (known > asked - window)


def _are_last(place: Tensor, counts: Sequence[int], asking: Sequence[int], row: Tensor) -> bool:
    """Whether the queries of every row, at these places, are its last tokens; rows without tokens have no answer."""
    if not all(counts):
        return False
    first = torch.tensor([count - asks for count, asks in zip(counts, asking, strict=True)], device=place.device)
    return bool((place >= first[row]).all())


def varlen_function(implementation: str, device: torch.device) -> VarlenFunction | None:
    """Return flash-attn's function for packed rows where a model wants flash-attn and it can run, or None."""
    if device.type != "cuda" or not implementation.startswith("flash_attention"):
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    found: VarlenFunction = flash_attn_varlen_func
    return found


class Past(Protocol):
    """Keys and values of earlier tokens of the same rows."""

    def extend(self, layer: int, plan: AttentionPlan, key: Tensor, value: Tensor) -> KeyValue:
        """Put those of new tokens (T, heads, d_head) behind them; return all, (R, plan.keys, heads, d_head)."""


class StoredPast:
    """Keys and values of everything that was computed so far, in buffers made once. Not differentiable.

    A layer that is walked again from an earlier place overwrites what was behind it.

    Args:
        rows: R. capacity: most tokens of a row.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._buffers: dict[int, KeyValue] = {}

    def extend(self, layer: int, plan: AttentionPlan, key: Tensor, value: Tensor) -> KeyValue:
        """See `Past`."""
        if layer not in self._buffers:
            shape = (self.rows * self.capacity, *key.shape[1:])
            self._buffers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        assert plan.key_slots is not None
        found = []
        for buffer, new in zip(self._buffers[layer], (key, value), strict=True):
            buffer.index_copy_(0, plan.key_slots, new)
            known = buffer.view(self.rows, self.capacity, *new.shape[1:])[:, : plan.keys]
            found.append(known if plan.present is None else known[plan.present])
        return found[0], found[1]

    def grow(self, capacity: int) -> None:
        """Make room for rows of that many tokens, if there is less."""
        if capacity <= self.capacity:
            return
        for layer, pair in self._buffers.items():
            wider = []
            for part in pair:
                rows = part.view(self.rows, self.capacity, -1)
                padding = (0, 0, 0, capacity - self.capacity)
                wider.append(torch.nn.functional.pad(rows, padding).view(-1, *part.shape[1:]))
            self._buffers[layer] = (wider[0], wider[1])
        self.capacity = capacity

    @property
    def n_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(part.numel() * part.element_size() for pair in self._buffers.values() for part in pair)


def attend(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    past: Past | None,
    varlen: VarlenFunction | None = None,
) -> Tensor:
    """Softmax attention of packed queries (Tq, heads, d_head) over packed keys and values (T, groups, d_head).

    Heads are a multiple of the groups; consecutive heads share one. A kernel for packed rows (`varlen`) serves where
    nothing comes before them; else rows are padded for torch's own.

    Returns:
        (Tq, heads * d_head).
    """
    if varlen is not None and past is None and plan.packed is not None:
        return _attend_packed(query, key, value, plan.packed, scale, varlen)
    if past is None:
        if plan.repeated is not None:
            key, value = (torch.cat([part, part.index_select(0, plan.repeated)]) for part in (key, value))
        key, value = (padded(part, plan.key_slots, plan.rows, plan.keys) for part in (key, value))
    else:
        key, value = past.extend(layer, plan, key, value)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    spread = padded(query, plan.query_slots, plan.rows, plan.queries).transpose(1, 2)
    heads, groups = spread.shape[1], key.shape[1]
    share = heads // groups
    if plan.mask is None:
        shares = share > 1 and shares_keys(spread)
        if share > 1 and not shares:
            key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        mixed = attention(spread, key, value, is_causal=True, scale=scale, enable_gqa=shares)
    elif share > 1:
        # Heads that share keys are so many more queries of one head: nothing is repeated
        folded = spread.reshape(plan.rows, groups, share * plan.queries, -1)
        mixed = attention(folded, key, value, attn_mask=plan.folded_mask(share), scale=scale)
        mixed = mixed.reshape(plan.rows, heads, plan.queries, -1)
    else:
        mixed = attention(spread, key, value, attn_mask=plan.mask, scale=scale)
    mixed = mixed.transpose(1, 2).reshape(plan.rows * plan.queries, -1)
    return mixed if plan.query_slots is None else mixed[plan.query_slots]


def shares_keys(query: Tensor) -> bool:
    """Whether torch's attention takes keys that heads share as they are, and is no slower for it.

    A GPU's kernel for float32 does not take them: torch would fall back to one that holds all scores.
    """
    return query.device.type == "cpu" or query.dtype in (torch.bfloat16, torch.float16)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, varlen: VarlenFunction
) -> Tensor:
    """The same by flash-attn, whose causal mask is aligned to the last query and the last key of a row."""
    mixed = varlen(
        query,
        key,
        value,
        layout.query_starts,
        layout.key_starts,
        layout.most_queries,
        layout.most_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if layout.window is None else (layout.window - 1, 0),
    )
    return mixed.flatten(1)


def padded(values: Tensor, slots: Tensor | None, rows: int, width: int) -> Tensor:
    """Return packed values (T, ...) in padded rows (R, width, ...), zeros elsewhere. `slots` None moves nothing."""
    if slots is not None:
        values = values.new_zeros(rows * width, *values.shape[1:]).index_copy(0, slots, values)
    return values.view(rows, width, *values.shape[1:])
