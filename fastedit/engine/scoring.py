"""From what was answered to scores: of tokens, of questions, of an edit under both protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.evaluation import EditScores, EvaluationView, exact_match, mean_by_name, token_f1
from fastedit.ops import risk, topk_agreement

TOP_K = 10


@dataclass
class AskedRow:
    """One question of one edit, with what was found."""

    edit: int
    view: EvaluationView
    before: str = ""
    after: str = ""
    legacy: dict[str, float] | None = None
    kl: float | None = None
    # Whether the router let an edit act; None where there is none
    acted: bool | None = None


def token_scores(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Legacy scores and KL(before || after) of every token (T,), float64, of logits (T, V) and labels (T,)."""
    top1, top10 = topk_agreement(before, after, TOP_K)
    tokens = torch.arange(len(labels), device=labels.device)
    divergence = risk(after, before, tokens, len(labels), "forward_kl")[0].double()
    # a diverged model is never right
    broken = divergence.isnan()
    right = (after.argmax(-1) == labels) & ~broken
    return {
        "accuracy": right.double(),
        "top1": top1,
        "top10": top10,
        "kl": divergence.masked_fill(broken, math.inf),
    }


def row_means(values: Tensor, row_of_token: Tensor, n_rows: int) -> list[float]:
    """Means over the tokens of every row."""
    total = values.new_zeros(n_rows).index_add_(0, row_of_token, values)
    means: list[float] = (total / torch.bincount(row_of_token, minlength=n_rows)).tolist()
    return means


def edit_scores(rows: Sequence[AskedRow]) -> EditScores:
    """Both protocols' values of one edit from its rows."""
    legacy: list[tuple[str, float]] = []
    strict: list[tuple[str, float]] = []
    target = next(row.view.query.answer or "" for row in rows if row.view.score == "reliability")
    for row in rows:
        name, wanted, after = row.view.score, row.view.query.answer or "", row.after
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
        if row.acted is not None:
            # A router's true and false positive rates
            strict.append(("routed_in" if row.view.changes else "routed_in_wrongly", float(row.acted)))
        if row.legacy is not None:
            legacy += _legacy_values(row, row.legacy)
            if not row.view.changes and row.kl is not None:
                strict.append((f"{name}_kl", row.kl))
    answers: list[dict[str, Any]] = [
        ({} if row.acted is None else {"acted": row.acted})
        | {
            "score": row.view.score,
            "prompt": row.view.query.prompt,
            "wanted": row.view.query.answer if row.view.changes else row.before,
            "before": row.before,
            "after": row.after,
        }
        for row in rows
    ]
    return EditScores(mean_by_name(legacy), mean_by_name(strict), answers)


def _legacy_values(row: AskedRow, found: dict[str, float]) -> list[tuple[str, float]]:
    name = row.view.score
    if row.view.changes:
        return [(name, found["accuracy"])]
    values = [(name, found["top1"])]
    if name in ("text_locality", "image_locality"):
        values.append((f"{name}_top10", found["top10"]))
    return values
