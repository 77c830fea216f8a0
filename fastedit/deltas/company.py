"""Deltas that are active together, told by a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from fastedit.deltas.base import EditDelta


def company(deltas: Iterable[EditDelta]) -> tuple[str, ...]:
    """What identifies deltas that are active together, in order: () for none, else one text "number:digest".

    The digest is a chain, so that the company of a long sequence is no longer to write than that of two, and known from
    that of the sequence before.
    """
    count, digest = 0, ""
    for delta in deltas:
        size, _, chain = delta.merged[0].partition(":") if delta.merged else ("1", "", delta.id)
        digest = chain if delta.merged and not count else hashlib.sha256(f"{digest}+{chain}".encode()).hexdigest()
        count += int(size)
    return (f"{count}:{digest}",) if count else ()


def grown(company: tuple[str, ...], delta_id: str) -> tuple[str, ...]:
    """The company of deltas and of one more behind them, a single edit's, which is known by its id."""
    count, _, digest = company[0].partition(":") if company else ("0", "", "")
    return (f"{int(count) + 1}:{hashlib.sha256(f'{digest}+{delta_id}'.encode()).hexdigest()}",)
