"""The code in README and the documents: every Python block runs, every command line is one that there is.

A document's blocks share a namespace and run in order in a folder of their own, which has what they speak of:
``path/to/model`` is pocket-llava, ``vqa_eval.json`` and ``vqa_train.json`` are records with their images in ``coco/``.
A block that cannot run here is marked in the document: ``<!-- skip: next "the reason" -->``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import click
import pytest
import typer

import fastedit
from fastedit.cli.main import app
from fastedit.data import write_mmedit
from fastedit.pocket import model_path

sybil = pytest.importorskip("sybil", reason="sybil is not installed")
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


WITH_PYTHON = [name for name, path in zip(NAMES, DOCUMENTS, strict=True) if blocks(path, "python")]
WITH_SHELL = [name for name, path in zip(NAMES, DOCUMENTS, strict=True) if blocks(path, "sh")]


@pytest.fixture(scope="module")
def load_once() -> Callable[..., Any]:
    """``fastedit.load`` that gives the same model for the same arguments; in float32, where a CPU has its speed."""
    load, loaded = fastedit.load, {}

    def once(name: str, **options: Any) -> Any:
        options = {key: value for key, value in options.items() if value != "bfloat16"}
        key = ("pocket-llava" if name == "path/to/model" else name, *sorted(options.items()))
        if key not in loaded:
            loaded[key] = load(name, **options)
        return loaded[key]

    return once


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What documents speak of: a model, two files of records, images."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(model_path("pocket-llava"))
    images = folder / "coco"
    images.mkdir()
    for name, split, count in (("vqa_eval.json", "eval", 2), ("vqa_train.json", "train", 8)):
        write_mmedit(fastedit.read_edits("pocket-vqa", split=split, limit=count), folder / name, images=images)
    first = next(images.glob("*.png"))
    for name in ("bus", "bus-again", "cat", "other-bus"):
        shutil.copy(first, images / f"{name}.png")
    shutil.copytree(images, folder / "frames")
    return folder


@pytest.fixture
def workplace(
    material: Path, load_once: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A working directory with the material in it."""
    for each in material.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastedit, "load", load_once)
    return tmp_path


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_blocks_run(name: str, workplace: Path) -> None:
    reader = sybil.Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])
    skipped = 0
    for example in reader.parse(ROOT / name).examples():
        try:
            example.evaluate()
        except SkipTest:
            skipped += 1
    # Each with its reason: without one, sybil leaves a block out and says nothing
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(re.findall(r'^<!-- skip: next "[^"]{8,}" -->$', text, flags=re.MULTILINE)) == skipped
    assert text.count("<!-- skip:") == skipped


def command_lines(path: Path) -> Iterator[list[str]]:
    """Every call of fastedit in a document's shell blocks, as arguments."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["fastedit"]:
                yield words[1:]


@pytest.mark.parametrize("name", WITH_SHELL)
def test_commands_are_spelled_as_they_are(name: str, workplace: Path) -> None:
    """Parsed by the command line itself: the command, its options and their values."""
    commands: Any = typer.main.get_command(app)
    for words in command_lines(ROOT / name):
        command = commands.commands[words[0]]
        with command.make_context(words[0], words[1:], parent=click.Context(commands)):
            pass


def test_records_in_json_are_read(workplace: Path) -> None:
    lines = [line for block in blocks(ROOT / "docs/guides/data.md", "json") for line in block.splitlines()]
    shutil.copy("coco/bus.png", "bus.png")
    Path("records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read = fastedit.read_edits("records.jsonl", images=".")
    assert [each.prompt for each in read] == [json.loads(line)["prompt"] for line in lines]
    assert len(read) > 0
