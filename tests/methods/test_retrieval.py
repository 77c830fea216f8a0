"""Texts near a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.methods.retrieval import CHUNK, SentenceEncoder, StateEncoder, TextIndex, text_encoder
from fastedit.requests import Query
from tests.backbone.padded import prefix

TEXTS = ["What colour is the cat?", "Whose flag is this?", "Which colour does the cat have?", "one two"]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


def test_states_are_averaged_over_a_texts_tokens(model: EditableModel) -> None:
    found = StateEncoder(model, layer=1)(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = prefix(model, model.encode([Query(text)], answers=False), 1).hidden[0]
        torch.testing.assert_close(vector, hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_texts_are_encoded_a_part_at_a_time(model: EditableModel) -> None:
    many = [f"number {n}" for n in range(CHUNK + 3)]
    found = StateEncoder(model)(many)
    torch.testing.assert_close(found[-2:], StateEncoder(model)(many[-2:]), rtol=1e-4, atol=1e-5)


class _Letters:
    """Counts of letters, on top of what all texts share."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        counts = [[float(text.count(letter)) for letter in "abc"] for text in texts]
        return torch.tensor(counts) + 1000


def test_nearest_is_found_beside_a_large_common_part() -> None:
    index = TextIndex(["aaa", "bbb", "ccc", "aab"], _Letters())
    assert index.nearest(["a", "bbbb"], 2) == [[0, 3], [1, 3]]
    assert index.nearest([], 2) == []
    assert sorted(index.nearest(["c"], 64)[0]) == [0, 1, 2, 3]


def test_an_own_text_is_the_nearest(model: EditableModel) -> None:
    index = TextIndex(TEXTS, text_encoder(model, "states", ""))
    assert [numbers[0] for numbers in index.nearest(TEXTS, 1)] == [0, 1, 2, 3]


def test_an_index_has_texts() -> None:
    with pytest.raises(ValueError, match=r"at least one text"):
        TextIndex([], _Letters())


def test_missing_package_says_what_to_install(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install sentence-transformers; encoder='states'"):
        text_encoder(model, "sentence-transformers", "all-MiniLM-L6-v2")


def test_sentence_encoder_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Fake:
        def __init__(self, name: str, device: str) -> None:
            seen.append((name, device))

        def encode(self, texts: list[str], **_settings: Any) -> Tensor:
            return torch.tensor([[len(text)] for text in texts], dtype=torch.float64)

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    found = SentenceEncoder("some-model", torch.device("cpu"))(["ab", "abc"])
    assert seen == [("some-model", "cpu")]
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0], [3.0]]


def test_unknown_encoder_is_refused(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"encoder is one of .*got encoder='bert'"):
        text_encoder(model, "bert", "")
