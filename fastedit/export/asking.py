"""The questions of edits asked twice: with the deltas as they were fitted, and with what an export made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.context import on_frozen_model
from fastedit.deltas import EditDelta, accumulate, stack
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import EditScores, summarise
from fastedit.requests import EditRequest

#: Edits whose deltas are held at a time.
BATCH = 16


@on_frozen_model
def compare_answers(
    model: EditableModel,
    requests: Sequence[EditRequest],
    exact: Sequence[EditDelta],
    written: Callable[[Sequence[EditDelta]], Sequence[EditDelta]],
    *,
    together: bool,
) -> dict[str, Any]:
    """What a change of deltas changed in scores and answers.

    Args:
        requests: n edits. exact: their deltas; they may lie in files.
        written: gives what became of some of them, in order; where they act together it is given all, and may give one.
        together: all of them act at once; else each for itself, a batch at a time.
    Returns:
        "edits": n; "scores": name -> {"exact", "written"}, means of the strict protocol; "changed": the answers that
        differ, with request, score, prompt and both answers.
    """
    before = _scores(model, requests, exact, list, together)
    after = _scores(model, requests, exact, written, together)
    means = [{name: score.mean for name, score in summarise(scored)["strict"].items()} for scored in (before, after)]
    changed = [
        {
            "request": request.id,
            "score": first["score"],
            "prompt": first["prompt"],
            "exact": first["after"],
            "written": second["after"],
        }
        for request, one, other in zip(requests, before, after, strict=True)
        for first, second in zip(one.answers, other.answers, strict=True)
        if first["after"] != second["after"]
    ]
    scores = {name: {"exact": value, "written": means[1][name]} for name, value in means[0].items()}
    return {"edits": len(requests), "scores": scores, "changed": changed}


def _scores(
    model: EditableModel,
    requests: Sequence[EditRequest],
    deltas: Sequence[EditDelta],
    acting: Callable[[Sequence[EditDelta]], Sequence[EditDelta]],
    together: bool,
) -> list[EditScores]:
    scored: list[EditScores] = []
    whole = acting(deltas) if together else []
    if len(whole) > 1:
        whole = [accumulate(whole)]
    for start in range(0, len(requests), BATCH):
        stacked = stack(whole or acting(deltas[start : start + BATCH]), device=model.device)
        evaluator = Evaluator(model, stacked.spec, PhaseTimer(model.device))
        scored += evaluator.scores(requests[start : start + BATCH], stacked, shared=together)
    return scored
