"""How much slower the generic walk is than the fast path, on the same weights: fitting edits, and answering.

    python -m benchmarks.generic_walk [--shape llava-77m] [--rounds 5] [--threads 1]

A model of stock classes with random weights is walked both ways. Nothing is timed before both fit the same deltas and
give the same answers; then they take turns, and the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import fastedit
from benchmarks.cases import made_up_edits
from fastedit.backbone import EditableModel
from fastedit.backbone.adapters import make_adapter
from fastedit.backbone.generic.adapter import GenericAdapter
from fastedit.backbone.loading import end_tokens
from fastedit.backbone.synthetic import models
from fastedit.backbone.synthetic.shapes import SHAPES, Shape
from fastedit.requests import EditRequest, Query

_TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8}
_TEXT |= {"intermediate_size": 1376, "vocab_size": 32000, "max_position_embeddings": 2048}
#: Text models of 77 M parameters behind a small tower, whose 16 image tokens leave the time to the decoder.
MADE: dict[str, Shape] = {
    "llava-77m": replace(SHAPES["llava-tiny"], text=SHAPES["llava-tiny"].text | _TEXT, std=0.02),
    "llava-tiny": SHAPES["llava-tiny"],
}
#: What the generic walk may take of the fast path's time.
BOUND = 1.15
#: Of the largest entry, how far deltas in float64 may lie apart.
TOLERANCE = 1e-9


def both_walks(shape: str, dtype: torch.dtype) -> tuple[EditableModel, EditableModel]:
    """The model on its fast path, and the same weights on the generic walk."""
    with mock.patch.dict(models.SHAPES, MADE):
        hf, processor = models.make_random(
            shape, dtype=dtype, device=torch.device("cpu"), attention=None, seed=0, convert=None
        )
    fast, walked = (
        EditableModel(
            hf,
            processor,
            adapter,
            name=shape,
            quantize="none",
            dtype=dtype,
            template=None,
            end_token_ids=end_tokens(hf, processor.tokenizer),
            image_cache_mib=256,
        )
        for adapter in (make_adapter(hf, processor), GenericAdapter(hf, processor))
    )
    return fast, walked


def fit(model: EditableModel, edits: list[EditRequest]) -> fastedit.Run:
    """Twenty steps of ``lora`` in the last two layers."""
    model.forget()
    return fastedit.edit(model, edits, "lora", layers=2, steps=20, stop_loss=None, evaluate=False, show_progress=False)


def answer(model: EditableModel, edits: list[EditRequest]) -> list[str]:
    """Greedy answers of sixteen tokens at most."""
    model.forget()
    return model.generate([Query(edit.prompt, edit.image) for edit in edits], max_new_tokens=16)


def check(shape: str, edits: list[EditRequest]) -> float:
    """How far the deltas of both lie apart in float64, as a share of the largest entry.

    Raises:
        RuntimeError: further than ``TOLERANCE``, or answers differ.
    """
    fast, walked = both_walks(shape, torch.float64)
    apart = 0.0
    for one, other in zip(fit(fast, edits).deltas, fit(walked, edits).deltas, strict=True):
        for name, tensor in one.tensors.items():
            apart = max(apart, float((tensor - other.tensors[name]).abs().max() / tensor.abs().max().clamp(min=1e-12)))
    if apart > TOLERANCE:
        raise RuntimeError(f"generic_walk: deltas lie within {TOLERANCE} (got {apart:.1e})")
    if answer(fast, edits) != answer(walked, edits):
        raise RuntimeError("generic_walk: both walks answer alike (got other answers)")
    return apart


def ratios(
    work: Callable[[EditableModel], Any], fast: EditableModel, walked: EditableModel, rounds: int
) -> list[float]:
    """By round, seconds of the generic walk over those of the fast path, who goes first in turn."""
    found = []
    for index in range(rounds + 1):
        seconds = {}
        for name, model in (("fast", fast), ("walked", walked))[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            work(model)
            seconds[name] = time.perf_counter() - start
        found.append(seconds["walked"] / seconds["fast"])
    # The first round warms up
    return found[1:]


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-77m", choices=list(MADE))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--edits", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    edits = made_up_edits(given.edits, size=32)
    apart = check(given.shape, edits[:4])
    print(f"{given.shape}: deltas in float64 within {apart:.1e}, equal answers")
    fast, walked = both_walks(given.shape, torch.float32)
    for name, work in (("fit", fit), ("answer", answer)):
        found = ratios(lambda model, work=work: work(model, edits), fast, walked, given.rounds)  # type: ignore[misc]
        middle = statistics.median(found)
        verdict = "within" if middle <= BOUND else "above"
        print(f"{name}: {middle:.3f} times the fast path ({min(found):.3f} to {max(found):.3f}), {verdict} {BOUND}")


if __name__ == "__main__":
    main()
