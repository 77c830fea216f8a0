"""The page that compares runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastedit.report import Section, comparison_page
from fastedit.report.comparison import same_edits
from tests.report.conftest import HOSTILE, record_of, some_requests
from tests.report.test_run import text_of


def test_runs_stand_beside_each_other_in_words_scores_and_answers() -> None:
    runs = {
        "lora": record_of(some_requests(), failing=[1, 2], method="lora"),
        "odedit+lora": record_of(some_requests(), failing=[1]),
    }
    page = comparison_page(runs, some_requests(), links={"lora": "lora/report.html"})
    text = text_of(page)
    assert "4 edits of pocket-llava, made in 2 ways" in text
    assert "lora: 2 of 4 edits hold, 90.0% of other answers are kept" in text
    assert "odedit+lora: 3 of 4 edits hold, 95.0% of other answers are kept" in text
    assert '<a href="lora/report.html">lora</a>' in page
    kinds = [part.split('"')[0] for part in page.split('data-kinds="')[1:]]
    assert [kind.split() for kind in kinds] == [[], ["failed"], ["failed", "differs"], []]
    assert page.count("background-image:url(") == 4


def test_runs_of_other_edits_are_not_compared_edit_by_edit() -> None:
    other = [replace(each, prompt="What else?") for each in some_requests()]
    runs = {"a": record_of(some_requests()), "b": record_of(other)}
    assert not same_edits(runs)
    page = comparison_page(runs)
    assert "did not make the same edits" in text_of(page)
    assert '<article class="card"' not in page


def test_a_run_that_ended_early_is_compared_as_far_as_it_went() -> None:
    runs = {"a": record_of(some_requests(4)), "b (2)": record_of(some_requests(2), failing=[0], method="ft")}
    assert same_edits(runs)
    page = comparison_page(runs)
    assert page.count('<article class="card"') == 4
    assert "b (2): 1 of 2 edits hold" in text_of(page)


def test_labels_and_links_are_escaped_and_sections_are_put_in() -> None:
    runs = {HOSTILE: record_of(some_requests(), failing=[0])}
    page = comparison_page(runs, links={HOSTILE: HOSTILE}, sections=[Section(HOSTILE, "<p id='added'>speed</p>")])
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "<p id='added'>speed</p>" in page


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"report: at least one run to compare \(got none\)"):
        comparison_page({})
