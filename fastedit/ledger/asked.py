"""What a run asks a ledger for: whether it can, what is there already, and what is new."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastedit.data.report import target_key
from fastedit.engine.run_state import EditJob
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import LedgerError, Transaction
from fastedit.ledger.records import question_digest
from fastedit.ledger.schema import as_text
from fastedit.requests import EditRequest


def answered(contents: Contents, requests: Sequence[EditRequest], conflicts: str = "last") -> list[int | None]:
    """See ``Ledger.answered``.

    Args:
        conflicts: "error" refuses requests that give a question another answer than it has there or among themselves.
    Raises:
        LedgerError: they do; names both. ImageError: an image cannot be read.
    """
    questions = [question_digest(request) for request in requests]
    targets = [target_key(request.target) for request in requests]
    standing = contents.standing(questions)
    if conflicts == "error":
        check_conflicts(requests, questions, targets, standing)
    there = [standing.get(question, ("", 0)) for question in questions]
    return [edit if edit and target == wanted else None for (target, edit), wanted in zip(there, targets, strict=True)]


def check_conflicts(
    edits: Sequence[EditRequest],
    questions: Sequence[str],
    targets: Sequence[str],
    standing: Mapping[str, tuple[str, int]],
) -> None:
    """Refuse edits that give a question another answer than it has in the ledger or among themselves.

    Raises:
        LedgerError: names both.
    """
    answers: dict[str, int] = {}
    for number, (question, target) in enumerate(zip(questions, targets, strict=True)):
        told = f"edits[{number}].target={edits[number].target!r:.60} to prompt={edits[number].prompt!r:.60}"
        there = standing.get(question)
        if there is not None and there[0] != target:
            raise LedgerError(
                f"ledger: a question has one answer; conflicts='last' lets the later one stand (got {told}, where edit "
                f"{there[1]} answers {there[0]!r:.60})"
            )
        first = answers.setdefault(question, number)
        if targets[first] != target:
            raise LedgerError(
                f"ledger: a question has one answer; conflicts='last' lets the later one stand (got {told}, where "
                f"edits[{first}].target={edits[first].target!r:.60})"
            )


def ask_for(
    transaction: Transaction,
    job: EditJob,
    records: Sequence[Mapping[str, Any]],
    questions: Sequence[str],
    targets: Sequence[str],
    standing: Mapping[str, tuple[str, int]],
    **run: Any,
) -> int:
    """Write down what is asked for; returns the number of the run. What is answered so already is no new edit."""
    number = 1 + (transaction.rows("SELECT max(id) FROM runs")[0][0] or 0)
    answered, members, new = dict(standing), [], 0
    for place, request in enumerate(job.edits):
        record, question, target = records[place], questions[place], targets[place]
        there = answered.get(question)
        if there is None or there[0] != target:
            edit = transaction.insert(
                "edits", run=number, number=place, name=request.id, question=question, target=target,
                request=as_text(record),
            )  # fmt: skip
            answered[question] = there = (target, edit)
            new += 1
        members.append(there[1])
    transaction.insert("runs", id=number, members=json.dumps(members), **run)
    if new:
        transaction.event("ask", run=number, edits=new, given=len(members), method=run["method"], mode=run["mode"])
    return number
