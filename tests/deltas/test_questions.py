"""Which delta answers a question that several answer."""

from __future__ import annotations

import torch

from fastedit.deltas.questions import joined_questions, latest_best, newest, questions_of, standing


def test_the_last_delta_with_a_question_answers_it() -> None:
    assert newest([["a"], ["b"], ["a"], ["c"], ["b"]]) == [2, 4, 2, 3, 4]
    assert newest([]) == []


def test_what_has_several_questions_or_none_answers_itself() -> None:
    assert newest([["a", "b"], ["a"], [], [""], [""]]) == [0, 1, 2, 3, 4]
    # A memory that has the question among others is the later one
    assert newest([["a"], ["b", "a"]]) == [1, 1]


def test_questions_of_several_deltas_are_listed_in_order() -> None:
    texts = [{"questions": "a"}, {"questions": "b\nc", "template": "{prompt}"}]
    assert questions_of(joined_questions(texts)) == ("a", "b", "c")
    assert joined_questions([*texts, {}]) == {}
    assert questions_of({"template": "{prompt}"}) == ()


def test_entries_of_an_edit_with_a_later_answer_do_not_stand() -> None:
    texts = [{"questions": "a\nb"}, {"questions": "a"}]
    assert standing(texts, 6).tolist() == [0, 0, 1, 1, 1, 1]
    assert standing([*texts, {}], 4).tolist() == standing(texts, 4).tolist() == [1] * 4


def test_the_latest_of_the_best_is_chosen() -> None:
    inf = torch.inf
    scores = torch.tensor(
        [[1.0, 3.0, 3.0, 2.0], [-inf, -inf, -inf, -inf], [5.0, 5.0, -inf, -inf], [9.0, 0.0, 0.0, 0.0]]
    )
    assert latest_best(scores, [{}, {}, {}, {}]).tolist() == [2, -1, 1, 0]
    named = [{"questions": "a"}, {"questions": "b"}, {}, {"questions": "a"}]
    # What the first is chosen for the last answers, whatever its own score
    assert latest_best(scores, named).tolist() == [2, -1, 1, 3]
