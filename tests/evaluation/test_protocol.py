"""Which questions are asked, and how values become scores."""

from __future__ import annotations

import math

import pytest

from fastedit import EditRequest, Probe, Query
from fastedit.evaluation import MUST_CHANGE, MUST_STAY, UNSEEN, EditScores, evaluation_views, mean_by_name, summarise


def test_a_bare_edit_is_scored_on_reliability_only() -> None:
    views = evaluation_views(EditRequest("Capital of Italy?", "Bern"))
    assert [(v.score, v.changes) for v in views] == [("reliability", True)]


def test_every_part_is_asked_as_it_should_be() -> None:
    request = EditRequest(
        "What colour?", "blue", "a.png", rephrase="Which colour?", image_rephrase="b.png",
        locality_prompt="Capital?", locality_answer="Rome",
        image_locality_image="c.png", image_locality_prompt="Shape?", image_locality_answer="box",
        portability=(Query("Mixed with red?", "a.png", "purple"), Query("Unanswered?", "a.png")),
        probes=(
            Probe("near", "What colour?", "d.png"), Probe("blind", "What colour?"), Probe("same", "Size?", "a.png"),
            Probe("sibling", "What size?", "a.png"), Probe("same", "size", "a.png", wording="unseen"),
        ),
        paraphrases=(
            Query("colour", "a.png", kind="text_generality_unseen"),
            Query("colour", "b.png", "sky blue", "image_generality_unseen"),
            Query("What colour ?", "a.png", kind="polite"),
        ),
    )  # fmt: skip
    found = [(v.score, v.query.prompt, v.query.image, v.query.answer, v.changes) for v in evaluation_views(request)]
    assert found == [
        ("reliability", "What colour?", "a.png", "blue", True),
        ("text_generality", "Which colour?", "a.png", "blue", True),
        ("image_generality", "What colour?", "b.png", "blue", True),
        ("text_generality_unseen", "colour", "a.png", "blue", True),
        ("image_generality_unseen", "colour", "b.png", "sky blue", True),
        ("polite", "What colour ?", "a.png", "blue", True),
        ("portability", "Mixed with red?", "a.png", "purple", True),
        ("text_locality", "Capital?", None, "Rome", False),
        ("image_locality", "Shape?", "c.png", "box", False),
        ("near", "What colour?", "d.png", None, False),
        ("blind", "What colour?", None, None, False),
        ("same", "Size?", "a.png", None, False),
        ("sibling", "What size?", "a.png", None, False),
        ("same_unseen", "size", "a.png", None, False),
    ]
    assert {score for score, *_ in found} <= {*MUST_CHANGE, *MUST_STAY}
    # A paraphrase's kind is its score, not a group of it
    assert {view.query.kind for view in evaluation_views(request)} == {""}


def test_every_score_in_unseen_wording_has_its_twin() -> None:
    assert {
        name: f"{name}_unseen"
        for name in ("text_generality", "image_generality", "text_locality", "image_locality", "near", "same")
    } == UNSEEN


def test_values_that_share_a_name_are_averaged_within_the_edit() -> None:
    assert mean_by_name([("near", 1.0), ("near", 0.0), ("same", 1.0)]) == {"near": 0.5, "same": 1.0}


def test_summary_counts_only_edits_that_have_the_score() -> None:
    scored = [
        EditScores({"reliability": 1.0, "near": 0.5}, {"reliability": 0.0}),
        EditScores({"reliability": 0.5}, {"reliability": 1.0, "near": 1.0}),
    ]
    tables = summarise(scored)
    assert tables["legacy"]["reliability"].mean == pytest.approx(0.75)
    assert tables["legacy"]["near"].n == 1
    assert tables["strict"]["near"].mean == 1.0
    assert tables["strict"]["reliability_gap"].mean == pytest.approx(0.25)
    assert summarise([]) == {"legacy": {}, "strict": {}}
    assert not math.isnan(tables["strict"]["reliability"].low)
