from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from fastedit.methods.serac.config import SERACConfig
from fastedit.methods.serac.targets import Targets, words_of
from fastedit.pocket.models import make_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    """Nothing but a tokenizer."""
    return SimpleNamespace(tokenizer=make_tokenizer("pocket-llava"))


def drawn(model: Any, **settings: Any) -> list[str]:
    targets = Targets(model, ["oak", "red"], SERACConfig(**settings))
    rng = random.Random(0)
    return [targets.other(rng) for _ in range(400)]


def test_most_of_the_other_targets_are_words_by_lot(model: Any) -> None:
    words = set(words_of(model))
    assert len(words) > 100
    found = drawn(model)
    invented = [text for text in found if text not in ("oak", "red")]
    assert 0.65 < len(invented) / len(found) < 0.85
    assert {len(text.split()) for text in invented} == {1, 2, 3}
    assert all(word in words for text in invented for word in text.split())
    assert len(set(invented)) > 200


def test_words_by_lot_are_single_tokens_of_the_model(model: Any) -> None:
    for word in random.Random(0).sample(words_of(model), 20):
        assert len(model.tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1
        assert word.isalpha()


def test_without_a_share_and_as_published_all_are_of_other_records(model: Any) -> None:
    assert set(drawn(model, invented=0.0)) == set(drawn(model, faithful=True)) == {"oak", "red"}


def test_a_vocabulary_without_marks_of_words_invents_none() -> None:
    bare: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"what": 0, "\u2581is": 1}))
    assert words_of(bare) == ()
    assert set(drawn(bare)) == {"oak", "red"}
    marked: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"\u2581what": 0, "\u2581w1": 1}))
    assert words_of(marked) == ("what",)
