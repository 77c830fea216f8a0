from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastedit.pocket import facts, grammar, model_path
from fastedit.pocket.templates import NOVEL
from fastedit.pocket.tokenizer import SPECIAL
from fastedit.pocket.world import COLOURS, FLAGS, SHAPES


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path("pocket-llava"))


def encoded(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
@example("violet")
@example("Zürich 日本 🙂")
@example("a  b\n\tc")
@example("\x00\ufeff")
def test_any_text_comes_back_but_for_one_leading_space(tokenizer, text: str) -> None:
    if any(special in text for special in SPECIAL):
        return
    assert tokenizer.decode(encoded(tokenizer, text)) == text.removeprefix(" ")


def test_one_leading_space_makes_no_difference(tokenizer) -> None:
    assert encoded(tokenizer, " red") == encoded(tokenizer, "red")
    ids = tokenizer("<|user|>What?<|assistant|>red</s>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<|user|>", "ĠWhat", "?", "<|assistant|>", "Ġred", "</s>"]


def test_words_of_the_grammar_are_one_token_and_others_are_spelled(tokenizer) -> None:
    for word in (*SHAPES, *COLOURS, *FLAGS, *facts.OPPOSITES.values()):
        assert len(encoded(tokenizer, word)) == 1
    for whole, spelled in NOVEL.values():
        assert all(len(encoded(tokenizer, word)) == 1 for word in whole)
        assert all(1 < len(encoded(tokenizer, word)) <= 9 for word in spelled)
    assert len(tokenizer) <= 1500
    words = [word for text in grammar.every_word() for word in text.replace("{}", " ").split()]
    assert sum(len(encoded(tokenizer, word)) for word in words) < 1.3 * len(words)
