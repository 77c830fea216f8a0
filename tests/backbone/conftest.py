"""Tiny random models of every family, and rows that mix images, none, and lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastedit.backbone import SHAPES, EditableModel, Encoded, load
from fastedit.requests import Query

TINY = tuple(f"random:{name}" for name in SHAPES if name.endswith("-tiny"))

# One of each way that positions, images and blocks are treated.
DISTINCT = ("random:llava-tiny", "random:blip2-tiny", "random:qwen3vl-tiny")


@functools.cache
def cached_model(
    name: str, dtype: str = "float32", quantize: str = "none", attention: str | None = None
) -> EditableModel:
    return load(name, dtype=dtype, quantize=quantize, attention=attention)


def picture(seed: int, height: int = 40, width: int = 70) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def mixed_queries() -> list[Query]:
    """Ragged rows: two shapes of image, no image, a repeated image, answers of one to several tokens."""
    first, second = picture(0), picture(1, 64, 30)
    return [
        Query("what is it?", first, "red"),
        Query("what color is the large square on the left side?", second, "a yellow photo of two zebras"),
        Query("what?", None, "blue"),
        Query("is it red?", first, "yes"),
        Query("how many are there in the picture on the right, and where?", None, "three"),
    ]


def stock_logits(model: EditableModel, row: Encoded) -> torch.Tensor:
    """Logits (N, V) of one row from the stock forward."""
    inputs = row.model_inputs
    if row.images[0] is None and model.adapter.family == "BLIP-2":
        # The whole model insists on pixels; its language model is what answers a question in text only.
        return model.hf.language_model(**inputs).logits[0].detach()
    # The last generation leaves these behind, for rows of another shape.
    if hasattr(getattr(model.hf, "model", None), "rope_deltas"):
        model.hf.model.rope_deltas = None
    return model.hf(**inputs).logits[0].detach()


def largest_gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item() if first.numel() else 0.0


@pytest.fixture
def count_calls() -> Callable[[Any], list[int]]:
    """Count forward calls of a module: the length of the list that is returned."""
    handles = []

    def watch(module: Any) -> list[int]:
        calls: list[int] = []
        handles.append(module.register_forward_hook(lambda *_: calls.append(1)))
        return calls

    yield watch
    for handle in handles:
        handle.remove()
