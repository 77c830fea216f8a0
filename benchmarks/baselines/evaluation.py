"""Scoring the plain way: every question is a batch of one, once before the edit and once with it.

The same questions and definitions as the engine's evaluation, so that scores can be compared; none of its packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.metrics import kl_divergence, ranked_agreement, token_accuracy, top_ids
from fastedit.backbone import EditableModel, Encoded
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import EditScores, EvaluationView, evaluation_views, exact_match, mean_by_name, token_f1
from fastedit.requests import EditRequest, Query

TOP_K = 10

#: Lets an edit act on a row for the length of a block.
Applied = Callable[[Encoded], AbstractContextManager[None]]


class PlainEvaluator:
    """Scores one edit at a time with the stock model's own forward and ``generate``.

    Args:
        model: frozen.
        timer: everything here is phase "evaluation".
        max_new_tokens: longest generated answer.
    """

    def __init__(self, model: EditableModel, timer: PhaseTimer, *, max_new_tokens: int = 48) -> None:
        self.model, self.timer, self.max_new_tokens = model, timer, max_new_tokens

    def scores(self, request: EditRequest, applied: Applied) -> EditScores:
        """Both protocols' values of one edit."""
        with self.timer.phase("evaluation"), torch.no_grad():
            legacy: list[tuple[str, float]] = []
            strict: list[tuple[str, float]] = []
            answers = []
            for view in evaluation_views(request):
                before, after = self._generated(view.query, _unedited), self._generated(view.query, applied)
                strict += _strict_values(view, before, after, request.target)
                answer = view.query.answer or before
                if answer.strip():
                    values, divergence = self._teacher_forced(view, answer, applied)
                    legacy += values
                    if not view.changes:
                        strict.append((f"{view.score}_kl", divergence))
                answers.append({"score": view.score, "prompt": view.query.prompt, "before": before, "after": after})
            return EditScores(mean_by_name(legacy), mean_by_name(strict), answers)

    def _generated(self, query: Query, applied: Applied) -> str:
        """The stock model's greedy answer."""
        encoded = self.model.encode([query], answers=False)
        inputs = stock_inputs(self.model, encoded)
        asked = inputs["input_ids"][0]
        with applied(encoded):
            ids = stock_model(self.model, inputs).generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=list(self.model.end_token_ids),
                pad_token_id=self.model.end_token_ids[0],
            )[0]
        # Some models return the question too.
        if torch.equal(ids[: len(asked)], asked):
            ids = ids[len(asked) :]
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _teacher_forced(
        self, view: EvaluationView, answer: str, applied: Applied
    ) -> tuple[list[tuple[str, float]], float]:
        """Legacy values of one question, and KL(before || after)."""
        encoded = self.model.encode([replace(view.query, answer=answer)], answers=True)
        mask, labels = encoded.label_mask, encoded.labels
        before = self._logits(encoded)
        with applied(encoded):
            after = self._logits(encoded)
        best_before, best_after = top_ids(before, TOP_K), top_ids(after, TOP_K)
        divergence = float(kl_divergence(before, after, mask))
        if view.changes:
            return [(view.score, float(token_accuracy(best_after[..., 0], labels, mask)))], divergence
        values = [(view.score, float(ranked_agreement(best_before[..., :1], best_after[..., :1], mask)))]
        if view.score in ("text_locality", "image_locality"):
            values.append((f"{view.score}_top10", float(ranked_agreement(best_before, best_after, mask))))
        return values, divergence

    def _logits(self, encoded: Encoded) -> Tensor:
        """(1, N, V), all positions."""
        inputs = stock_inputs(self.model, encoded)
        logits: Tensor = stock_model(self.model, inputs)(**inputs, use_cache=False).logits
        return logits


def _unedited(_encoded: Encoded) -> AbstractContextManager[None]:
    return nullcontext()


def stock_inputs(model: EditableModel, encoded: Encoded) -> dict[str, Tensor]:
    """What the stock forward takes, on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in encoded.model_inputs.items()}


def stock_model(model: EditableModel, inputs: Mapping[str, Tensor]) -> Any:
    """The stock model, or its language model where a question without image cannot be put to the whole."""
    pixels = inspect.signature(model.hf.forward).parameters.get("pixel_values")
    needs_pixels = pixels is not None and pixels.default is inspect.Parameter.empty
    return model.hf.language_model if needs_pixels and "pixel_values" not in inputs else model.hf


def _strict_values(view: EvaluationView, before: str, after: str, target: str) -> list[tuple[str, float]]:
    wanted = view.query.answer or ""
    if view.changes:
        values = [(view.score, float(exact_match(after, wanted))), (f"{view.score}_f1", token_f1(after, wanted))]
    else:
        values = [(view.score, float(after == before))]
    if view.score in ("near", "blind") and not exact_match(before, target):
        values.append(("blindness", float(exact_match(after, target))))
    return values
