"""Long sequences of edits that do not contradict each other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import fastedit
from benchmarks import long_sequence
from benchmarks.long_sequence import consistent, content, run_all, run_asked, sample_of


def test_no_edit_contradicts_another() -> None:
    records = list(itertools.islice(consistent("pocket-vqa"), 150))
    edited = [(content(each.scene), each.kind) for each in records]
    assert len(set(edited)) == len(edited)
    assert sum(each.kind == "flag" for each in records) < 8
    for each in records:
        near = {(content(probe.scene), each.kind) for probe in each.near}
        same = {(content(each.scene), probe.kind.split()[0]) for probe in each.same}
        assert not (near | same) & set(edited)
        assert content(each.locality.scene) in {content(each.scene)} | (
            {content(each.locality.scene)} - {s for s, _ in edited}
        )


def test_a_sample_is_drawn_again_the_same() -> None:
    assert sample_of(5, 8) == [0, 1, 2, 3, 4]
    assert sample_of(100, 8) == sample_of(100, 8)
    assert len(set(sample_of(100, 8))) == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[fastedit.EditRequest]]:
    model = fastedit.load("random:llava-tiny")
    pool = fastedit.read_edits("pocket-vqa", split="train", limit=12)
    path = tmp_path_factory.mktemp("long") / "ldke.safetensors"
    trainer = {"steps": 4, "batch_size": 6, "valid_every": 4}
    fastedit.train(model, "ldke", pool, out=path, trainer=trainer, valid_records=4, show_progress=False)
    return model, path, pool


def test_fitting_what_acts_gives_the_scores_of_the_whole(trained: Any) -> None:
    model, path, pool = trained
    records = list(itertools.islice(consistent("pocket-vqa"), 9))
    given = {"pool": pool, "steps": 6, "threshold": 0.3, "top": 1}
    artifact = fastedit.load_artifact(path, model)
    some = run_asked(model, records, (1, 4, 9), 3, artifact, **given)
    edits = [long_sequence._request(records, number) for number in range(9)]
    every = run_all(model, edits, "ldke", (1, 4, 9), 3, artifact=artifact, **given)
    assert some["scores"] == every["scores"]
    assert 0 < some["fitted"] < 9 == every["fitted"]
    assert some["scores"][9]["strict"]["reliability"]["n"] == 3


def test_curves_are_drawn_of_stored_rows(tmp_path: Path) -> None:
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    scores = {gap: {"strict": {"reliability": score, "near": score}} for gap in ("1", "10")}
    row = {"case": {"label": "ldke"}, "scores": scores}
    assert long_sequence.draw_curves([row], tmp_path / "curves.png").stat().st_size > 1000


def test_of_a_method_the_longest_sequence_is_shown(tmp_path: Path) -> None:
    cases = [("ldke", 10, {}), ("grace", 5, {}), ("ldke", 100, {}), ("ldke", 20, {}), ("grace", 5, {"radius": 2})]
    lines = [{"case": {"method": m, "edits": edits, "settings": given}} for m, edits, given in cases]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert long_sequence.rows(path) == [lines[2], lines[1], lines[4]]
    assert long_sequence.rows(tmp_path / "none.jsonl") == []
