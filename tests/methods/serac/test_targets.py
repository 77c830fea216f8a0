from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from fastedit.methods.serac.config import SERACConfig, targets_of
from fastedit.methods.serac.targets import Targets, words_of
from fastedit.pocket.models import make_tokenizer
from fastedit.training.config import MANY_RECORDS


@pytest.fixture(scope="module")
def model() -> Any:
    """Nothing but a tokenizer."""
    return SimpleNamespace(tokenizer=make_tokenizer("pocket-llava"))


def drawn(model: Any, invented: float = 0.75) -> list[str]:
    targets = Targets(model, ["oak", "red"], invented)
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


def test_without_a_share_all_are_of_other_records(model: Any) -> None:
    assert set(drawn(model, 0.0)) == {"oak", "red"}


def test_few_records_are_given_words_by_lot() -> None:
    plain, published, told = SERACConfig(), SERACConfig(faithful=True), SERACConfig(swap=0.2, invented=0.1)
    for records, shares in ((60, (0.75, 0.75)), (MANY_RECORDS - 1, (0.75, 0.75)), (MANY_RECORDS, (0.5, 0.0))):
        assert targets_of(plain, records) == shares
        assert targets_of(published, records) == (0.5, 0.0)
        assert targets_of(told, records) == (0.2, 0.1)


def test_a_vocabulary_without_marks_of_words_invents_none() -> None:
    bare: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"what": 0, "\u2581is": 1}))
    assert words_of(bare) == ()
    assert set(drawn(bare)) == {"oak", "red"}
    marked: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"\u2581what": 0, "\u2581w1": 1}))
    assert words_of(marked) == ("what",)
