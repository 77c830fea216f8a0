"""``fastedit report``, and answers before and after on the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

import fastedit
from fastedit.cli.main import app
from fastedit.cli.report import EXAMPLES, examples
from fastedit.data import write_jsonl
from tests.cli.test_terminal import printed
from tests.engine.conftest import make_edits
from tests.report.conftest import record_of, scored
from tests.report.test_saved import saved

runner = CliRunner()


def a_run(count: int, failing: tuple[int, ...] = ()) -> fastedit.Run:
    requests = make_edits(count)
    timing = fastedit.engine.Timing(1.0, {}, 1, 1.0)
    return fastedit.Run([None] * count, [], {}, scored(requests, failing), timing)  # type: ignore[list-item]


def test_three_edits_are_shown_with_their_answers_before_and_after() -> None:
    shown = printed(examples(a_run(5, failing=(1,))), width=100)
    assert shown[0].strip() == f"answers before and after, the first {EXAMPLES} edits"
    rows = [line.split("  ") for line in shown if "What is number" in line]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["What is number 0 here?", "blue", "old reliability", "blue"],
        ["What is number 1 here?", "seven red", "old reliability", "something else"],
        ["What is number 2 here?", "a cat on the left of it", "old reliability", "a cat on the left of it"],
    ]


def test_answers_cannot_move_the_cursor_and_long_ones_are_cut() -> None:
    run = a_run(1)
    run.edit_scores[0].answers[0].update(after="\x1b[31mred", before="x" * 500)  # type: ignore[attr-defined]
    text = "".join(printed(examples(run), width=200))
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text
    assert 40 < text.count("x") < 70


def test_edits_that_were_not_scored_have_no_answers() -> None:
    assert examples(replace(a_run(2), edit_scores=[])) is None


def test_the_command_writes_a_page_with_the_records_pictures(tmp_path: Path) -> None:
    requests = make_edits(3)
    records = tmp_path / "edits.jsonl"
    write_jsonl(requests, records, images=tmp_path)
    read = list(fastedit.read_edits(records, images=tmp_path))
    runs = [saved(tmp_path / name, read, method=name) for name in ("ft", "lora")]
    out = tmp_path / "new" / "page.html"
    done = runner.invoke(
        app, ["report", *map(str, runs), "--data", str(records), "--images", str(tmp_path), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert str(out) in done.output.replace("\n", "")
    page = out.read_text()
    assert "3 edits of pocket-llava, made in 2 ways" in page
    assert page.count("background-image:url(") == 3


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    done = runner.invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert isinstance(done.exception, FileNotFoundError)
    assert "report: a folder that holds a run" in str(done.exception)
    assert not (tmp_path / "page.html").exists()


def test_records_made_up_for_tests_are_like_real_ones(tmp_path: Path) -> None:
    real = fastedit.edit(fastedit.load("random:llava-tiny"), make_edits(2), "lora", steps=1, rank=2).record()
    made = record_of(make_edits(2))
    assert set(made) == set(real)
    assert [a["score"] for a in made["edits"][1]["answers"]] == [a["score"] for a in real["edits"][1]["answers"]]
    assert set(made["edits"][0]["answers"][0]) <= set(real["edits"][0]["answers"][0])
