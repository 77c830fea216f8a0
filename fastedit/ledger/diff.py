"""Which answers differ between two moments of a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastedit.ledger.asking import answers_of, own_answers, question_of
from fastedit.ledger.database import LedgerError
from fastedit.requests import Query

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger
    from fastedit.ledger.state import LedgerState


@dataclass(frozen=True)
class Change:
    """A question whose answer differs.

    Args:
        query: the question. before, after: greedy answers. edit: whose question it is; None of others.
    """

    query: Query
    before: str
    after: str
    edit: int | None = None


def changes(
    ledger: Ledger, before: str | int | None, after: str | int | None, questions: Sequence[Query]
) -> list[Change]:
    """See ``Ledger.diff``."""
    for number, query in enumerate(questions):
        if not isinstance(query, Query):
            raise LedgerError(f"ledger: questions are fastedit.Query (got questions[{number}]={query!r:.80})")
    states: tuple[LedgerState | None, LedgerState] = (
        None if before is None else ledger.at(before),
        ledger.state() if after is None else ledger.at(after),
    )
    ids: list[int | None]
    if questions:
        queries, ids = list(questions), [None] * len(questions)
    else:
        acting = sorted({edit for state in states if state is not None for edit in state.edit_ids})
        ids = [*acting]
        queries = [question_of(request) for request in ledger.contents.requests(acting)]
    found = [_answers(ledger, state, ids, queries) for state in states]
    return [
        Change(query, old, new, edit)
        for query, old, new, edit in zip(queries, *found, ids, strict=True)
        if old != new
    ]  # fmt: skip


def _answers(
    ledger: Ledger, state: LedgerState | None, ids: Sequence[int | None], queries: Sequence[Query]
) -> list[str]:
    """Answers in a state. Where edits act alone, each question is asked with its own edit, if that acts."""
    if state is None or not state.act_alone or (None in ids and len(state) < 2):
        return answers_of(ledger, state, queries)
    if None in ids:
        state.require_together()
    known = dict(zip(state.edit_ids, own_answers(ledger, state), strict=True))
    base = answers_of(ledger, None, queries)
    return [known.get(edit, plain) if edit is not None else plain for edit, plain in zip(ids, base, strict=True)]
