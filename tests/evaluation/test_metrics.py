"""Every column of both protocols, of rows answered by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastedit import Query
from fastedit.evaluation import PROTOCOLS, EvaluationView
from fastedit.evaluation.metrics import METRICS, AskedRow
from fastedit.evaluation.scoring import edit_scores

FED = {"accuracy": 0.5, "top1": 0.25, "top10": 0.75}


def asked(score: str, wanted: str | None, *, kind: str = "", changes: bool = True, **given: Any) -> AskedRow:
    return AskedRow(0, EvaluationView(score, Query("q", None, wanted, kind), changes), **given)


def column(protocol: str, name: str, row: AskedRow, target: str = "red") -> float | None:
    return METRICS[protocol][name](row, target)


def test_a_table_for_every_protocol() -> None:
    assert set(METRICS) == set(PROTOCOLS)


@pytest.mark.parametrize(
    ("protocol", "name", "row", "value"),
    [
        ("strict", "{score}", asked("reliability", "red", after="Red."), 1.0),
        ("strict", "{score}", asked("reliability", "red", after="red", broken_after=True), 0.0),
        ("strict", "{score}", asked("text_locality", None, changes=False, before="a", after="a"), 1.0),
        ("strict", "{score}", asked("text_locality", None, changes=False, before="a", after="A"), 0.0),
        ("strict", "{score}[{kind}]", asked("portability", "x", kind="one_hop", after="x"), 1.0),
        ("strict", "{score}[{kind}]", asked("portability", "x", after="x"), None),
        ("strict", "{score}_f1", asked("reliability", "red car", after="red"), 2 / 3),
        ("strict", "{score}_f1", asked("near", None, changes=False), None),
        ("strict", "blindness", asked("near", None, changes=False, before="blue", after="red"), 1.0),
        ("strict", "blindness", asked("near", None, changes=False, before="red", after="red"), None),
        ("strict", "routed_in", asked("reliability", "red", acted=True), 1.0),
        ("strict", "routed_in", asked("near", None, changes=False, acted=True), None),
        ("strict", "routed_in_wrongly", asked("near", None, changes=False, acted=True), 1.0),
        ("strict", "{score}_kl", asked("near", None, changes=False, legacy=FED, kl=0.5), 0.5),
        ("strict", "{score}_kl", asked("near", None, changes=False, broken_before=True), math.inf),
        ("strict", "{score}_kl", asked("near", None, changes=False), None),
        ("legacy", "{score}", asked("reliability", "red", legacy=FED), 0.5),
        ("legacy", "{score}", asked("text_locality", None, changes=False, legacy=FED), 0.25),
        ("legacy", "{score}", asked("near", None, changes=False, broken_before=True), 0.0),
        ("legacy", "{score}_top10", asked("text_locality", None, changes=False, legacy=FED), 0.75),
        ("legacy", "{score}_top10", asked("near", None, changes=False, legacy=FED), None),
    ],
)
def test_a_column(protocol: str, name: str, row: AskedRow, value: float | None) -> None:
    assert column(protocol, name, row) == (value if value is None else pytest.approx(value))


def test_an_edit_is_the_means_of_its_rows() -> None:
    rows = [
        asked("reliability", "red", after="red", legacy=FED),
        asked("portability", "x", kind="one_hop", after="x"),
        asked("portability", "y", kind="two_hop", after="x"),
        asked("near", None, changes=False, before="blue", after="blue", legacy=FED, kl=0.25),
    ]
    scores = edit_scores(rows)
    assert scores.legacy == {"reliability": 0.5, "near": 0.25}
    assert scores.strict == {
        "reliability": 1.0, "reliability_f1": 1.0,
        "portability": 0.5, "portability[one_hop]": 1.0, "portability[two_hop]": 0.0, "portability_f1": 0.5,
        "near": 1.0, "blindness": 0.0, "near_kl": 0.25,
    }  # fmt: skip
    assert list(scores.answers[0]) == ["score", "prompt", "wanted", "before", "after"]
