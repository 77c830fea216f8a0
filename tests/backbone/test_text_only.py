"""Causal language models without images: the same engine from a folder to scores, and a plain no to images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastedit
from fastedit.backbone.synthetic.processors import made_up_tokenizer
from fastedit.cli.main import app
from fastedit.data import RecordErrors
from fastedit.requests import EditRequest, Video

from .architectures import VOCABULARY, make_stock
from .conftest import picture


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_stock(request.param, torch.float32).save_pretrained(path)
    made_up_tokenizer(VOCABULARY, end="</s>", opens=True).save_pretrained(path)
    return path


def test_a_text_model_is_edited_scored_and_planned(folder: Path) -> None:
    model = fastedit.load(folder)
    edit = EditRequest("what is it?", "a red car", locality_prompt="how many?", locality_answer="two", id="a")
    run = fastedit.edit(model, [edit], "lora", steps=60, lr=0.02)
    assert run.scores["legacy"]["reliability"].mean == 1.0
    assert "text_locality" in run.scores["legacy"]
    before = model.answer(None, "what is it?", max_new_tokens=8)
    with fastedit.applied(model, run.deltas[0]):
        assert model.answer(None, "what is it?", max_new_tokens=8) == "a red car"
    assert model.answer(None, "what is it?", max_new_tokens=8) == before
    assert fastedit.plan_memory(folder, method="lora").total_bytes > 0


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (picture(0), "an image"),
        ([picture(0), picture(1)], "2 images"),
        (Video([picture(0), picture(1)]), "a video of 2 frames"),
    ],
    ids=["image", "list", "video"],
)
def test_images_are_refused_before_work(folder: Path, image: object, told: str) -> None:
    model = fastedit.load(folder)
    rule = rf"is a model of text alone, which takes no images \(got {told}\)"
    with pytest.raises(RecordErrors, match=rf"edits\[0\], image: .*{rule}"):
        fastedit.edit(model, [EditRequest("what?", "red", image)], "lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"encode: row 0: image: .*{rule}"):
        model.answer(image, "what?")  # type: ignore[arg-type]


def test_the_command_line_edits_a_text_model(folder: Path, tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "run"
    record = {"prompt": "what is it?", "target": "a red car"}
    good.write_text(json.dumps(record))
    picture(0).save(tmp_path / "a.png")
    bad.write_text(json.dumps(record | {"image": "a.png"}))
    common = ["edit", "--model", str(folder), "--method", "lora", "--out", str(out), "--set", "steps=2"]
    done = CliRunner().invoke(app, [*common, "--data", str(good)])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "scores.json").read_text())
    refused = CliRunner().invoke(app, ["check", str(bad), "--model", str(folder), "--images", str(tmp_path)])
    assert refused.exit_code == 2
    assert "a model of text alone, which takes no images (got an image)" in " ".join(refused.output.split())
