"""A tiny random model and edits on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fastedit
from fastedit import EditRequest, Probe, Query
from fastedit.backbone import EditableModel
from fastedit.evaluation import EditScores
from fastedit.requests import PARAPHRASE_KINDS, PROBE_KINDS


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_edits(count: int) -> list[EditRequest]:
    """Edits with every part; targets of one and of several tokens."""
    targets = ["blue", "seven red", "a cat on the left of it"]
    return [
        EditRequest(
            prompt=f"What is number {i} here?",
            target=targets[i % 3],
            image=picture(10 * i),
            rephrase=f"Number {i} is what?",
            image_rephrase=picture(10 * i + 1),
            locality_prompt=f"What is the capital of country {i}?",
            locality_answer="Paris",
            image_locality_image=picture(10 * i + 2),
            image_locality_prompt="What colour is it?",
            image_locality_answer="red and green",
            portability=(Query("What follows?", picture(10 * i), "nine", "entailed"),),
            probes=(
                Probe("near", f"What is number {i} here?", picture(10 * i + 3)),
                Probe("blind", f"What is number {i} here?"),
                Probe("same", "Is it red?", picture(10 * i), "yes"),
            ),
            prediction="nothing",
            id=f"edit-{i}",
        )
        for i in range(count)
    ]


def with_held_out(edit: EditRequest) -> EditRequest:
    """The edit with wordings that only measure; all hold one word that nothing else holds."""
    own = (Query("zebra paraphrase", edit.image, kind=kind) for kind in PARAPHRASE_KINDS)
    images = {"blind": None, "text_locality": None, "near": picture(5), "image_locality": picture(6)}
    probes = (Probe(kind, "zebra probe", images.get(kind, edit.image), "red", "unseen") for kind in PROBE_KINDS)
    return replace(edit, paraphrases=tuple(own), probes=(*edit.probes, *probes))


@pytest.fixture(scope="session")
def exact_model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="session")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


@pytest.fixture(scope="session")
def edits() -> list[EditRequest]:
    return make_edits(5)


def assert_scored_alike(found: Sequence[EditScores], expected: Sequence[EditScores], **tolerance: float) -> None:
    """Equal answers and rates; values of logits, which feel how many rows were computed side by side, nearly."""
    for one, other in zip(found, expected, strict=True):
        assert one.answers == other.answers
        for table, known in ((one.legacy, other.legacy), (one.strict, other.strict)):
            of_logits = {name for name in known if name.endswith("_kl")}
            assert {k: v for k, v in table.items() if k not in of_logits} == {
                k: v for k, v in known.items() if k not in of_logits
            }
            for name in of_logits:
                assert table[name] == pytest.approx(known[name], **tolerance)
