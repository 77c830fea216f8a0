"""Rows of scores, beside the unedited model."""

from __future__ import annotations

import pytest

from fastedit.evaluation import MUST_CHANGE
from fastedit.report.scores import score_rows, unedited_scores
from tests.report.conftest import record_of, some_requests


def test_rows_have_means_and_intervals_in_per_cent() -> None:
    record = record_of(some_requests(), failing=[1])
    rows = score_rows({"lora": record["scores"]}, "strict", {"lora": "#000000"}, unedited_scores(record["edits"]))
    assert rows[0].meaning.title == "Reliability"
    assert rows[0].values[0].mean == 75
    assert rows[0].values[0].low < 75 < rows[0].values[0].high
    assert [row.changes for row in rows] == sorted((row.changes for row in rows), reverse=True)


def test_doing_nothing_keeps_every_old_answer_and_gives_few_new_ones() -> None:
    requests = some_requests()
    edits = record_of(requests)["edits"]
    edits[0]["answers"][0]["before"] = requests[0].target
    scores = unedited_scores(edits)
    assert scores["reliability"].mean == 0.25
    assert scores["near"].mean == scores["text_locality"].mean == 1
    assert all(scores[name].mean == 0 for name in MUST_CHANGE if name in scores and name != "reliability")


def test_a_score_that_one_run_lacks_is_left_out_for_it() -> None:
    one, other = record_of(some_requests()), record_of(some_requests())
    del other["scores"]["strict"]["near"]
    other["scores"]["strict"]["same"]["mean"] = None
    rows = score_rows({"a": one["scores"], "b": other["scores"]}, "strict", {})
    labels = {row.meaning.title: [value.label for value in row.values] for row in rows}
    assert labels["Other picture"] == labels["Other question"] == ["a"]
    assert labels["Reliability"] == ["a", "b"]
    assert score_rows({"a": {}}, "strict", {}) == []


def test_a_mean_counts_the_questions_of_an_edit_together() -> None:
    answer = {"score": "portability", "wanted": "a", "before": "a", "after": "a"}
    edits = [{"answers": [answer, {**answer, "before": "b"}]}, {"answers": [answer]}]
    assert unedited_scores(edits)["portability"].mean == pytest.approx(0.75)
