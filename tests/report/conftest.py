"""Records of runs as they are saved, made up: pages need no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.evaluation import EditScores, Score, evaluation_views, summarise
from tests.engine.conftest import make_edits

#: What nobody wants to run.
HOSTILE = "\"'><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{7*7}}"


def answers_of(request: EditRequest, *, held: bool, disturbed: bool) -> list[dict[str, Any]]:
    """What an edit's questions are answered with: the new answer where it holds, and all the old ones but one."""
    answers = []
    for view in evaluation_views(request):
        before = f"old {view.score}"
        after = (view.query.answer or "") if held else "something else"
        if not view.changes:
            after = "another" if disturbed and view.score == "near" else before
        answers.append({"score": view.score, "prompt": view.query.prompt,
                        "wanted": view.query.answer if view.changes else before,
                        "before": before, "after": after})  # fmt: skip
    return answers


def scored(requests: Sequence[EditRequest], failing: Sequence[int]) -> list[EditScores]:
    """Scores of edits, those of the given numbers failed."""
    made = []
    for number, request in enumerate(requests):
        answers = answers_of(request, held=number not in failing, disturbed=number in failing)
        values: dict[str, float] = {}
        for answer in answers:
            right = answer["after"] == answer["wanted"]
            values[str(answer["score"])] = float(right)
        made.append(EditScores(values, values, answers))
    return made


def record_of(
    requests: Sequence[EditRequest],
    failing: Sequence[int] = (),
    *,
    method: str = "odedit+lora",
    checkpoints: bool = False,
) -> dict[str, Any]:
    """A run's record, as ``scores.json`` holds it."""
    edits = scored(requests, failing)
    tables = {
        protocol: {name: vars_of(score) for name, score in table.items()}
        for protocol, table in summarise(edits).items()
    }
    half = {"strict": {"reliability": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 2}}}
    return {
        "scores": tables,
        "checkpoints": {"1": half, "2": half} if checkpoints else {},
        "timing": {"edits_per_s": 4.25, "seconds": {"setup": 0.5, "tail_forward": 2.0, "evaluation": 1.0},
                   "steps": 60, "peak_memory_mib": 512.0, "nfu": 0.0321},
        "provenance": {
            "method": method, "seed": 0, "run": {"mode": "sequential" if checkpoints else "single"},
            "model": {"name": "pocket-llava", "parameters": 1_766_272},
            "machine": {"cpu": "Some CPU", "threads": 2}, "config": {"method": {"rank": 8}},
        },
        "edits": [
            {"id": request.id, "status": "converged", "steps": 20, "legacy": each.legacy, "strict": each.strict,
             "answers": each.answers}
            for request, each in zip(requests, edits, strict=True)
        ],
    }  # fmt: skip


def vars_of(score: Score) -> dict[str, Any]:
    """A score as plain values."""
    return {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}


def some_requests(count: int = 4) -> list[EditRequest]:
    """Requests with every part."""
    return make_edits(count)


@pytest.fixture(scope="session")
def run_of_three() -> fastedit.Run:
    """A run as it comes out of the engine, fitted too little to hold everywhere."""
    return fastedit.edit(fastedit.load("random:llava-tiny"), make_edits(3), "lora", steps=3, rank=2)
