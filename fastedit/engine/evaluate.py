"""Ask the model every question of the evaluation, before and with the edits, many edits at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.data.images import image_key
from fastedit.deltas import DeltaSpec, Rows, StackedDelta, installed
from fastedit.engine.batch import Layout, head_at, split_point
from fastedit.engine.timing import PhaseTimer
from fastedit.evaluation import (
    EditScores,
    EvaluationView,
    evaluation_views,
    exact_match,
    mean_by_name,
    token_f1,
)
from fastedit.ops import risk, topk_agreement
from fastedit.requests import EditRequest, Query

TOP_K = 10
# Reference answers kept with a model (some 100 bytes each); more than one batch asks for
MOST_ANSWERS = 200_000


@dataclass
class _Row:
    """One question of one edit, with what was found."""

    edit: int
    view: EvaluationView
    before: str = ""
    after: str | None = None  # not known yet
    legacy: dict[str, float] | None = None
    kl: float | None = None


class Evaluator:
    """Scores edits under both protocols; the unedited model's answers are asked once and remembered.

    Args:
        model: frozen, with no delta installed.
        spec: of the deltas that will be scored (says what part of the model they cannot reach).
        timer: everything here is phase "evaluation".
        max_new_tokens: longest generated answer.
        row_limit: most rows in one forward.
    """

    def __init__(
        self,
        model: EditableModel,
        spec: DeltaSpec,
        timer: PhaseTimer,
        *,
        max_new_tokens: int = 48,
        row_limit: int = 256,
    ) -> None:
        self.model, self.spec, self.timer = model, spec, timer
        self.max_new_tokens, self.row_limit = max_new_tokens, row_limit
        self._answers = model.reference_answers

    def scores(
        self, requests: Sequence[EditRequest], stacked: StackedDelta, *, shared: bool = False
    ) -> list[EditScores]:
        """Scores of the given edits.

        Args:
            requests: n edits.
            stacked: n deltas, one per edit; or, when ``shared``, one delta that acts on every row.
        Returns:
            n EditScores.
        """
        with self.timer.phase("evaluation"), torch.no_grad():
            rows = [_Row(edit, view) for edit, request in enumerate(requests) for view in evaluation_views(request)]
            # Given answers are fed first: where every token of one, its end included, is the argmax, greedy decoding
            # gives it, and it need not be decoded
            self._feed([row for row in rows if _has_text(row.view.query.answer)], stacked, shared)
            self._ask_before([row.view.query for row in rows])
            for row in rows:
                row.before = self._answers[self._key(row.view.query)]
            self._feed([row for row in rows if row.legacy is None and _has_text(row.before)], stacked, shared)
            for part in _parts([row for row in rows if row.after is None], self.row_limit):
                with installed(self.model, stacked, Rows() if shared else _rows_of(part, stacked.size)):
                    generated = self._generate([row.view.query for row in part])
                for row, text in zip(part, generated, strict=True):
                    row.after = text
            return [_edit_scores([row for row in rows if row.edit == edit]) for edit in range(len(requests))]

    def _key(self, query: Query) -> tuple[str, str, int]:
        return query.prompt, "" if query.image is None else image_key(query.image), self.max_new_tokens

    def _generate(self, queries: list[Query]) -> list[str]:
        return self.model.generate(queries, max_new_tokens=self.max_new_tokens, batch_size=max(1, len(queries)))

    def _ask_before(self, queries: Sequence[Query]) -> None:
        """Remember the unedited model's answers to the queries not asked yet."""
        fresh = {self._key(query): query for query in queries if self._key(query) not in self._answers}
        # Long answers apart: a batch runs until its last row has ended
        for keys in _chunks(sorted(fresh, key=lambda key: _is_long(fresh[key].answer)), self.row_limit):
            for key, text in zip(keys, self._generate([fresh[key] for key in keys]), strict=True):
                self._answers[key] = text
        for key in list(self._answers)[: max(0, len(self._answers) - MOST_ANSWERS)]:
            del self._answers[key]

    def _feed(self, rows: list[_Row], stacked: StackedDelta, shared: bool) -> None:
        for part in _parts(rows, self.row_limit):
            self._teacher_forced(part, stacked, Rows() if shared else _rows_of(part, stacked.size))

    def _teacher_forced(self, rows: Sequence[_Row], stacked: StackedDelta, where: Rows) -> None:
        """Fill ``legacy`` and ``kl``; and the generated answers, where they are the one that is fed."""
        fed = [replace(row.view.query, answer=row.view.query.answer or row.before) for row in rows]
        encoded = self.model.encode(fed, answers=True)
        state = self.model.prefix(encoded, *split_point(self.spec))
        layout = Layout.of(encoded)
        before = head_at(self.model, state, layout)[1]
        with installed(self.model, stacked, where):
            after = head_at(self.model, state, layout)[1]
        found = _token_scores(before, after, layout.labels)
        means = {name: _row_means(values, layout.row_of_token, len(rows)) for name, values in found.items()}
        for number, row in enumerate(rows):
            row.legacy = {name: means[name][number] for name in ("accuracy", "top1", "top10")}
            row.kl = means["kl"][number]
            *answer, _end = layout.labels[layout.row_of_token == number].tolist()
            if len(answer) > self.max_new_tokens:
                continue
            text = self.model.tokenizer.decode(answer, skip_special_tokens=True).strip()
            if means["accuracy"][number] == 1.0:
                row.after = text
            if means["accuracy_before"][number] == 1.0:
                self._answers.setdefault(self._key(row.view.query), text)


