"""Rows of one edit that begin alike, with one image and the same words: what they share is walked once.

A row that branches off another has the tokens behind the shared ones alone; its attention reads the keys and values of
those in the other row. That holds for whatever treats the tokens of both rows alike, under a causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .packed import PackedState, first_tokens
from .states import Encoded

#: Fewer shared tokens are not worth the copies of their keys.
FEWEST = 16


def shared_start(encoded: Encoded, row: int, other: int) -> int:
    """How many tokens two rows begin with alike; less than both prompts, and 0 where it is not worth while."""
    most = int(torch.minimum(encoded.last_prompt[row], encoded.last_prompt[other]))
    same = encoded.input_ids[row, :most] == encoded.input_ids[other, :most]
    images = [encoded.images[each] for each in (row, other)]
    keys = [None if image is None else image.key for image in images]
    if keys[0] != keys[1]:
        same = same & ~(encoded.image_mask[row, :most] | encoded.image_mask[other, :most])
    shared = int(same.long().cumprod(0).sum())
    return shared if shared >= FEWEST and not encoded.read else 0


def branches(encoded: Encoded, leaders: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Rows that branch off: by row, how many rows back the other stands, and how many tokens they share.

    Args:
        encoded: R rows. leaders: (R,) the row before it that each may branch off; itself where none is.
    """
    found = {}
    for row, leader in enumerate(leaders):
        shared = shared_start(encoded, row, leader) if leader < row else 0
        if shared:
            found[row] = (row - leader, shared)
    return found


def branched(state: PackedState, off: Mapping[int, tuple[int, int]]) -> PackedState:
    """Return a state at the start of the decoder without the tokens that rows share with others (``branches``)."""
    if not off:
        return state
    kept = torch.ones(state.hidden.shape[0], dtype=torch.bool, device=state.hidden.device)
    for row, (_, shared) in off.items():
        first = sum(state.counts[:row])
        kept[first : first + shared] = False
    rows = range(len(state))
    starts = tuple(off[row][1] if row in off else state.starts[row] for row in rows)
    return replace(state.only(kept), starts=starts, back=tuple(off[row][0] if row in off else 0 for row in rows))


def read_elsewhere(state: PackedState, width: int) -> tuple[Tensor, Tensor] | None:
    """Which tokens (S,) are read by other rows as well, and their slots there (S,) among rows of so many places.

    Raises:
        ValueError: a row without the one that it branches off.
    """
    if not any(state.back):
        return None
    device, firsts = state.hidden.device, first_tokens(state.counts, state.hidden.device).tolist()
    tokens, slots = [], []
    for row, back in enumerate(state.back):
        if not back:
            continue
        if back > row or state.counts[row - back] < state.starts[row]:
            raise ValueError(f"branches: a row comes behind the one that it branches off (got row={row}, back={back})")
        here = torch.arange(state.starts[row], device=device)
        tokens.append(firsts[row - back] + here)
        slots.append(row * width + here)
    return torch.cat(tokens), torch.cat(slots)
