"""What a run asks a ledger for: whether it can, what is there already, and what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastedit.data.report import target_key
from fastedit.engine.output import expected_output_bytes, require_room
from fastedit.engine.run_state import EditJob
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import LedgerError, Transaction
from fastedit.ledger.records import question_digest, to_record
from fastedit.ledger.schema import as_text, utc_now
from fastedit.ledger.session import Session, run_key
from fastedit.ledger.settings import acts_alone, adds_up, check_alike, settings_of
from fastedit.ledger.stored_artifacts import keep_artifact
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger


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


@contextmanager
def begin(
    ledger: Ledger, job: EditJob, *, mode: str, conflicts: str, provenance: Mapping[str, Any]
) -> Iterator[Session]:
    """Write down what a run asks for, once it is seen that the ledger can take it.

    Raises:
        LedgerError: see ``Ledger.edit``.
    """
    contents = ledger.contents
    model = ledger.needs_model("edit")
    if job.model is not model:
        raise LedgerError("ledger: the model that is edited is the one that it was opened with (got another object)")
    ledger.check_model()
    questions = [question_digest(request) for request in job.edits]
    targets = [target_key(request.target) for request in job.edits]
    room = expected_output_bytes(model, job.plan, len(job.edits))
    with contents.writing():
        require_room(ledger.folder, room, "ledger")
        standing = contents.standing(questions)
        if conflicts == "error":
            check_conflicts(job.edits, questions, targets, standing)
        check_alike(contents, job.plan, job.spec, mode)
        if contents.followers and acts_alone(job.plan.method, mode):
            raise LedgerError(
                "ledger: edits that are served act together; give mode='sequential', or serve none (got "
                f"method={job.plan.name!r}, mode={mode!r})"
            )
        records = [to_record(request, contents.images) for request in job.edits]
        settings = settings_of(job, mode, provenance)
        key = run_key({**settings, "spec": job.spec.text}, records)
        found = contents.database.one("SELECT id FROM runs WHERE key = ? ORDER BY id DESC LIMIT 1", (key,))
        if found is None:
            with contents.transaction() as transaction:
                keep_artifact(contents, transaction, job.artifact)
                run = ask_for(
                    transaction, job, records, questions, targets, standing,
                    key=key, method=job.plan.name, mode=mode, settings=as_text(settings), spec=job.spec.text,
                    provenance=as_text(dict(provenance)), time=utc_now(),
                )  # fmt: skip
        else:
            run = int(found[0])
        members: list[int] = json.loads(contents.run(run)["members"])
        ids = list(dict.fromkeys(members))
        first = {edit: position for position, edit in reversed(list(enumerate(members)))}
        edits = [job.edits[first[edit]] for edit in ids]
        number = {edit: place for place, edit in enumerate(ids)}
        yield Session(
            contents,
            run,
            edits,
            ids,
            [number[edit] for edit in members],
            adds_up=adds_up(job.plan.method, mode),
        )