def _token_scores(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Legacy scores and KL(before || after) of every token (T,), float64, of logits (T, V) and labels (T,)."""
    top1, top10 = topk_agreement(before, after, TOP_K)
    tokens = torch.arange(len(labels), device=labels.device)
    divergence = risk(after, before, tokens, len(labels), "forward_kl")[0].double()
    # a diverged model is never right
    broken = divergence.isnan()
    right = (after.argmax(-1) == labels) & ~broken
    return {
        "accuracy_before": (before.argmax(-1) == labels).double(),
        "accuracy": right.double(),
        "top1": top1,
        "top10": top10,
        "kl": divergence.masked_fill(broken, math.inf),
    }


def _row_means(values: Tensor, row_of_token: Tensor, n_rows: int) -> list[float]:
    """Means over the tokens of every row."""
    total = values.new_zeros(n_rows).index_add_(0, row_of_token, values)
    means: list[float] = (total / torch.bincount(row_of_token, minlength=n_rows)).tolist()
    return means


LONG_ANSWER = 24


def _has_text(text: str | None) -> bool:
    return bool((text or "").strip())


def _is_long(text: str | None) -> bool:
    return len(text or "") > LONG_ANSWER


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _parts(rows: list[_Row], limit: int) -> Iterator[Sequence[_Row]]:
    """Rows in forwards of at most ``limit``, sorted by edit, those with long answers apart."""
    for long in (False, True):
        yield from _chunks([row for row in rows if _is_long(row.view.query.answer) is long], limit)


def _rows_of(rows: Sequence[_Row], size: int) -> Rows:
    counts = [0] * size
    for row in rows:
        counts[row.edit] += 1
    return Rows(tuple(counts))


def _edit_scores(rows: Sequence[_Row]) -> EditScores:
    """Both protocols' values of one edit from its rows."""
    legacy: list[tuple[str, float]] = []
    strict: list[tuple[str, float]] = []
    target = next(row.view.query.answer or "" for row in rows if row.view.score == "reliability")
    for row in rows:
        name, wanted, after = row.view.score, row.view.query.answer or "", row.after or ""
        if row.view.changes:
            right = float(exact_match(after, wanted))
            strict.append((name, right))
            if row.view.query.kind:
                # Portability questions of different kinds are not one score: steps the base model cannot take are 0
                strict.append((f"{name}[{row.view.query.kind}]", right))
            strict.append((f"{name}_f1", token_f1(after, wanted)))
        else:
            strict.append((name, float(after == row.before)))
        if name in ("near", "blind") and not exact_match(row.before, target):
            strict.append(("blindness", float(exact_match(after, target))))
        if row.legacy is not None:
            legacy += _legacy_values(row, row.legacy)
            if not row.view.changes and row.kl is not None:
                strict.append((f"{name}_kl", row.kl))
    answers: list[dict[str, Any]] = [
        {
            "score": row.view.score,
            "prompt": row.view.query.prompt,
            "wanted": row.view.query.answer if row.view.changes else row.before,
            "before": row.before,
            "after": row.after,
        }
        for row in rows
    ]
    return EditScores(mean_by_name(legacy), mean_by_name(strict), answers)


def _legacy_values(row: _Row, found: dict[str, float]) -> list[tuple[str, float]]:
    name = row.view.score
    if row.view.changes:
        return [(name, found["accuracy"])]
    values = [(name, found["top1"])]
    if name in ("text_locality", "image_locality"):
        values.append((f"{name}_top10", found["top10"]))
    return values
