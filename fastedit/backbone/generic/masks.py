"""What a token of a row may see, kept row by row: never a square of all packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import AttentionPlan, plan_attention
from ..packed import PackedState

#: What one row's tokens see of each other: None is everything before them, a number is so many places back (a token's
#: own included), a tensor (N, N) says it pair by pair: True where a query sees a key, or what is added to the score.
RowMask = int | Tensor | None


def row_mask(made: Tensor | None, window: int | None) -> RowMask:
    """Return a mask (1, 1, N, N) that a stock model made for one row in its simplest form.

    Args:
        made: of booleans, or of numbers that are added to scores; None is the causal mask.
        window: how far back the layer that it is for sees, where it says so.
    """
    if made is None:
        return None
    if made.dim() != 4 or made.shape[:2] != (1, 1) or made.shape[2] != made.shape[3]:
        raise ValueError(f"a mask of one row must be (1, 1, N, N) (got shape={tuple(made.shape)})")
    mask = made[0, 0]
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            return mask
        mask = mask == 0
    causal = torch.ones_like(mask).tril()
    if torch.equal(mask, causal):
        return None
    if window is not None and torch.equal(mask, causal.triu(1 - window)):
        return window
    return mask


def moved_mask(mask: RowMask, change: Callable[[Tensor], Tensor]) -> RowMask:
    """Return a mask with its tensor, where it has one, replaced by ``change(tensor)``."""
    return change(mask) if isinstance(mask, Tensor) else mask


def plan_rows(
    state: PackedState,
    masks: Sequence[RowMask],
    chosen: Tensor | None,
    counts: Sequence[int],
    capacity: int | None,
) -> AttentionPlan:
    """Return the plan of attention over the tokens of a state, each row under a mask of its own.

    Args:
        state: R rows. masks: of the R rows; those of all places from the first on, so a row that goes on behind tokens
            that are stored takes the lower part of its own.
        chosen: (Tq,), int64: the query tokens; None is all. counts: how many of each row.
        capacity: places of a row in stored keys; None where keys are not stored.
    """
    present = [mask for mask, count in zip(masks, state.counts, strict=True) if count]
    windows = {mask for mask in present if isinstance(mask, int)}
    if not any(isinstance(mask, Tensor) for mask in present) and len(windows) <= 1:
        window = next(iter(windows), None)
        ends = [a + b for a, b, mask in zip(state.starts, state.counts, masks, strict=True) if b and mask is None]
        # A row under the causal mask beside one under a window: the same where it is no longer than that
        if window is None or all(end <= window for end in ends):
            return plan_attention(state, chosen, counts, window=window, capacity=capacity)
    # A window of one place makes the planner lay out queries and keys and write a mask, which is then replaced
    plan = plan_attention(state, chosen, counts, window=1, capacity=capacity)
    rows = range(len(state)) if plan.present is None else plan.present.tolist()
    added = any(isinstance(mask, Tensor) and mask.dtype != torch.bool for mask in present)
    device = state.hidden.device
    kind = next(m.dtype for m in present if isinstance(m, Tensor) and m.dtype != torch.bool) if added else torch.bool
    hidden = torch.finfo(kind).min if added else False
    wide = torch.full((plan.rows, 1, plan.queries, plan.keys), hidden, dtype=kind, device=device)
    # Queries of padding see the first key: a query that sees none makes gradients that are no numbers
    wide[..., 0] = 0 if added else True
    asked = asked_places(state, chosen, counts)
    for number, row in enumerate(rows):
        places = asked[row]
        if len(places):
            wide[number, 0, : len(places), : int(state.starts[row]) + state.counts[row]] = _part(
                masks[row], places, int(state.starts[row]) + state.counts[row], kind
            )
    return replace(plan, mask=wide, packed=None)


def asked_places(state: PackedState, chosen: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
    """By row, the indices of the query tokens."""
    device = state.hidden.device
    spans = [torch.arange(start, start + count, device=device) for start, count in zip(state.starts, state.counts)]
    if chosen is None:
        return spans
    return list(torch.split(torch.cat(spans)[chosen], list(counts)))


def _part(mask: RowMask, places: Tensor, keys: int, kind: torch.dtype) -> Tensor:
    """What queries at some places of a row see of its first keys: (queries, keys)."""
    if isinstance(mask, Tensor):
        part = mask.to(places.device)[places, :keys]
    else:
        key = torch.arange(keys, device=places.device)
        part = key <= places[:, None]
        if mask is not None:
            part = part & (key > places[:, None] - mask)
    if kind == torch.bool or part.dtype != torch.bool:
        return part
    return torch.zeros(part.shape, dtype=kind, device=part.device).masked_fill(~part, torch.finfo(kind).min)
