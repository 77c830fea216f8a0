"""Edits of a ledger act in a served model from the next request on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from tests.engine.stock_calls import stock_answers
from tests.programs import host

SURE = {"steps": 40, "lr": 1e-2, "evaluate": False, "views": "record", "show_progress": False}


def asked(model: EditableModel, edits: list[EditRequest], ledger: Ledger) -> list[str]:
    return [model.answer(edit.image, edit.prompt, edits=ledger.active()) for edit in edits]


@pytest.mark.parametrize("method", ["lora", "grace"])
def test_an_edit_acts_in_the_next_request_and_not_when_it_is_taken_back(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], method: str
) -> None:
    questions = [fastedit.Query(edit.prompt, edit.image) for edit in edits[:2]]
    base = stock_answers(model, model.hf, questions)
    handle = fastedit.attach(model, ledger.active())
    try:
        assert stock_answers(model, model.hf, questions) == base
        ledger.edit(edits[:1], method, **SURE)
        first = stock_answers(model, model.hf, questions)
        ledger.edit(edits[1:2], method, **SURE)
        both = stock_answers(model, model.hf, questions)
        assert first[0] != base[0]
        assert both[1] != first[1]
        ledger.undo(2)
        assert stock_answers(model, model.hf, questions) == first
        ledger.undo(1)
        assert stock_answers(model, model.hf, questions) == base
    finally:
        handle.detach()
    assert stock_answers(model, model.hf, questions) == base


def test_traffic_goes_on_while_edits_are_made(ledger: Ledger, model: EditableModel, edits: list[EditRequest]) -> None:
    """Every answer is that of a state that held while it was asked; a later request never has an older one."""
    questions = [fastedit.Query(edit.prompt, edit.image) for edit in edits[:1]]
    states = [tuple(stock_answers(model, model.hf, questions))]
    seen: list[list[tuple[str, ...]]] = [[], []]
    over = threading.Event()
    errors: list[BaseException] = []

    def serve(found: list[tuple[str, ...]]) -> None:
        try:
            while not over.is_set():
                found.append(tuple(stock_answers(model, model.hf, questions)))
        except BaseException as error:
            errors.append(error)

    handle = fastedit.attach(model, ledger.active())
    threads = [threading.Thread(target=serve, args=(found,)) for found in seen]
    try:
        for thread in threads:
            thread.start()
        for edit in edits[:4]:
            counts = [len(found) for found in seen]
            ledger.edit([edit], "ft", **{**SURE, "steps": 6})
            with ledger.state().applied():
                pass
            while not errors and any(len(found) < count + 2 for found, count in zip(seen, counts, strict=True)):
                time.sleep(0.01)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        handle.detach()
    assert not errors
    for number in (event.id for event in ledger.history() if event.action == "edit"):
        with fastedit.attached(model, ledger.at(number).acting()) as hf:
            states.append(tuple(stock_answers(model, hf, questions)))
    assert len(set(states)) > 2, "the case needs edits that change the answer"
    for found in seen:
        # In order: no request has a state before that of the one before
        place = 0
        for answers in found:
            assert answers in states
            while states[place] != answers:
                place += 1
        assert answers == states[-1] or place >= len(states) - 2


COMMIT = """
import sys
import fastedit
from tests.engine.conftest import make_edits
model = fastedit.load("random:llava-tiny", dtype="float64")
with fastedit.open_ledger(sys.argv[1], model) as ledger:
    ledger.edit(make_edits(2)[1:], "grace", steps=40, lr=1e-2, evaluate=False, views="record", show_progress=False)
"""


def test_what_another_process_commits_acts_too(ledger: Ledger, model: EditableModel, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "grace", **SURE)
    before = asked(model, edits[:2], ledger)
    done = host().run(COMMIT, ledger.folder)
    assert done.returncode == 0, done.stderr[-500:]
    after = asked(model, edits[:2], ledger)
    assert (after[0], len(ledger)) == (before[0], 2)
    assert after[1] != before[1]


def test_edits_that_cannot_act_together_are_not_made_while_they_are_served(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    handle = fastedit.attach(model, ledger.active())
    with pytest.raises(LedgerError, match=r"edits that are served act together; give mode='sequential'"):
        ledger.edit(edits[:2], "lora", mode="single", **SURE)
    handle.detach()


def test_looking_up_what_acts_takes_microseconds(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:3], "grace", **{**SURE, "steps": 1})
    live = ledger.active()
    first = live.current()
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        assert all(live.current() is first for _ in range(100))
        taken.append(time.perf_counter() - started)
    # Some 10 us each; a disk or a lock in between would take far longer, at every try
    assert min(taken) < 0.5


def test_ledgers_are_opened_and_made_while_edits_are_served(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    ledger.edit(edits[:1], "lora", **SURE)
    base, edited = ledger.ask(edits[0].prompt, edits[0].image)
    handle = fastedit.attach(model, ledger.active())
    try:
        assert ledger.ask(edits[0].prompt, edits[0].image) == (base, edited)
        with fastedit.open_ledger(ledger.folder, model) as again, fastedit.open_ledger(tmp_path / "new", model) as new:
            assert not again.verify(ask=True).lost
            assert [change.before for change in again.diff()] == [base]
            new.edit(edits[1:2], "ft", **SURE)
    finally:
        handle.detach()
    fastedit.open_ledger(tmp_path / "new", model).close()
    with fastedit.applied(model, ledger.active()):
        ledger.edit(edits[1:2], "lora", **SURE)
        assert model.answer(edits[1].image, edits[1].prompt) == ledger.ask(edits[1].prompt, edits[1].image)[1]
