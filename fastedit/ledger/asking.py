"""Ask a model the questions of edits, as they stand at a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastedit.deltas import EditDelta
from fastedit.engine.acting import applied
from fastedit.evaluation.normalise import exact_match
from fastedit.ledger.records import question_digest
from fastedit.requests import EditRequest, Query

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger
    from fastedit.ledger.state import LedgerState

#: Questions at a time.
AT_ONCE = 64


def ask(ledger: Ledger, state: LedgerState, prompt: str, image: Any) -> tuple[str, str]:
    """See ``Ledger.ask``."""
    model, query = ledger.needs_model("ask"), Query(prompt, image)
    before = model.answer(query.image, query.prompt)
    if not state.act_alone or len(state) < 2:
        with state.applied() as edited:
            return before, edited.answer(query.image, query.prompt)
    asked_again = question_digest(query)
    rows = {edit: ledger.contents.edit(edit)["question"] for edit in state.edit_ids}
    # Of several the later one stands
    place = max((place for place, edit in enumerate(state.edit_ids) if rows[edit] == asked_again), default=None)
    return before, before if place is None else alone(ledger, state.deltas[place], query)


def answers_of(ledger: Ledger, state: LedgerState | None, queries: Sequence[Query]) -> list[str]:
    """Greedy answers as of a state; None is the base model."""
    model = ledger.needs_model("asking")
    if state is None:
        return asked(ledger, queries)
    with state.applied():
        assert model is not None
        return asked(ledger, queries)


def asked(ledger: Ledger, queries: Sequence[Query]) -> list[str]:
    """Greedy answers of the model as it stands here."""
    model = ledger.needs_model("asking")
    found: list[str] = []
    for start in range(0, len(queries), AT_ONCE):
        found += model.generate(list(queries[start : start + AT_ONCE]))
    return found


def own_answers(ledger: Ledger, state: LedgerState) -> list[str]:
    """The answers to the edits' own questions: with all edits, or, where those act alone, each with its own."""
    queries = [question_of(request) for request in state.requests()]
    if not state.act_alone:
        return answers_of(ledger, state, queries)
    return [alone(ledger, delta, query) for delta, query in zip(state.deltas, queries, strict=True)]


def alone(ledger: Ledger, delta: EditDelta, query: Query) -> str:
    """The answer with one edit."""
    model = ledger.needs_model("asking")
    with applied(model, delta, check_sequence=False):
        return model.answer(query.image, query.prompt)


def question_of(request: EditRequest) -> Query:
    """The question of an edit, without its answer."""
    return Query(request.prompt, request.image)


def holds(answer: str, request: EditRequest) -> bool:
    """Whether an answer is what an edit asked for, after normalisation (protocol "strict")."""
    return exact_match(answer, request.target)
