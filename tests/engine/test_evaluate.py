"""Scores against the stock model asked one question at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fastedit
from benchmarks.baselines.metrics import kl_divergence, ranked_agreement, token_accuracy, top_ids
from fastedit import EditRequest, Probe, Query
from fastedit.backbone import EditableModel
from fastedit.evaluation import MUST_CHANGE, MUST_STAY, evaluation_views
from fastedit.evaluation.scoring import row_means, token_scores
from fastedit.requests import PARAPHRASE_KINDS, PROBE_KINDS, WORDINGS


@torch.no_grad()
def stock_logits(model: EditableModel, query: Query) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, V) at the answer positions and the labels (M,), by the stock model's own forward on one row."""
    encoded = model.encode([query], answers=True)
    out = model.hf(**encoded.model_inputs).logits[0]
    return out[encoded.label_mask[0]], encoded.labels[encoded.label_mask]


def test_legacy_scores_equal_the_stock_forward(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    run = fastedit.edit(exact_model, edits[:3], "ft", steps=10, lr=3e-3, layers=2, batch_size=3)
    for edit, delta, scored in zip(edits, run.deltas, run.edit_scores, strict=False):
        expected: dict[str, list[float]] = {}
        for view, answer in zip(evaluation_views(edit), scored.answers, strict=True):
            # Without a reference answer the unedited model's own is fed
            query = dataclasses.replace(view.query, answer=view.query.answer or answer["before"])
            before, labels = stock_logits(exact_model, query)
            with fastedit.applied(exact_model, delta):
                after, _ = stock_logits(exact_model, query)
            if view.changes:
                value = (after.argmax(-1) == labels).double().mean()
            else:
                value = (after.argmax(-1) == before.argmax(-1)).double().mean()
                top = (after.topk(10).indices == before.topk(10).indices).double().mean()
                if view.score.endswith("locality"):
                    expected.setdefault(f"{view.score}_top10", []).append(float(top))
            expected.setdefault(view.score, []).append(float(value))
        assert scored.legacy.keys() == expected.keys()
        for name, values in expected.items():
            assert scored.legacy[name] == pytest.approx(sum(values) / len(values)), name


def test_generated_answers_equal_one_question_at_a_time(model: EditableModel, edits: list[EditRequest]) -> None:
    run = fastedit.edit(model, edits[:3], "lora", steps=20, lr=1e-2, batch_size=3)
    for edit, delta, scored in zip(edits, run.deltas, run.edit_scores, strict=False):
        views = evaluation_views(edit)
        before = [model.answer(v.query.image, v.query.prompt, max_new_tokens=48) for v in views]
        with fastedit.applied(model, delta):
            after = [model.answer(v.query.image, v.query.prompt, max_new_tokens=48) for v in views]
        assert [a["before"] for a in scored.answers] == before
        assert [a["after"] for a in scored.answers] == after
        for view, a in zip(views, after, strict=True):
            if not view.changes:
                continue
            assert scored.strict[view.score] in (0.0, 1.0)
            assert scored.strict[view.score] == float(a == view.query.answer)
        stay = [float(a == b) for v, b, a in zip(views, before, after, strict=True) if v.score == "near"]
        assert scored.strict["near"] == pytest.approx(sum(stay) / len(stay))


def asked_in_every_way(edit: EditRequest) -> EditRequest:
    """With a paraphrase of every kind, and a probe of every kind in both wordings."""
    paraphrases = tuple(Query(f"{edit.prompt} {kind}", edit.image, kind=kind) for kind in PARAPHRASE_KINDS)
    probes = tuple(
        Probe(
            kind,
            f"{edit.prompt} {kind} {wording}",
            None if kind in ("blind", "text_locality") else edit.image_locality_image,
            wording=wording,
        )
        for kind in PROBE_KINDS
        for wording in WORDINGS
    )
    return dataclasses.replace(edit, paraphrases=paraphrases, probes=(*edit.probes, *probes))


def test_every_score_is_reported_with_an_interval(model: EditableModel, edits: list[EditRequest]) -> None:
    edits = [asked_in_every_way(edit) for edit in edits]
    run = fastedit.edit(model, edits, "ft", steps=10, batch_size=4)
    for protocol in ("legacy", "strict"):
        for name in (*MUST_CHANGE, *MUST_STAY):
            score = run.scores[protocol][name]
            assert score.n == len(edits)
            assert 0 <= score.low <= score.mean <= score.high <= 1
    assert "reliability_gap" in run.scores["strict"]
    assert "blindness" in run.scores["strict"]
    assert run.scores["strict"]["portability[entailed]"] == run.scores["strict"]["portability"]


def test_the_unedited_model_is_asked_once(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.engine.evaluate import Evaluator
    from fastedit.engine.profiling.timing import PhaseTimer

    result = fastedit.edit(model, edits[:2], "ft", steps=2, evaluate=False)
    evaluator = Evaluator(model, result.deltas[0].spec, PhaseTimer())
    from fastedit.deltas import stack

    decoded = decoded_rows(monkeypatch)
    model.reference_answers.clear()
    first = evaluator.scores(edits[:2], stack(list(result.deltas)))
    before, after = decoded
    again = evaluator.scores(edits[:2], stack(list(result.deltas)))
    assert first == again
    assert before > 0
    assert after > 0
    assert decoded[2:] == [0, after], "the second time only the edited model is asked"


def decoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decoding goes on with, from now on."""
    from fastedit.backbone.generation import Reader

    counts: list[int] = []
    original = Reader.decode

    def counting(self: Reader, first: dict[int, int], *rest: Any) -> dict[int, list[int]]:
        counts.append(len(first))
        return original(self, first, *rest)

    monkeypatch.setattr(Reader, "decode", counting)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_token_scores_are_the_metrics_of_the_evaluation_package(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(3)
    before = torch.randn(4, 3, 50, generator=make).to(dtype)
    after = (before + 0.2 * torch.randn(4, 3, 50, generator=make).to(dtype)).to(dtype)
    after[1, 1, 7] = float("nan")
    after[2, 0] = 1.0  # ties: the lowest id is first
    labels = torch.randint(50, (4, 3), generator=make)
    labels[0], labels[2, 0] = after[0].argmax(-1), 0
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, True, True]])
    found = token_scores(before[mask], after[mask], labels[mask])
    means = {name: row_means(values, mask.nonzero()[:, 0], 4) for name, values in found.items()}
    best_before, best_after = top_ids(before, 10), top_ids(after, 10)
    goal = {
        "accuracy": token_accuracy(best_after[..., 0], labels, mask),
        "top1": ranked_agreement(best_before[..., :1], best_after[..., :1], mask),
        "top10": ranked_agreement(best_before, best_after, mask),
        "kl": kl_divergence(before, after, mask),
    }
    for name, values in goal.items():
        assert means[name] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-7), name
    assert means["kl"][1] == float("inf")


def test_answers_are_decoded_only_where_they_are_not_the_one_that_was_fed(
    exact_model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(exact_model).generate
    settings = {"steps": 10, "lr": 3e-3, "layers": 2, "batch_size": 3}
    # what the model says before: fed as the expected answer, it is what greedy decoding gives
    said = [exact_model.answer(edit.image, edit.locality_prompt, max_new_tokens=48) for edit in edits[:3]]
    known = [dataclasses.replace(e, locality_answer=text) for e, text in zip(edits[:3], said, strict=True) if text]
    assert known
    plain = fastedit.edit(exact_model, known, "ft", **settings)
    decoded = decoded_rows(monkeypatch)
    exact_model.forget()
    again = fastedit.edit(exact_model, known, "ft", **settings)
    questions = sum(len(evaluation_views(edit)) for edit in known)
    before, after = decoded
    assert before + after < 2 * questions, "what was fed and is the answer is not decoded"
    for first, second in zip(plain.edit_scores, again.edit_scores, strict=True):
        assert first.answers == second.answers
    # every answer, fed or decoded, is the one that decoding alone gives
    for edit, delta, scored in zip(known, again.deltas, again.edit_scores, strict=True):
        queries = [view.query for view in evaluation_views(edit)]
        assert [a["before"] for a in scored.answers] == real(exact_model, queries, max_new_tokens=48)
        with fastedit.applied(exact_model, delta):
            assert [a["after"] for a in scored.answers] == real(exact_model, queries, max_new_tokens=48)
