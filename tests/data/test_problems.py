import pytest

from fastedit.data.problems import LISTED, Collector, MissingImageError, Problem, RecordErrors, shorten


def test_a_problem_names_file_record_field_rule_and_value() -> None:
    problem = Problem("a.jsonl", 3, "probes[1].kind", "'far'", "must be one of near, blind, same", line=5)
    assert str(problem) == "a.jsonl record 3 (line 5), probes[1].kind: must be one of near, blind, same (got 'far')"
    assert str(Problem("a.json", None, "", "", "must be UTF-8")) == "a.json: must be UTF-8"
    assert str(Problem("a.json", 3, "image", "", "must be", line=5, id="x")) == (
        "a.json record 3 (line 5, id 'x'), image: must be"
    )
    assert str(Problem("edits", 3, "image", "", "must be", id="x", listed=True)) == "edits[3] (id 'x'), image: must be"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[]] * 10**6, {str(i): 1 for i in range(99)}, 10**9999, True, None, 0.5],
    ids=["text", "list", "dict", "int", "bool", "null", "float"],
)
def test_a_value_is_shown_short(value: object) -> None:
    assert len(shorten(value)) < 100


def test_deep_values_are_shown_without_being_walked() -> None:
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    assert shorten(deep) == "list of 1"


def test_all_problems_are_in_the_error_and_the_message_is_short() -> None:
    collector = Collector("a.json")
    for index in range(100):
        collector.add("must be text", index=index, field="src", value=index)
    collector.add("not found", index=7, field="image", value="x.png", missing="x.png")
    collector.add("not found", index=8, field="image", value="x.png", missing="x.png")
    collector.add("unknown field", index=1, field="colour", level="warning")
    with pytest.raises(RecordErrors) as caught:
        collector.stop_if_failed()
    error = caught.value
    assert len(error.problems) == 103
    assert len(error.errors) == 102
    assert [w.field for w in error.warnings] == ["colour"]
    assert error.missing == ["x.png"]
    lines = str(error).splitlines()
    assert lines[0] == "102 problems in 100 records, 1 image file not found"
    assert len(lines) == LISTED + 2
    assert "82 more" in lines[-1]


def test_warnings_alone_do_not_stop() -> None:
    collector = Collector("a.json")
    collector.add("unknown field", level="warning")
    collector.stop_if_failed()
    assert not collector.failed


def test_a_missing_image_is_a_missing_file() -> None:
    error = MissingImageError("image: no such file")
    assert isinstance(error, FileNotFoundError)
    assert isinstance(error, ValueError)
    assert str(error) == "image: no such file"
