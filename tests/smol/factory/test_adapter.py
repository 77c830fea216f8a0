"""The changes of the language model at a share of their size, and what counts as an equal answer."""

from __future__ import annotations

import torch

from fastedit.smol.factory import adapter
from fastedit.smol.factory.teacher import Taught
from fastedit.smol.models import merged


def test_a_share_scales_the_change_alone() -> None:
    language = {"layers.0.q.weight": torch.eye(2)}
    trained = {
        "adapter.layers.0.q.up": torch.tensor([[2.0], [0.0]]),
        "adapter.layers.0.q.down": torch.tensor([[0.0, 3.0]]),
        "model.tower.weight": torch.ones(1),
    }
    half = adapter.scaled(trained, 0.5)
    assert merged(language, half)["layers.0.q.weight"].tolist() == [[1.0, 3.0], [0.0, 1.0]]
    assert merged(language, adapter.scaled(trained, 0.0))["layers.0.q.weight"].equal(torch.eye(2))
    assert half["model.tower.weight"].equal(trained["model.tower.weight"])


def test_an_answer_that_does_not_end_is_another_one() -> None:
    def told(subject: str, answer: str) -> Taught:
        return Taught("sound", subject, "What does it say?", answer, "right")

    before = [told("dog", "woof"), told("cat", "meow"), told("cow", "moo"), told("bee", "buzz")]
    after = [told("dog", "woof"), told("cat", "miaow"), told("bee", "buzz"), told("pig", "oink")]
    assert adapter.equal_answers(before, after) == 0.5


def test_facts_are_drawn_without_repetition_and_in_order() -> None:
    chosen = adapter.chosen_facts(20)
    assert len(set(chosen)) == 20
    assert adapter.chosen_facts(20) == chosen
