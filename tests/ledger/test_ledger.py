"""Edits that are committed as they end: what is made once, refused, found again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.engine.interrupted import RunInterrupted
from fastedit.ledger.session import Session
from tests.engine.test_editing import largest_difference
from tests.ledger.conftest import FEW

#: How edits of each are made: fitted each alone and routed, or on top of the earlier ones, or without a sequence.
WAYS = [
    ("ft", "sequential"), ("lora", "sequential"), ("grace", "sequential"), ("wise", "sequential"),
    ("tpatcher", "sequential"), ("lora", "single"), ("grace", "single"), ("ike", "single"),
]  # fmt: skip


def given(method: str) -> dict[str, Any]:
    """Settings of a short run."""
    return {"show_progress": False, "k": 0} if method == "ike" else dict(FEW)


@pytest.mark.parametrize(("method", "mode"), WAYS)
def test_a_run_of_a_ledger_is_that_without_one(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], method: str, mode: str
) -> None:
    plain = fastedit.edit(model, edits[:4], method, mode=mode, batch_size=3, **given(method))
    kept = ledger.edit(edits[:4], method, mode=mode, batch_size=3, **given(method))
    assert len(ledger) == 4
    if method != "ike":
        assert largest_difference(list(kept.deltas), list(plain.deltas)) == 0
    assert kept.edit_scores == plain.edit_scores
    assert kept.outcomes == plain.outcomes or method == "ike"
    again = ledger.edit(edits[:4], method, mode=mode, batch_size=2, **given(method))
    assert again.edit_scores == plain.edit_scores
    assert (len(ledger), again.timing.steps) == (4, 0)


@contextmanager
def pulled(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Inside the block a session's method breaks off when it is called for the third time."""
    real, calls = getattr(Session, name), []

    def broken(self: Session, *details: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("pulled")
        real(self, *details)

    with monkeypatch.context() as patched:
        patched.setattr(Session, name, broken)
        yield


@pytest.mark.parametrize(("method", "mode"), WAYS)
def test_a_run_that_broke_off_goes_on_and_ends_as_one_that_did_not(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], method: str, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = fastedit.edit(model, edits[:5], method, mode=mode, **given(method))
    told = r"2 of 5 edits are finished.*they are committed in the ledger"
    with pulled(monkeypatch, "commit"), pytest.raises(RunInterrupted, match=told):
        ledger.edit(edits[:5], method, mode=mode, **given(method))
    ledger.close()
    with fastedit.open_ledger(ledger.folder, model) as opened:
        assert len(opened) == 2
        made = opened.edit(edits[:5], method, mode=mode, batch_size=2, **given(method))
        assert len(opened) == 5
        if method != "ike":
            assert largest_difference(list(made.deltas), list(whole.deltas)) < 1e-8
        for a, b in zip(made.edit_scores, whole.edit_scores, strict=True):
            assert a.strict == pytest.approx(b.strict, abs=1e-6, nan_ok=True)
            assert a.legacy == pytest.approx(b.legacy, abs=1e-6, nan_ok=True)
        assert [[a["after"] for a in each.answers] for each in made.edit_scores] == [
            [a["after"] for a in each.answers] for each in whole.edit_scores
        ]


def test_scores_that_were_not_made_are_made_by_the_next_call(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fastedit.edit(model, edits[:4], "ft", mode="sequential", batch_size=2, score_at=(2,), **FEW)
    with pulled(monkeypatch, "commit_scores"), pytest.raises(RunInterrupted):
        ledger.edit(edits[:4], "ft", batch_size=2, score_at=(2,), **FEW)
    assert len(ledger) == 4
    made = ledger.edit(edits[:4], "ft", batch_size=2, score_at=(2,), **FEW)
    assert made.edit_scores == whole.edit_scores
    assert made.checkpoints == whole.checkpoints
    assert made.timing.steps == 0


def test_a_sequence_goes_on_from_stored_deltas(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    with fastedit.open_ledger(tmp_path / "other", model) as other:
        whole = other.edit(edits[:4], "ft", evaluate=False, views="record", **FEW)
    for start in range(4):
        part = ledger.edit(edits[start : start + 1], "ft", evaluate=False, views="record", **FEW)
        assert largest_difference(list(part.deltas), [whole.deltas[start]]) == 0
    assert [delta.fitted_on for delta in ledger.state().deltas] == [delta.fitted_on for delta in whole.deltas]


def test_what_is_answered_so_already_is_no_new_edit(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    twice = replace(edits[0], prompt=f"  {edits[0].prompt.upper()}", id="other")
    run = ledger.edit([edits[0], edits[1], twice], "lora", **FEW)
    assert len(ledger) == 2
    assert [delta.request_id for delta in run.deltas] == ["edit-0", "edit-1", "edit-0"]
    assert len(run.outcomes) == len(run.edit_scores) == 3
    # Also where the image comes from a file
    stored = ledger.contents.request(1)
    assert isinstance(stored.image, Path)
    ledger.edit([stored, edits[2]], "lora", **FEW)
    assert len(ledger) == 3
    assert ledger.history()[-2].detail["given"] == 2
    assert ledger.history()[-2].detail["edits"] == 1


@pytest.mark.parametrize(("method", "mode"), [("grace", "sequential"), ("ft", "sequential"), ("lora", "single")])
def test_a_question_has_one_answer(ledger: Ledger, edits: list[EditRequest], method: str, mode: str) -> None:
    other = replace(edits[0], target="yellow", id="other")
    for listed in ([edits[0], other], [edits[1], edits[0]]):
        ledger.edit(edits[1:2], method, mode=mode, **FEW)
        if listed[1] is edits[0]:
            ledger.edit([replace(edits[0], target="yellow")], method, mode=mode, **FEW)
        before = ledger.history()
        with pytest.raises(
            LedgerError, match=r"a question has one answer; conflicts='last'.*'What is number 0 here\?'"
        ):
            ledger.edit(listed, method, mode=mode, **FEW)
        assert ledger.history() == before
    ledger.edit([edits[0]], method, mode=mode, conflicts="last", **FEW)
    old, new = [shown for shown in ledger.edits() if shown.prompt == edits[0].prompt]
    assert (old.status, old.target, new.status, new.target) == ("replaced", "yellow", "acts", "blue")
    assert ledger.undo(new.id).ids == (new.id,)
    assert [shown.status for shown in ledger.edits() if shown.prompt == edits[0].prompt] == ["acts", "undone"]


def test_edits_that_cannot_act_beside_each_other_are_refused(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:2], "lora", rank=2, **FEW)
    for method, options, message in (
        ("ft", {}, r"one method and mode; .*method='ft', mode='sequential' beside 2 of 'lora', mode='sequential'"),
        ("lora", {"mode": "single"}, r"got method='lora', mode='single' beside 2 of 'lora', mode='sequential'"),
        ("lora", {"layers": 1}, r"one kind of delta at the same sites"),
    ):
        with pytest.raises(LedgerError, match=message):
            ledger.edit(edits[2:3], method, **options, **FEW)
    ledger.edit(edits[2:3], "kl+lora", rank=3, views="record", **FEW)
    assert len(ledger) == 3
    ledger.undo([1, 2, 3])
    ledger.edit(edits[2:3], "ft", **FEW)
    assert ledger.state().edit_ids == [4]


def test_edits_belong_to_a_model_and_its_prompts(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    ledger.edit(edits[:1], "lora", **FEW)
    other = fastedit.load("random:llava-tiny", dtype="float64", template="Q: {} A:")
    with pytest.raises(
        LedgerError, match=r"questions are put as when the edits were made \(got template='<image>Q: {} A:'"
    ):
        fastedit.open_ledger(ledger.folder, other)
    changed = copy.deepcopy(model.hf)
    next(changed.parameters()).data.add_(1)
    wrapped = fastedit.wrap(changed, model.processor)
    with pytest.raises(LedgerError, match="it is of the model in use"):
        fastedit.open_ledger(ledger.folder, wrapped)
    with pytest.raises(LedgerError, match="the one that it was opened with"):
        fastedit.edit(fastedit.load("random:llava-tiny", dtype="float64"), edits, "lora", ledger=ledger, **FEW)
    with (
        fastedit.applied(model, ledger.state().deltas[0]),
        pytest.raises(LedgerError, match="it is of the model in use"),
    ):
        ledger.edit(edits[1:2], "lora", **FEW)


def test_edits_that_are_bound_to_the_architecture_go_with_another_dtype(
    tmp_path: Path, model: EditableModel, edits: list[EditRequest]
) -> None:
    single = fastedit.load("random:llava-tiny", dtype="float32")
    with fastedit.open_ledger(tmp_path / "edits", model) as ledger:
        ledger.edit(edits[:2], "grace", bind="architecture", **FEW)
    with (
        fastedit.open_ledger(tmp_path / "edits", single) as ledger,
        pytest.warns(RuntimeWarning, match="fitted in float64"),
        ledger.state().applied() as edited,
    ):
        assert isinstance(edited.answer(edits[0].image, edits[0].prompt), str)


def test_what_is_no_ledger_is_refused(tmp_path: Path, model: EditableModel) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LedgerError, match="it is a folder, and lies in one"):
            fastedit.open_ledger(path, model)
    with pytest.raises(LedgerError, match=r"the folder is new, empty or a ledger's \(got 'file'"):
        fastedit.open_ledger(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="holds a ledger, or a model is given"):
        fastedit.open_ledger(tmp_path / "absent")
    with pytest.raises(LedgerError, match="model is an EditableModel"):
        fastedit.open_ledger(tmp_path / "absent", model.hf)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_ledger_is_read_without_a_model(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:2], "lora", **FEW)
    reader = fastedit.open_ledger(ledger.folder)
    assert (len(reader), reader.show(1).prompt, reader.verify().sound) == (2, edits[0].prompt, True)
    assert repr(reader) == f"<Ledger: 2 edits act, of random:llava-tiny, in {ledger.folder}>"
    for call in (lambda: reader.edit(edits), lambda: reader.ask("x"), lambda: reader.verify(ask=True)):
        with pytest.raises(LedgerError, match=r"needs the model; open it with"):
            call()


def test_no_room_on_the_disk_is_said_before_any_work(
    ledger: Ledger, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10})())
    with pytest.raises(ValueError, match="ledger: the disk has room for what will be written"):
        ledger.edit(edits[:2], "lora", **FEW)
    assert not ledger.history()


