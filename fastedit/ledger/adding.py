"""Take deltas into a ledger that were made elsewhere: adapters of others, or those of a saved run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import nan
from typing import TYPE_CHECKING

from fastedit.data.report import target_key
from fastedit.deltas import EditDelta
from fastedit.engine import provenance as origin
from fastedit.engine.apply import checked_deltas
from fastedit.engine.run import plain
from fastedit.fitting.solver import FitOutcome
from fastedit.ledger.asked import check_conflicts
from fastedit.ledger.database import LedgerError
from fastedit.ledger.records import question_digest, to_record
from fastedit.ledger.schema import as_text, utc_now
from fastedit.ledger.settings import check_alike
from fastedit.methods import resolve
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger

#: The method of a kind that one method alone makes, or that says nothing of how it was made.
BY_KIND = {"low_rank": "lora", "full": "ft", "codebook": "grace", "localized": "ldke", "counterfactual": "serac"}
ELSEWHERE = FitOutcome("computed", 0, nan, nan)


def add(
    ledger: Ledger, deltas: EditDelta | Sequence[EditDelta], requests: Sequence[EditRequest], *, method: str | None
) -> list[int]:
    """See ``Ledger.add``."""
    model, contents = ledger.needs_model("add"), ledger.contents
    ledger.check_model()
    listed = checked_deltas(model, deltas)
    if len(listed) != len(requests):
        raise LedgerError(f"ledger: every delta has a request (got {len(requests)} for {len(listed)})")
    spec = listed[0].spec
    name = BY_KIND.get(spec.kind) if method is None else method
    if name is None:
        raise LedgerError(f"ledger: method says what made deltas of kind {spec.kind!r} (got None)")
    plan = resolve(name, {})
    for number, delta in enumerate(listed):
        if delta.fitted_on or delta.merged:
            raise LedgerError(
                f"ledger: deltas that are added were fitted each alone on the base model (got deltas[{number}], of "
                f"request {delta.request_id!r:.80}, fitted on top of others)"
            )
    questions = [question_digest(request) for request in requests]
    targets = [target_key(request.target) for request in requests]
    added: list[int] = []
    with contents.writing():
        check_conflicts(requests, questions, targets, contents.standing(questions))
        check_alike(contents, plan, spec, "single")
        records = [to_record(request, contents.images) for request in requests]
        settings = {
            "method": name, "mode": "single", "overrides": {}, "seed": 0, "bind": "content", "views": "heldout",
            "near": True, "artifact": None, "pool": None, "added": True,
        }  # fmt: skip
        with contents.transaction() as transaction:
            run = 1 + (transaction.rows("SELECT max(id) FROM runs")[0][0] or 0)
            for number, (request, record) in enumerate(zip(requests, records, strict=True)):
                added.append(
                    transaction.insert(
                        "edits", run=run, number=number, name=request.id, question=questions[number],
                        target=targets[number], request=as_text(record),
                    )
                )  # fmt: skip
            transaction.insert(
                "runs", id=run, method=name, mode="single", settings=as_text(settings), spec=spec.text,
                members=json.dumps(added), key=f"added {run}", time=utc_now(),
                provenance=as_text({"versions": origin.versions(), "time": origin.utc_now()}),
            )  # fmt: skip
            named = [replace(d, request_id=request.id) for d, request in zip(listed, requests, strict=True)]
            segment = contents.segments.write(transaction, named)
            event = transaction.event("add", edits=added, run=run, method=name)
            for row, (edit, delta) in enumerate(zip(added, named, strict=True)):
                transaction.insert(
                    "versions", edit=edit, since=event, until=None, place=edit, segment=segment, row=row,
                    delta=delta.id, fitted_on=None, outcome=as_text(plain(asdict(ELSEWHERE))),
                )  # fmt: skip
    return added
