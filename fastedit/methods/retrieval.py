"""Texts that are near a text: an index over a pool, by the model's own states or by a sentence encoder."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.ops import nearest_keys
from fastedit.requests import Query

ENCODERS = ("states", "sentence-transformers")
#: Texts that are encoded together.
CHUNK = 128


class TextEncoder(Protocol):
    """From texts to vectors whose cosine says how near they are."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, d), float32, on the device that neighbours are looked up on."""


class StateEncoder:
    """The mean of the frozen model's own states over a text's tokens, in the middle of the decoder.

    Nothing is downloaded and nothing more is held in memory. States of one model share a large common part, which says
    nothing of the text: the index takes the pool's mean away.

    Args:
        model: frozen. layer: the states are those that enter it; None is the middle one.
    """

    def __init__(self, model: EditableModel, layer: int | None = None) -> None:
        self.model = model
        self.layer = model.n_layers // 2 if layer is None else layer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`.

        Raises:
            ValueError: a text that the model has no positions for.
        """
        found = []
        for start in range(0, len(texts), CHUNK):
            encoded = self.model.encode([Query(text) for text in texts[start : start + CHUNK]], answers=False)
            state = packed_prefix(self.model, packed_start(self.model, encoded), self.layer, "attention")
            row = token_rows(state.counts, state.hidden.device)
            hidden = state.hidden.float()
            total = hidden.new_zeros(len(state), hidden.shape[1]).index_add_(0, row, hidden)
            found.append(total / torch.tensor(state.counts, device=row.device)[:, None])
        return torch.cat(found)


class SentenceEncoder:
    """A model of the optional package sentence-transformers, as published (all-MiniLM-L6-v2).

    Args:
        name: of the model, or its folder. device: where it runs.
    Raises:
        ImportError: the package is missing; says what to install.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            package: Any = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise ImportError(
                "retrieval: encoder='sentence-transformers' needs the package of this name: "
                "pip install sentence-transformers; encoder='states' needs nothing"
            ) from error
        self.device = device
        self._model = package.SentenceTransformer(name, device=str(device))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        vectors = self._model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        found: Tensor = torch.as_tensor(vectors).to(self.device, torch.float32)
        return found


def text_encoder(model: EditableModel, encoder: str, name: str) -> TextEncoder:
    """The encoder by one of ``ENCODERS``.

    Raises:
        ValueError: an unknown one. ImportError: its package is missing.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"retrieval: encoder is one of {list(ENCODERS)} (got encoder={encoder!r})")
    return StateEncoder(model) if encoder == "states" else SentenceEncoder(name, model.device)


class TextIndex:
    """Texts and their vectors, less the mean of all.

    Args:
        texts: at least one.
        encoder: of these and of what is looked up.
    Raises:
        ValueError: no texts.
    """

    def __init__(self, texts: Sequence[str], encoder: TextEncoder) -> None:
        if not texts:
            raise ValueError("retrieval: an index has at least one text (got texts=[])")
        self.texts, self.encoder = list(texts), encoder
        vectors = encoder(self.texts)
        self.mean = vectors.mean(0, keepdim=True)
        self.vectors = vectors - self.mean

    def nearest(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """Numbers of the k texts that are nearest to each query, the nearest first; all where there are fewer.

        Raises:
            ValueError: k is not 1 to 64.
        """
        if not queries:
            return []
        asked = self.encoder(queries) - self.mean
        _, found = nearest_keys(asked, self.vectors, min(k, len(self.texts)), "cosine")
        numbers: list[list[int]] = found.tolist()
        return numbers