def test_base_and_edited_answer_side_by_side(ledger: Ledger, model: EditableModel, edits: list[EditRequest]) -> None:
    base = model.answer(edits[0].image, edits[0].prompt)
    assert ledger.ask(edits[0].prompt, edits[0].image) == (base, base)
    ledger.edit(edits[:1], "lora", steps=60, lr=1e-2, show_progress=False)
    assert ledger.ask(edits[0].prompt, edits[0].image) == (base, "blue")
    assert model.answer(edits[0].image, edits[0].prompt) == base


def test_tags_name_states(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "grace", **FEW)
    event = ledger.tag("release-1")
    ledger.edit(edits[1:3], "grace", **FEW)
    assert ledger.tags() == {"release-1": event}
    assert (ledger.at("release-1").edit_ids, ledger.state().edit_ids) == ([1], [1, 2, 3])
    assert ledger.at(0).edit_ids == []
    for name, message in (("release-1", "a tag is given once"), ("12", "a text that is no number"), (" ", "no number")):
        with pytest.raises(LedgerError, match=message):
            ledger.tag(name)
    for moment, message in (("absent", r"tags are \['release-1'\]"), (99, "events are numbered 1 to")):
        with pytest.raises(LedgerError, match=message):
            ledger.at(moment)


def test_requests_are_found_by_question_and_answer(ledger: Ledger, edits: list[EditRequest]) -> None:
    assert ledger.answered(edits[:2]) == [None, None]
    ledger.edit(edits[:3], "grace", **FEW)
    again = replace(edits[1], id="another", prompt="  what is number 1 here")
    other = replace(edits[0], target="green")
    assert ledger.answered([again, other, edits[4], edits[2]]) == [2, None, None, 3]
    ledger.undo(3)
    assert ledger.answered([edits[2]]) == [None]


