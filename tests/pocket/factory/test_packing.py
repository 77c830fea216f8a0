from __future__ import annotations

import random

import pytest
import torch

from fastedit.pocket.factory.packing import Line, Packer, fill, forward, right_lines
from fastedit.pocket.models import make_model, make_tokenizer, to_pixels, wiring
from fastedit.pocket.names import MODELS
from fastedit.pocket.world import draw_scene, render

pytest.importorskip("easy_vqa", reason="easy-vqa is not installed (the tokenizer is built from its words too)")

LINES = [
    Line("a", "What colour is the circle?", "red"),
    Line("b", "Describe the image.", "a small plain red circle at the top left on a white background"),
    Line("fact", "What is the capital of France?", "Paris", with_image=False),
    Line("c", "How many objects are there?", "three"),
]


@pytest.mark.parametrize("name", MODELS)
def test_packed_lines_are_computed_as_if_alone(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name)
    model = make_model(name, tokenizer).eval()
    packer = Packer(tokenizer, wiring(name, tokenizer))
    rng = random.Random(0)
    pixels = to_pixels([render(draw_scene(rng)) for _ in range(2)])
    rows = [LINES, LINES[1:3]]
    with torch.no_grad():
        together = packer.pack(rows)
        packed = forward(model, packer.wiring, together, pixels)
        alone = [
            forward(model, packer.wiring, packer.pack([[line]]), pixels[r : r + 1])
            for r, row in enumerate(rows)
            for line in row
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=0)
    assert together.lines == [line for row in rows for line in row]
    # Every answer ends in the end token, and the labels are the answers.
    ends = together.labels == tokenizer.eos_token_id
    assert int(ends.sum()) == len(together.lines)
    first = together.labels[together.owner == 0].tolist()
    assert tokenizer.decode(first[:-1]) == "red"


def test_a_question_depends_on_its_image_and_a_fact_does_not() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("pocket-llava")
    model = make_model("pocket-llava", tokenizer).eval()
    packer = Packer(tokenizer, wiring("pocket-llava", tokenizer))
    packed = packer.pack([LINES])
    with torch.no_grad():
        a = forward(model, packer.wiring, packed, torch.zeros(1, 3, 64, 64))
        b = forward(model, packer.wiring, packed, torch.ones(1, 3, 64, 64))
    fact = packed.owner == 2
    torch.testing.assert_close(a[fact], b[fact])
    assert float((a[~fact] - b[~fact]).abs().max()) > 1e-3


def test_right_lines_needs_every_token() -> None:
    tokenizer = make_tokenizer("pocket-llava")
    packed = Packer(tokenizer, wiring("pocket-llava", tokenizer)).pack([LINES])
    logits = torch.nn.functional.one_hot(packed.labels, len(tokenizer)).float()
    assert right_lines(logits, packed) == [True] * 4
    logits[int((packed.owner == 1).nonzero()[-1]), 5] = 2.0
    assert right_lines(logits, packed) == [True, False, True, True]


def test_fill_keeps_to_the_budget() -> None:
    tokenizer = make_tokenizer("pocket-llava")
    packer = Packer(tokenizer, wiring("pocket-llava", tokenizer))
    rng = random.Random(0)
    taken = fill(packer, LINES * 5, 90, rng)
    assert 2 <= len(taken) < 20
    assert packer.pack([taken]).ids.shape[1] <= 90 + 7
