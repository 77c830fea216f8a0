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
    # Whether logits that were not finite came up, in what was fed or answered
    broken_before: bool = False
    broken_after: bool = False

    @property
    def not_finite(self) -> str | None:
        """ "before", "after" or "both": whose logits were not finite; None where all were."""
        if self.broken_before and self.broken_after:
            return "both"
        return "before" if self.broken_before else "after" if self.broken_after else None


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
    legacy: list[tuple[str, float]] = []
    strict: list[tuple[str, float]] = []
    target = next(row.view.query.answer or "" for row in rows if row.view.score == "reliability")
    for row in rows:
        name, wanted, after = row.view.score, row.view.query.answer or "", row.after
        if row.view.changes:
            right = float(exact_match(after, wanted) and not row.broken_after)
            strict.append((name, right))
            if row.view.query.kind:
                # Portability questions of different kinds are not one score: steps the base model cannot take are 0
                strict.append((f"{name}[{row.view.query.kind}]", right))
            strict.append((f"{name}_f1", 0.0 if row.broken_after else token_f1(after, wanted)))
        else:
            strict.append((name, float(after == row.before and row.not_finite is None)))
        if name in ("near", "blind") and not exact_match(row.before, target):
            strict.append(("blindness", float(exact_match(after, target) and not row.broken_after)))
        if row.acted is not None:
            # A router's true and false positive rates
            strict.append(("routed_in" if row.view.changes else "routed_in_wrongly", float(row.acted)))
        fed, divergence = row.legacy, row.kl
        if fed is None and row.not_finite is not None:
            # Nothing could be fed that the unedited model says
            fed, divergence = dict.fromkeys(("accuracy", "top1", "top10"), 0.0), math.inf
        if fed is not None:
            legacy += _legacy_values(row, fed)
            if not row.view.changes and divergence is not None:
                strict.append((f"{name}_kl", divergence))
    answers: list[dict[str, Any]] = [
        ({} if row.acted is None else {"acted": row.acted})
        | ({} if row.not_finite is None else {"not_finite": row.not_finite})
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