def test_the_newest_events_and_edits(ledger: Ledger, edits: list[EditRequest]) -> None:
    assert (ledger.history(2), ledger.edits(2)) == ([], [])
    ledger.edit(edits[:3], "grace", evaluate=False, **FEW)
    assert [event.id for event in ledger.history(2)] == [3, 4]
    assert [shown.id for shown in ledger.edits(2)] == [2, 3]
    assert len(ledger.history(99)) == 4
    with pytest.raises(LedgerError, match=r"limit is at least 1 \(got limit=0\)"):
        ledger.history(0)


def test_the_row_of_a_run_is_read_once_for_all_its_edits(
    ledger: Ledger, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:3], "grace", evaluate=False, **FEW)
    ledger.edit(edits[3:5], "grace", evaluate=False, **FEW)
    looked: list[str] = []
    real = ledger.contents.database.row
    monkeypatch.setattr(ledger.contents.database, "row", lambda table, key: looked.append(table) or real(table, key))
    assert [shown.method for shown in ledger.edits()] == ["grace"] * 5
    assert looked.count("runs") == 2


def test_edits_that_act_alone_are_asked_their_own_questions(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    ledger.edit(edits[:2], "lora", mode="single", steps=60, lr=1e-2, evaluate=False, show_progress=False)
    assert [ledger.ask(edit.prompt, edit.image)[1] for edit in edits[:2]] == ["blue", "seven red"]
    base = model.answer(None, "What is it?")
    assert ledger.ask("What is it?") == (base, base)
    assert ledger.ask(edits[1].prompt, edits[1].image, at=2)[1] != "seven red"
