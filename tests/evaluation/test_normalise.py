import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastedit.evaluation.normalise import contains, exact_match, normalise, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        (" YES.\n", "yes"),
        ("a red bus", "red bus"),
        ("The  A an the cat", "cat"),
        ("theatre", "theatre"),
        ("two", "2"),
        ("Ten dogs and none", "10 dogs and 0"),
        ("tenth", "tenth"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("don’t", "don't"),
        ("its", "its"),
        ("whats up", "what's up"),
        ("red, white and blue", "red white and blue"),
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),
        ("us-1", "us 1"),
        ("us -1", "us 1"),
        ("x-y - z", "xy z"),
        ("7:45", "7:45"),
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("u.s.", "us"),
        ("no. 5.", "no 5"),
        (".5", ".5"),
        ("what?!", "what"),
        ("(left)", "left"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("a\tb\nc", "b c"),
        ("", ""),
        ("The", ""),
    ],
)
def test_answers_are_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(max_size=30))
def test_a_normalised_answer_has_no_dress_left(text: str) -> None:
    result = normalise(text)
    assert result == " ".join(result.split())
    assert not set(result.split()) & {"a", "an", "the", "zero", "two", "none", "dont"}
    assert not set(result) & set(';/[]"{}()=+\\_-><@`,?!')


@given(st.text(max_size=30), st.text(max_size=30))
def test_comparisons_hang_together(answer: str, target: str) -> None:
    assert exact_match(answer, answer)
    assert contains(answer, answer)
    assert token_f1(answer, answer) == 1.0
    assert 0.0 <= token_f1(answer, target) == token_f1(target, answer) <= 1.0
    if exact_match(answer, target):
        assert contains(answer, target)
        assert token_f1(answer, target) == 1.0


@given(st.lists(st.sampled_from(["red", "bus", "two", "the"]), max_size=5))
def test_capitals_and_a_final_period_never_matter(words: list[str]) -> None:
    text = " ".join(words)
    assert exact_match(text.upper() + " .", text) or not normalise(text)


@pytest.mark.parametrize(
    ("answer", "target", "exact", "inside", "f1"),
    [
        ("Two.", "2", True, True, 1.0),
        ("It is a red bus.", "red bus", False, True, 2 * 2 / (4 + 2)),
        ("bus red", "red bus", False, False, 1.0),
        ("redbus", "red", False, False, 0.0),
        ("12", "2", False, False, 0.0),
        ("two two", "2 2", True, True, 1.0),
        ("yes yes", "yes", False, True, 2 / 3),
        ("yes", "yes yes", False, False, 2 / 3),
        ("", "yes", False, False, 0.0),
        # Both normalise to nothing and are compared as they are.
        ("the", "a", False, False, 0.0),
        ("A", "a", True, True, 1.0),
        ("the red", "the", False, True, 2 / 3),
    ],
)
def test_answers_are_compared(answer: str, target: str, exact: bool, inside: bool, f1: float) -> None:
    assert exact_match(answer, target) is exact
    assert contains(answer, target) is inside
    assert token_f1(answer, target) == pytest.approx(f1)
