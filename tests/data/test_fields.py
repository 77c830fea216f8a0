import pytest

from fastedit.data.fields import MAX_MEMBERS, MAX_TEXT, Fields, text_rule
from fastedit.data.files import JsonObject, RawRecord, parse_json
from fastedit.data.problems import Collector


def fields_of(text: str, *, strict: bool = False) -> tuple[Fields, Collector]:
    value, rule = parse_json(text)
    assert not rule
    assert isinstance(value, JsonObject)
    collector = Collector("a.json")
    return Fields(RawRecord(4, 9, value), value, collector, strict=strict), collector


def test_text_is_returned_as_it_is_or_stripped() -> None:
    fields, collector = fields_of('{"a": " x\\n"}')
    assert fields.text("a") == " x\n"
    assert fields.text("a", strip=True) == "x"
    assert fields.text("b") is None
    assert not collector.problems


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("null", "must not be null"),
        ("3", "must be text"),
        ("true", "must be text"),
        ('["x"]', "must be text"),
        ('""', "must not be empty"),
        ('" \\n"', "must not be empty"),
        ('"a\\u0000"', "must not hold a NUL"),
        ('"\\ud800"', "without lone surrogates"),
        (f'"{"x" * (MAX_TEXT + 1)}"', f"must not be longer than {MAX_TEXT} characters (has {MAX_TEXT + 1})"),
    ],
)
def test_text_that_breaks_a_rule_is_a_problem(value: str, rule: str) -> None:
    fields, collector = fields_of(f'{{"a": {value}}}')
    assert fields.text("a", required=True) is None
    (problem,) = collector.problems
    assert rule in problem.rule
    assert (problem.index, problem.line, problem.field) == (4, 9, "a")
    assert len(problem.value) < 100
    assert fields.failed


def test_a_pair_of_surrogates_is_one_character() -> None:
    fields, _ = fields_of('{"a": "\\ud83d\\ude00"}')
    assert fields.text("a") == "😀"
    assert text_rule("", empty=True) == ""


def test_strict_means_present() -> None:
    fields, collector = fields_of('{"a": null}', strict=True)
    assert fields.text("a") is None
    assert fields.text("b") is None
    assert [(p.field, p.rule) for p in collector.problems] == [
        ("b", "must be present (null where the record has none)")
    ]


def test_images_are_paths_below_the_root() -> None:
    fields, collector = fields_of('{"a": "x/y.png", "b": "../z", "c": 5}')
    assert fields.image("a") == "x/y.png"
    assert fields.image("b") is None
    assert fields.image("c") is None
    assert [(p.field, p.value) for p in collector.problems] == [("b", "'../z'"), ("c", "5")]


def test_unknown_fields_warn_and_name_the_nearest() -> None:
    fields, collector = fields_of('{"rephrse": "x", "zzz": 1}')
    fields.unknown(("rephrase", "src"))
    assert [(p.field, p.level) for p in collector.problems] == [("rephrse", "warning"), ("zzz", "warning")]
    assert "did you mean 'rephrase'?" in collector.problems[0].rule
    assert not fields.failed


def test_repeated_keys_are_errors_at_every_depth() -> None:
    fields, collector = fields_of('{"a": [{"b": 1, "b": 2}], "c": 1, "c": 1}')
    list(fields.members("a"))
    assert [(p.field, p.rule) for p in collector.problems] == [
        ("c", "must occur once in an object"),
        ("a[0].b", "must occur once in an object"),
    ]


def test_lists_are_walked_and_their_members_named() -> None:
    fields, collector = fields_of('{"a": [{"x": "1"}, 5, {"x": 2}], "b": "no", "t": ["p", 3, ""], "n": null}')
    assert [member.text("x") for member in fields.members("a")] == ["1", None]
    assert list(fields.members("b")) == list(fields.members("n")) == list(fields.members("absent")) == []
    assert fields.texts("t") == ("p",)
    assert [p.field for p in collector.problems] == ["a[1]", "a[2].x", "b", "t[1]", "t[2]"]
    assert fields.failed


def test_a_member_that_fails_fails_its_record() -> None:
    fields, _ = fields_of('{"a": [{"x": 2}]}')
    for member in fields.members("a"):
        member.text("x")
    assert fields.failed


def test_long_lists_are_refused() -> None:
    fields, collector = fields_of('{"a": [' + ",".join(["{}"] * (MAX_MEMBERS + 1)) + "]}")
    assert list(fields.members("a")) == []
    assert collector.problems[0].value == f"list of {MAX_MEMBERS + 1}"


def test_an_inner_object_is_named_by_its_path() -> None:
    fields, collector = fields_of('{"Q&A": {"Answer": 3}, "b": 1}')
    inner = fields.inner("Q&A")
    assert inner is not None
    inner.text("Answer")
    assert fields.inner("b") is None
    assert fields.inner("c") is None
    assert [p.field for p in collector.problems] == ["Q&A.Answer", "b", "c"]
