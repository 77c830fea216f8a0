"""The shipped models do what their cards say, loaded the way a user loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit import pocket
from fastedit.pocket.factory.mixture import held_out
from fastedit.pocket.factory.packing import Packer, forward, right_lines
from fastedit.pocket.factory.release import GROUPS, generate, load, wanted
from fastedit.pocket.models import to_pixels, wiring

SAMPLES = 60


@pytest.fixture(scope="module", params=pocket.MODELS)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    name = request.param
    if name not in pocket.available():
        pytest.skip(f"{name} is neither shipped nor cached")
    return name, *load(pocket.model_path(name))


def test_the_first_model_is_shipped() -> None:
    folder = pocket.model_path("pocket-llava")
    assert folder.is_relative_to(Path(pocket.__file__).parent)
    assert (folder / "model.safetensors").stat().st_size <= 6e6


def test_card(shipped: tuple[str, Any, Any]) -> None:
    name, model, _ = shipped
    card = pocket.model_card(name)
    held, not_kept = card["accuracy"]["held_out"], card["accuracy"].get("not_kept", {})
    assert set(held) | set(not_kept) == set(GROUPS["held_out"])
    assert len(not_kept) <= (0 if name == "pocket-llava" else 2), not_kept
    assert card["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for kind, value in held.items():
        assert value >= wanted(kind), kind


def test_held_out_accuracy(shipped: tuple[str, Any, Any]) -> None:
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed (one of the kinds is its test split)")
    name, model, processor = shipped
    packer = Packer(processor.tokenizer, wiring(name, processor.tokenizer))
    right: dict[str, float] = {}
    for kind in pocket.model_card(name)["accuracy"]["held_out"]:
        if kind.startswith("fact"):
            continue
        drawn = held_out(kind, SAMPLES, seed=2)
        pixels = to_pixels([image for _, image in drawn if image])
        packed = packer.pack([[line] for line, _ in drawn])
        with torch.no_grad():
            verdicts = right_lines(forward(model, packer.wiring, packed, pixels), packed)
        right[kind] = sum(verdicts) / len(verdicts)
    # Three standard errors of 60 samples below 95 % and 90 %.
    assert all(value >= (0.78 if kind == "caption" else 0.86) for kind, value in right.items()), right
    assert sum(right.values()) / len(right) >= 0.95, right


def test_accuracy_in_unseen_wordings(shipped: tuple[str, Any, Any]) -> None:
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed (the vocabulary has its words)")
    name, model, processor = shipped
    claimed = pocket.model_card(name)["accuracy"].get("unseen_wordings")
    if claimed is None:
        pytest.skip(f"{name} was released before it was trained on many wordings")
    packer = Packer(processor.tokenizer, wiring(name, processor.tokenizer))
    blank, right = torch.zeros(1, 3, 64, 64), []
    for kind in claimed:
        drawn = held_out(kind, 20, seed=2)
        packed = packer.pack([[line] for line, _ in drawn])
        pixels = torch.cat([blank if image is None else to_pixels([image]) for _, image in drawn])
        with torch.no_grad():
            right += right_lines(forward(model, packer.wiring, packed, pixels), packed)
    mean = sum(claimed.values()) / len(claimed)
    assert mean >= 0.9
    # Three standard errors of the 20 samples of each of 21 kinds.
    assert sum(right) / len(right) >= mean - 3 * (0.1 * 0.9 / len(right)) ** 0.5


@pytest.mark.parametrize("kind", ["fact", "fact_untrained"])
def test_facts(shipped: tuple[str, Any, Any], kind: str) -> None:
    _, model, processor = shipped
    drawn = held_out(kind, 120)
    answers = generate(model, processor, [(line.prompt, None) for line, _ in drawn])
    right = sum(answer == line.answer for answer, (line, _) in zip(answers, drawn, strict=True))
    assert right / len(drawn) >= (0.97 if kind == "fact" else 0.88)


def test_generation_agrees_with_the_packed_verdicts_and_with_single_rows(shipped: tuple[str, Any, Any]) -> None:
    name, model, processor = shipped
    drawn = held_out("shape", 6) + held_out("where", 6) + held_out("caption", 4)
    asked = [(line.prompt, image) for line, image in drawn]
    together = generate(model, processor, asked)
    assert together == [generate(model, processor, [one])[0] for one in asked]
    packer = Packer(processor.tokenizer, wiring(name, processor.tokenizer))
    packed = packer.pack([[line] for line, _ in drawn])
    with torch.no_grad():
        logits = forward(model, packer.wiring, packed, to_pixels([image for _, image in drawn if image]))
    right = [answer == line.answer for answer, (line, _) in zip(together, drawn, strict=True)]
    assert right_lines(logits, packed) == right
    assert sum(right) >= 13


def test_questions_as_people_type_them(shipped: tuple[str, Any, Any]) -> None:
    _, model, processor = shipped
    from fastedit.pocket.world import Item, Scene, render

    image = render(
        Scene((Item("circle", "red", "large", "plain", 0), Item("star", "blue", "small", "plain", 3)), "white", 1)
    )
    asked = {
        "What colour is the circle?": "red",
        "what color is the star?": "blue",
        "What colour is the circle": "red",
        "Is there a blue star?": "yes",
        "How many objects are there?": "two",
        "Where is the star?": "bottom right",
    }
    answers = generate(model, processor, [(prompt, image) for prompt in asked])
    assert sum(a == b for a, b in zip(answers, asked.values(), strict=True)) >= 5, answers
    assert generate(model, processor, [("What is the capital of France?", None)]) == ["Paris"]
