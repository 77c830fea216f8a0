"""From what was answered to scores: of tokens, of questions, of an edit under both protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastedit.evaluation.metrics import METRICS, AskedRow
from fastedit.evaluation.protocol import PROTOCOLS, EditScores, mean_by_name
from fastedit.ops import risk, topk_agreement

TOP_K = 10


def token_scores(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Legacy scores and KL(before || after) of every token (T,), float64, of logits (T, V) and labels (T,).

    Where logits are not finite (NaN or inf, or all of them -inf) the edited model is never right, and what either model
    says counts as changed: an agreement of 0, a KL of inf.
    """
    wrong = ~after.amax(-1).isfinite()
    broken = wrong | ~before.amax(-1).isfinite()
    top1, top10 = topk_agreement(before, after, TOP_K)
    tokens = torch.arange(len(labels), device=labels.device)
    divergence = risk(after, before, tokens, len(labels), "forward_kl")[0].double()
    right = (after.argmax(-1) == labels) & ~wrong
    return {
        "accuracy": right.double(),
        "top1": top1.masked_fill(broken, 0.0),
        "top10": top10.masked_fill(broken, 0.0),
        "kl": divergence.masked_fill(broken | divergence.isnan(), math.inf),
    }


def row_means(values: Tensor, row_of_token: Tensor, n_rows: int) -> list[float]:
    """Means over the tokens of every row."""
    total = values.new_zeros(n_rows).index_add_(0, row_of_token, values)
    means: list[float] = (total / torch.bincount(row_of_token, minlength=n_rows)).tolist()
    return means


def edit_scores(rows: Sequence[AskedRow]) -> EditScores:
    """Both protocols' values of one edit from its rows."""
    target = next(row.view.query.answer or "" for row in rows if row.view.score == "reliability")
    values = {
        protocol: mean_by_name(
            [
                (column.format(score=row.view.score, kind=row.view.query.kind), value)
                for row in rows
                for column, metric in METRICS[protocol].items()
                if (value := metric(row, target)) is not None
            ]
        )
        for protocol in PROTOCOLS
    }
    return EditScores(values["legacy"], values["strict"], [_answer(row) for row in rows])


def _answer(row: AskedRow) -> dict[str, Any]:
    notes: dict[str, Any] = {} if row.acted is None else {"acted": row.acted}
    if row.not_finite is not None:
        notes["not_finite"] = row.not_finite
    return notes | {
        "score": row.view.score,
        "prompt": row.view.query.prompt,
        "wanted": row.view.query.answer if row.view.changes else row.before,
        "before": row.before,
        "after": row.after,
    }
