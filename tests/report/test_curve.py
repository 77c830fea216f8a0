"""The forgetting curve's drawing."""

from __future__ import annotations

from fastedit.report.curve import HEIGHT, WIDTH, forgetting_curve
from tests.report.conftest import record_of, some_requests


def record_with(tables: dict[int, float], last: float) -> dict[str, object]:
    record = record_of(some_requests())

    def table(mean: float) -> dict[str, object]:
        return {"strict": {"reliability": {"mean": mean, "low": mean - 0.1, "high": mean, "n": 4}}}

    record["checkpoints"] = {str(count): table(mean) for count, mean in tables.items()}
    record["scores"] = table(last)
    return record


def test_a_line_falls_where_edits_are_forgotten() -> None:
    curve = forgetting_curve(record_with({1: 1.0, 2: 0.75}, 0.5))
    assert curve is not None
    (line,) = curve.lines
    xs, ys = zip(*((x, y) for x, y, _ in line.points), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)
    assert all(0 < x < WIDTH for x in xs)
    assert all(0 < y < HEIGHT for y in ys)
    assert line.points[-1][2] == "Reliability after 4: 50.0%"
    assert not curve.logarithmic


def test_many_edits_stand_on_a_logarithmic_scale_with_room_between_ticks() -> None:
    record = record_with({1: 1.0, 10: 1.0, 11: 1.0, 100: 0.9, 1000: 0.8}, 0.5)
    record["edits"] = record["edits"] * 2500  # type: ignore[operator]
    curve = forgetting_curve(record)
    assert curve is not None
    assert curve.logarithmic
    assert [words for _, words in curve.ticks] == ["1", "11", "100", "1,000", "10,000"]


def test_one_number_of_edits_is_no_curve() -> None:
    assert forgetting_curve(record_of(some_requests())) is None
