"""The two scoring protocols: which questions are asked of an edit, and what a right outcome is.

``legacy`` is what published numbers use: the answer is fed to the model and each token's argmax compared (teacher
forcing); locality is agreement of the argmax, and of the rank-ordered ten best, before and after the edit.
``strict`` lets the model generate: the whole answer must match after VQA normalisation; locality is an unchanged
answer.
Both read the same questions, answer positions only. Means come with bootstrap intervals over edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastedit.evaluation.bootstrap import Score, bootstrap
from fastedit.requests import PARAPHRASE_KINDS, PROBE_KINDS, EditRequest, Query

#: What the protocols are, for provenance.
PROTOCOLS: Mapping[str, str] = {
    "legacy": "teacher-forced token accuracy on answer positions (end token included); locality: argmax agreement, and "
    "rank-ordered top-10 agreement as *_top10, on the positions of the reference answer; logits that are not finite "
    "count as wrong and changed",
    "strict": "greedy generation; exact match after VQA normalisation; locality and probes: the generated answer is "
    "unchanged; *_kl: KL(before || after) on answer positions; blindness: share of near and blind probes answered with "
    "the target; logits that are not finite count as wrong and changed",
}

#: Scores in the order in which they are shown.
MUST_CHANGE = ("reliability", "text_generality", "text_generality_unseen", "image_generality",
               "image_generality_unseen", "polite", "portability")  # fmt: skip
MUST_STAY = ("text_locality", "text_locality_unseen", "image_locality", "image_locality_unseen", "near", "near_unseen",
             "blind", "same", "same_unseen", "sibling", "negated", "contrary")  # fmt: skip
#: By score, its twin: the same questions in words that nothing was trained on.
UNSEEN: Mapping[str, str] = {
    name.removesuffix("_unseen"): name for name in (*MUST_CHANGE, *MUST_STAY) if name.endswith("_unseen")
}
#: Scores of questions that only measure: nothing is fitted on them, and no export is for training with them in it.
HELD_OUT: frozenset[str] = frozenset((*PARAPHRASE_KINDS, *(f"{kind}_unseen" for kind in PROBE_KINDS)))


@dataclass(frozen=True)
class EvaluationView:
    """One question of the evaluation of one edit.

    Args:
        score: the score it counts for.
        query: with the wanted answer; for questions that must stay, the reference answer where one is known.
        changes: True when the answer must become ``query.answer``, False when it must stay what it was.
    """

    score: str
    query: Query
    changes: bool


@dataclass(frozen=True)
class EditScores:
    """One edit's values under both protocols (absent scores are absent) and its generated answers.

    ``answers`` is a list of {score, prompt, wanted, before, after}, with "acted" where a router decides, and with
    "not_finite" where logits were not: "before" the edit, "after" it or "both". Those count as wrong and as changed.
    """

    legacy: Mapping[str, float]
    strict: Mapping[str, float]
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def not_finite(self) -> int:
        """How many answers came of logits that were not finite, before or after the edit."""
        return sum("not_finite" in answer for answer in self.answers)


def evaluation_views(request: EditRequest) -> list[EvaluationView]:
    """Every question that an edit is scored on; parts that the request lacks are left out."""
    target = request.target
    views = [EvaluationView("reliability", Query(request.prompt, request.image, target), True)]
    if request.rephrase is not None:
        views.append(EvaluationView("text_generality", Query(request.rephrase, request.image, target), True))
    if request.image_rephrase is not None:
        views.append(EvaluationView("image_generality", Query(request.prompt, request.image_rephrase, target), True))
    for each in request.paraphrases:
        views.append(EvaluationView(each.kind, Query(each.prompt, each.image, each.answer or target), True))
    views += [EvaluationView("portability", query, True) for query in request.portability if query.answer is not None]
    if request.locality_prompt is not None:
        query = Query(request.locality_prompt, None, request.locality_answer)
        views.append(EvaluationView("text_locality", query, False))
    if request.image_locality_prompt is not None:
        query = Query(request.image_locality_prompt, request.image_locality_image, request.image_locality_answer)
        views.append(EvaluationView("image_locality", query, False))
    views += [EvaluationView(probe.score, probe.query, False) for probe in request.probes]
    return views


def mean_by_name(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the values that share a name, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def summarise(scored: Sequence[EditScores], *, seed: int = 0) -> dict[str, dict[str, Score]]:
    """Mean and interval of every score over edits, per protocol, and ``gap`` (legacy minus strict) where both have it.

    An edit without a score (it lacks the question) does not count for that score.
    """
    tables: dict[str, dict[str, Score]] = {}
    for protocol in PROTOCOLS:
        per_edit = [dict(getattr(edit, protocol)) for edit in scored]
        if protocol == "strict":
            for values, edit in zip(per_edit, scored, strict=True):
                values |= {
                    f"{k}_gap": edit.legacy[k] - v
                    for k, v in edit.strict.items()
                    if k in MUST_CHANGE and k in edit.legacy
                }
        names = dict.fromkeys(name for values in per_edit for name in values)
        tables[protocol] = {name: bootstrap([values.get(name) for values in per_edit], seed=seed) for name in names}
    return tables
