"""Edits leave as training examples and as tests; what leaves can be read back."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Query, Video
from fastedit.backbone import EditableModel
from fastedit.data.images import open_image
from fastedit.deltas import EditDelta
from fastedit.evaluation import HELD_OUT, evaluation_views
from fastedit.evaluation.protocol import MUST_CHANGE
from fastedit.export import export_deltas
from fastedit.export.records import dataset, examples
from fastedit.requests import PARAPHRASE_KINDS, images_of
from tests.engine.conftest import make_edits, picture, with_held_out


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_view_is_an_example_that_chat_templates_take(
    model: EditableModel, deltas: list[EditDelta], edits: list[EditRequest], tmp_path: Path
) -> None:
    # What the record says of a question that must stay is not what the base answers
    edits = [replace(edit, locality_answer="something else") for edit in edits]
    assert all(edit.locality_prompt for edit in edits)
    exported = export_deltas("records", model, deltas, tmp_path / "out", requests=edits)
    rows = lines(tmp_path / "out" / "train.jsonl")
    views = [view for edit in edits for view in evaluation_views(edit) if view.score not in HELD_OUT]
    assert len(rows) + exported.report["skipped"] == len(views)
    assert {row["edit"] for row in rows} == {edit.id for edit in edits}
    texts = {row["messages"][0]["content"][-1]["text"]: row for row in rows}
    assert {view.query.prompt for view in views} == set(texts)
    for row in rows:
        rendered = model.processor.apply_chat_template(row["messages"], tokenize=False)
        asked, answer = row["messages"]
        text = answer["content"][0]["text"]
        assert rendered.count("<image>") == len(row["images"]) == sum(p["type"] == "image" for p in asked["content"])
        assert text in rendered
        image = tmp_path / "out" / row["images"][0] if row["images"] else None
        if row["changes"]:
            assert row["score"] in MUST_CHANGE
        else:
            assert model.answer(image, asked["content"][-1]["text"]) == text


def test_what_is_held_out_is_asked_by_tests_and_not_trained_on(model: EditableModel, tmp_path: Path) -> None:
    edits = [with_held_out(edit) for edit in make_edits(2)]
    run = fastedit.edit(model, edits, "lora", steps=1, mode="sequential", evaluate=False, show_progress=False)
    held_out = [view for edit in edits for view in evaluation_views(edit) if "zebra" in view.query.prompt]
    assert {view.score for view in held_out} == HELD_OUT
    given: dict[str, Any] = {"requests": edits, "max_new_tokens": 2}
    exported = export_deltas("records", model, run.deltas, tmp_path / "train", **given)
    assert exported.report["held_out"] == len(held_out)
    rows = lines(tmp_path / "train" / "train.jsonl")
    assert rows
    assert not any("zebra" in json.dumps(row) for row in rows)
    assert not HELD_OUT & {row["score"] for row in rows}
    exported = export_deltas("records", model, run.deltas, tmp_path / "tests", format="tests", **given)
    assert "held_out" not in exported.report
    questions = json.loads((tmp_path / "tests" / "questions.json").read_text())["questions"]
    assert {question["score"] for question in questions} >= set(PARAPHRASE_KINDS)
    again = fastedit.read_edits(tmp_path / "train" / "edits.jsonl", images=tmp_path / "train")
    assert [edit.paraphrases[0].prompt for edit in again] == ["zebra paraphrase"] * 2


def test_edits_are_read_back(tmp_path: Path) -> None:
    model = fastedit.load("random:llava-tiny")
    edits = make_edits(2)
    picture(5).save(tmp_path / "mine.jpg")
    several = EditRequest("is {image} as {image}?", "no", [tmp_path / "mine.jpg", picture(3)], id="several")
    run = fastedit.edit(model, edits, "lora", steps=1, mode="sequential", evaluate=False, show_progress=False)
    deltas = [*run.deltas, run.deltas[0]]
    export_deltas("records", model, deltas, tmp_path / "out", requests=[*edits, several], max_new_tokens=2)
    again = fastedit.read_edits(tmp_path / "out" / "edits.jsonl", images=tmp_path / "out")
    for old, new in zip([*edits, several], again, strict=True):
        assert (old.prompt, old.target, old.id, old.tags) == (new.prompt, new.target, new.id, new.tags)
        for before, after in zip(evaluation_views(old), evaluation_views(new), strict=True):
            assert (before.query.prompt, before.query.answer) == (after.query.prompt, after.query.answer)
            pairs = zip(images_of(before.query.image), images_of(after.query.image), strict=True)
            assert all(open_image(a).tobytes() == open_image(b).tobytes() for a, b in pairs)
    assert (tmp_path / "mine.jpg").read_bytes() in [p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()]
    (row,) = (row for row in lines(tmp_path / "out" / "train.jsonl") if row["edit"] == "several")
    kinds = [part["type"] for part in row["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]


def test_tests_pass_on_the_edited_checkpoint_and_fail_on_the_base(
    model: EditableModel, deltas: list[EditDelta], edits: list[EditRequest], tmp_path: Path
) -> None:
    exported = export_deltas("records", model, deltas, tmp_path / "tests", requests=edits, format="tests")
    export_deltas("merged", model, deltas, tmp_path / "merged")
    content = json.loads((tmp_path / "tests" / "questions.json").read_text())
    holding = [question for question in content["questions"] if question["holds"]]
    assert 0 < len(holding) == exported.report["held"] <= exported.report["examples"]
    program = (tmp_path / "tests" / "test_edits.py").read_text()
    assert "import fastedit" not in program
    assert "from fastedit" not in program
    edited = run_tests(tmp_path / "tests", tmp_path / "merged")
    assert edited.get("failed", 0) == 0
    assert edited["passed"] == len(holding)
    base = run_tests(tmp_path / "tests", Path(str(fastedit.__file__)).parent / "pocket" / "assets" / "pocket-llava")
    changed = [question for question in holding if question["changes"]]
    assert 0 < base["failed"] <= len(changed)


def run_tests(folder: Path, checkpoint: Path) -> dict[str, int]:
    """How many tests of a folder ended in which way, in a fresh process."""
    import os
    import re
    import subprocess

    environment = {**os.environ, "CHECKPOINT": str(checkpoint)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    counts = re.findall(r"(\d+) (passed|failed|xfailed|xpassed|error)", done.stdout.splitlines()[-1])
    assert counts, done.stdout + done.stderr
    return {kind: int(count) for count, kind in counts}


def test_examples_without_a_model_have_the_answers_of_records() -> None:
    (edit,) = make_edits(1)
    found = {(example.view.score, example.answer) for example in examples([edit])}
    assert ("text_locality", "Paris") in found
    assert ("near", "") in found
    video = EditRequest("what?", "red", Video([picture(0), picture(1)], fps=2.0))
    (example,) = examples([video])
    assert [part["type"] for part in example.messages[0]["content"]] == ["video", "text"]


def test_a_dataset_has_messages_images_and_texts(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed:
        @staticmethod
        def from_list(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return rows

    stand_in = types.ModuleType("datasets")
    stand_in.Dataset = Listed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    unanswered = [with_held_out(replace(edit, locality_answer=None)) for edit in edits]
    rows = dataset(unanswered, model.processor, model=model, max_new_tokens=8)
    assert "text_locality" in {row["score"] for row in rows}
    assert not HELD_OUT & {row["score"] for row in rows}
    assert "text_locality" not in {row["score"] for row in dataset(unanswered)}
    for row in rows:
        assert row["text"].count("<image>") == len(row["images"])
        assert row["messages"][1]["content"][0]["text"] in row["text"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        dataset(edits)


def test_a_dataset_of_datasets(model: EditableModel, edits: list[EditRequest]) -> None:
    pytest.importorskip("datasets")
    rows = dataset(edits, model.processor, model=model)
    assert {"messages", "images", "text"} <= set(rows.column_names)


def test_records_need_requests_and_a_known_format(
    model: EditableModel, deltas: list[EditDelta], edits: list[EditRequest], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs the requests of the deltas"):
        export_deltas("records", model, deltas, tmp_path / "out")
    with pytest.raises(ValueError, match=r"format 'test' is not known; did you mean 'tests'"):
        export_deltas("records", model, deltas, tmp_path / "out", requests=edits, format="test")
    missing = [EditRequest("what?", "red", tmp_path / "absent.png", portability=(Query("b", None, "c"),))] * 2
    with pytest.raises(ValueError, match="no such file"):
        export_deltas("records", model, deltas, tmp_path / "out", requests=missing)
    assert not (tmp_path / "out").exists()
