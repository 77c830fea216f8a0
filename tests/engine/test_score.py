"""Scores of a model that anything may have changed, against those of a run of edits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.data import RecordErrors
from fastedit.deltas import EditDelta


def without_kl(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.endswith("_kl")}


@pytest.mark.parametrize("method", ["ft", "ike", "grace"])
def test_an_edited_model_has_the_scores_of_its_run(
    exact_model: EditableModel, edits: list[EditRequest], method: str
) -> None:
    settings = {"ft": {"steps": 10, "lr": 3e-3, "layers": 2}, "grace": {"steps": 10}, "ike": {"pool": edits[2:]}}
    run = fastedit.edit(exact_model, edits[:2], method, **settings[method])  # type: ignore[arg-type]
    for edit, delta, expected in zip(edits, run.deltas, run.edit_scores, strict=False):
        before = fastedit.score(exact_model, None, [edit])
        with fastedit.applied(exact_model, delta):
            after = fastedit.score(exact_model, None, [edit], reference=before)
        (found,) = after.edit_scores
        assert dict(found.legacy) == pytest.approx(dict(expected.legacy))
        routed = {"routed_in", "routed_in_wrongly"}
        assert dict(found.strict) == {k: v for k, v in without_kl(dict(expected.strict)).items() if k not in routed}
        for ours, theirs in zip(found.answers, expected.answers, strict=True):
            assert (ours["before"], ours["after"]) == (theirs["before"], theirs["after"])
        assert after.holds == [expected.strict["reliability"] == 1.0]


def merged(model: EditableModel, delta: EditDelta) -> torch.nn.Module:
    changed = copy.deepcopy(model.hf)
    fastedit.apply_delta(fastedit.wrap(changed, model.processor), delta)
    return changed


def test_a_stock_model_is_scored_and_stays_what_it_is(model: EditableModel, edits: list[EditRequest]) -> None:
    stock = copy.deepcopy(model.hf).train().requires_grad_(True)
    frozen = next(stock.parameters()).requires_grad_(False)
    before = fastedit.score(stock, model.processor, edits)
    assert all(module.training for module in stock.modules())
    assert [p.requires_grad for p in stock.parameters()].count(False) == 1
    assert not frozen.requires_grad
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = fastedit.score(stock, model.processor, edits, reference=before)
    assert [a["before"] for s in after.edit_scores for a in s.answers] == [
        a["after"] for s in before.edit_scores for a in s.answers
    ]
    assert after.scores["strict"]["text_locality"].mean < 1
    assert after.scores["legacy"]["image_locality_top10"].mean < 1


def test_without_a_reference_only_what_must_change_is_scored(model: EditableModel, edits: list[EditRequest]) -> None:
    found = fastedit.score(model, None, edits)
    assert set(found.scores["legacy"]) == {"reliability", "text_generality", "image_generality", "portability"}
    assert not any("locality" in name or name in ("near", "blind", "same") for name in found.scores["strict"])
    # Against itself nothing has changed
    again = fastedit.score(model, None, edits, reference=found)
    stay = ("text_locality", "image_locality", "near", "blind", "same")
    assert [again.scores["strict"][name].mean for name in stay] == [1.0] * 5
    assert [again.scores["legacy"][name].mean for name in stay] == [1.0] * 5


def test_scores_do_not_depend_on_what_is_asked_together(model: EditableModel, edits: list[EditRequest]) -> None:
    together = fastedit.score(model, None, edits)
    for number, edit in enumerate(edits):
        alone = fastedit.score(model, None, [edit])
        assert alone.edit_scores[0] == together.edit_scores[number]


def test_what_cannot_be_scored_is_refused(model: EditableModel, edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match=r"score: records must have at least one edit \(got none\)"):
        fastedit.score(model, None, [])
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1 \(got max_new_tokens=0\)"):
        fastedit.score(model, None, edits, max_new_tokens=0)
    with pytest.raises(RecordErrors, match="missing"):
        fastedit.score(model, None, [replace(edits[0], image="missing.png")])
    other = fastedit.score(model, None, edits[:1])
    with pytest.raises(ValueError, match="reference must be scores of the same records by a model of the same vocab"):
        fastedit.score(model, None, edits[:2], reference=other)
    with pytest.raises(ValueError, match="vocab_size=7"):
        fastedit.score(model, None, edits[:1], reference=replace(other, vocab_size=7))
    with pytest.raises(TypeError, match="processor must have"):
        fastedit.score(model.hf, None, edits[:1])
