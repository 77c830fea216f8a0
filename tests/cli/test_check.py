"""``fastedit check`` finds what a run would stop at, and says what it did not look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastedit.cli.main import app
from fastedit.data import RecordErrors, write_jsonl
from tests.engine.conftest import make_edits


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    write_jsonl(make_edits(3), path, images=tmp_path)
    return path


def test_sound_records_pass_and_images_are_counted(records: Path) -> None:
    done = run(records, "--images", records.parent)
    assert done.exit_code == 0
    assert "3 records read" in done.stdout
    # Four of each record, one of them shared with other questions
    assert "12 images looked at in" in done.stdout
    assert "not looked at" not in done.stdout
    assert "3 edits on 3 images" in done.stdout


def test_without_images_it_says_so(records: Path) -> None:
    for model in ((), ("--model", "random:llava-tiny")):
        done = run(records, *model)
        assert done.exit_code == 0, done.output
        assert "images were not looked at: say with --images where they are" in done.stdout


def test_every_broken_image_is_listed(records: Path, tmp_path: Path) -> None:
    pictures = sorted(tmp_path.glob("*.png"))
    for path in pictures:
        path.write_bytes(path.read_bytes()[:200])
    done = run(records, "--images", tmp_path)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("  ")]
    # All of them, however many
    assert len(lines) == 12
    assert done.stderr.startswith("fastedit: 12 problems in 3 records\n")
    for path in pictures:
        assert any(str(path)[-79:] in line for line in lines)
    assert f"{records} record 0 (line 1, id 'edit-0'), image: cannot be decoded" in lines[0]


def test_lengths_and_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    first, second, third = make_edits(3)
    path = tmp_path / "edits.jsonl"
    write_jsonl([first, replace(second, target="red</s>"), replace(third, rephrase="is " * 300)], path, images=tmp_path)
    assert run(path, "--images", tmp_path).exit_code == 0
    for images in ((), ("--images", tmp_path)):
        done = run(path, *images, "--model", "random:llava-tiny")
        assert done.exit_code == 2
        assert "in rows of at most 256 tokens" in done.stdout
        assert "record 1 (line 2, id 'edit-1'), target: must not hold special tokens of the model" in done.stderr
        assert "record 2 (line 3, id 'edit-2'), rephrase: a row may have at most 256 tokens" in done.stderr
        assert "fastedit: 2 problems in 2 records" in done.stderr


def test_broken_records_and_broken_images_are_told_together(records: Path, tmp_path: Path) -> None:
    next(iter(sorted(tmp_path.glob("*.png")))).write_text("<html>404</html>")
    with records.open("a") as file:
        file.write('{"prompt": "What?", "target": ""}\n{"prompt": "What?", "target": "x", "image": "absent.png"}\n')
    done = run(records, "--images", tmp_path)
    assert done.exit_code == 2
    for part in ("record 3 (line 4), target: must not be empty", "record 4 (line 5), image: not found", "one of PNG"):
        assert part in done.stderr, done.stderr
    assert "fastedit: 3 problems in 3 records, 1 image file not found" in done.stderr


def test_an_embedded_set_is_checked_against_its_model() -> None:
    done = run("pocket-vqa", "--model", "pocket-llava")
    assert done.exit_code == 0, done.output
    assert "texts and images as pocket-llava takes them, in rows of at most 512 tokens" in done.stdout


@pytest.mark.parametrize(
    "command",
    [("edit", "--method", "lora"), ("compare", "--methods", "ft,lora"), ("train", "--method", "mend")],
    ids=["edit", "compare", "train"],
)
def test_runs_tell_all_problems_before_weights_are_read(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fastedit.load", lambda *_a, **_k: pytest.fail("weights were read"))
    pictures = sorted(tmp_path.glob("*.png"))
    pictures[3].write_text("<html>404</html>")
    pictures[8].write_bytes(pictures[8].read_bytes()[:200])
    with pytest.raises(RecordErrors) as caught:
        CliRunner().invoke(
            app,
            [*command, "--model", "random:llava-tiny", "--data", str(records), "--images", str(tmp_path),
             "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )  # fmt: skip
    assert len(caught.value.problems) == 2
    assert all(problem.file == str(records) and problem.id for problem in caught.value.problems)
    assert not list(tmp_path.glob("out/*.safetensors"))
