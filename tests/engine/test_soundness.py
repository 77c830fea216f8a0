"""Logits that are no numbers: wrong and changed under every score, and said; a base model of them is refused."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine import Run
from fastedit.evaluation.scoring import token_scores
from fastedit.fitting.solver import FitOutcome
from tests.engine.test_editing import run

#: Scores of what must stay, and those of them that are a share.
STAY = ("text_locality", "image_locality", "near", "blind", "same")


@pytest.fixture
def fresh() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


class Broken(nn.Module):
    """A head whose logits are spoiled while ``when`` is."""

    def __init__(self, head: nn.Module, value: float) -> None:
        super().__init__()
        self.head, self.value, self.when = head, value, True
        self.out_features = head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        if self.when:
            logits = logits.clone()
            logits[..., 3] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["lora", "serac", "grace"])
def test_a_base_model_without_finite_logits_is_refused_before_any_work(
    fresh: EditableModel, edits: list[EditRequest], value: float, method: str
) -> None:
    from tests.test_conformance import trained

    given: dict[str, Any] = trained(fresh, method)
    fresh.adapter.head = Broken(fresh.adapter.head, value)
    message = r"the logits of the model are finite \(got NaN or inf for all of the first 3 questions, before any edit"
    with pytest.raises(ValueError, match=message):
        fastedit.edit(fresh, edits[:3], method, **given)


def test_one_broken_weight_is_found_too(fresh: EditableModel, edits: list[EditRequest]) -> None:
    weight = fresh.adapter.text.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the logits of the model are finite"):
        run(fresh, edits[:1])


@pytest.fixture
def spoiled_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an edited model says while it is scored is NaN."""
    from fastedit.engine.evaluate import Evaluator

    real = Evaluator._after

    def after(self: Evaluator, *args: Any, **named: Any) -> Any:
        head = Broken(self.model.adapter.head, math.nan)
        with monkeypatch.context() as patched:
            patched.setattr(self.model.adapter, "head", head)
            states, answers = real(self, *args, **named)
        return {row: torch.full_like(state, math.nan) for row, state in states.items()}, answers

    monkeypatch.setattr(Evaluator, "_after", after)


def assert_all_wrong(made: Run) -> None:
    for protocol in ("legacy", "strict"):
        for name, score in made.scores[protocol].items():
            expected = math.inf if name.endswith("_kl") else 0.0
            assert score.mean == expected, (protocol, name)
    assert {f"{name}_kl" for name in STAY} <= set(made.scores["strict"])
    assert {"reliability", *STAY, "text_locality_top10"} <= set(made.scores["legacy"])


@pytest.mark.usefixtures("spoiled_after")
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_an_edited_model_without_finite_logits_is_wrong_and_changed(
    fresh: EditableModel, edits: list[EditRequest], mode: str, tmp_path: Path
) -> None:
    with pytest.warns(RuntimeWarning, match=r"not finite in 18 of 18 answers, in 0 before the edit"):
        made = run(fresh, edits[:2], steps=1, evaluate=True, mode=mode)
    assert_all_wrong(made)
    assert {answer["not_finite"] for scores in made.edit_scores for answer in scores.answers} == {"after"}
    assert made.provenance["not_finite"] == {"answers": 18, "before": 0, "of": 18}
    again = Run.load(made.save(tmp_path / "run"))
    assert [scores.not_finite for scores in again.edit_scores] == [9, 9]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_breaks_on_some_questions_is_scored_and_told(
    fresh: EditableModel, edits: list[EditRequest], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models break on questions without an image: text locality and blind probes."""
    from fastedit.backbone.generation import Reader

    real = Reader.read

    def read(self: Reader) -> Tensor:
        last = real(self)
        blind = [row for row, image in enumerate(self._encoded.images) if image is None]
        last[blind] = value
        return last

    monkeypatch.setattr(Reader, "read", read)
    for _ in range(2):
        # The second time answers are remembered
        with pytest.warns(RuntimeWarning, match=r"not finite in 4 of 18 answers, in 4 before the edit"):
            made = run(fresh, edits[:2], steps=0, evaluate=True)
        strict, legacy = made.scores["strict"], made.scores["legacy"]
        for name in ("text_locality", "blind"):
            assert (strict[name].mean, strict[f"{name}_kl"].mean) == (0.0, math.inf)
            assert legacy[name].mean < 1.0
        for name in ("image_locality", "near", "same"):
            assert (strict[name].mean, strict[f"{name}_kl"].mean, legacy[name].mean) == (1.0, 0.0, 1.0)
        marks = {answer["score"]: answer.get("not_finite") for answer in made.edit_scores[0].answers}
        assert {name for name, mark in marks.items() if mark} == {"text_locality", "blind"}
        assert marks["blind"] == "both"


def test_a_run_without_such_logits_says_so(fresh: EditableModel, edits: list[EditRequest]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        made = run(fresh, edits[:1], steps=0, evaluate=True)
    assert made.provenance["not_finite"] == {"answers": 0, "before": 0, "of": 9}
    assert not any("not_finite" in answer for answer in made.edit_scores[0].answers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_tokens_of_logits_that_are_no_numbers(value: float, where: str) -> None:
    before = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after, labels = before.clone(), before.argmax(-1)
    for name, logits in (("before", before), ("after", after)):
        if where in (name, "both"):
            # Beside the label: the argmax is what it was, or it is the broken one in both
            logits[:2, (int(labels[0]) + 1) % 30] = value
    found = {name: column.tolist() for name, column in token_scores(before, after, labels).items()}
    right = [1.0] * 4 if where == "before" else [0.0, 0.0, 1.0, 1.0]
    assert found["accuracy"] == right
    assert found["top1"] == found["top10"] == [0.0, 0.0, 1.0, 1.0]
    assert found["kl"] == [math.inf, math.inf, 0.0, 0.0]


def test_tokens_that_are_ruled_out_are_numbers() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 4:9] = -math.inf
    found = token_scores(logits, logits.clone(), logits.argmax(-1))
    for name in ("accuracy", "top1", "top10"):
        assert found[name].tolist() == [1.0] * 3
    logits[0] = -math.inf
    assert token_scores(logits, logits.clone(), logits.argmax(-1))["top1"].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("method", ["ft", "lora", "odedit+lora", "tpatcher"])
def test_a_rate_that_is_absurd_is_no_ordinary_end(fresh: EditableModel, edits: list[EditRequest], method: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"of 2 fits diverged .* were diverging"):
        made = run(fresh, edits[:2], method, lr=1e9, steps=5, clip=None)
    assert {outcome.status for outcome in made.outcomes} <= {"diverging", "diverged"}
    for delta in made.deltas:
        assert all(bool(tensor.isfinite().all()) for tensor in delta.tensors.values())


def test_what_a_method_computes_that_is_no_number_changes_nothing(
    fresh: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastedit.methods.mend import MEND
    from tests.test_conformance import run as conform

    real = MEND.compute

    def compute(*args: Any) -> Any:
        first, *others = real(*args)
        spoiled = {name: tensor * math.nan for name, tensor in first.tensors.items()}
        return [replace(first, tensors=spoiled), *others]

    monkeypatch.setattr(MEND, "compute", compute)
    with pytest.warns(RuntimeWarning, match="1 of 2 fits diverged"):
        made = conform(fresh, edits[:2], "mend")
    assert [outcome.status for outcome in made.outcomes] == ["diverged", "computed"]
    assert not any(bool(tensor.any()) for tensor in made.deltas[0].tensors.values())
    question = edits[0].image, edits[0].prompt
    base = fresh.answer(*question)
    with fastedit.applied(fresh, made.deltas[0]):
        assert fresh.answer(*question) == base
    made.save(tmp_path / "run")


def test_outcomes_keep_their_losses_on_disk(fresh: EditableModel, edits: list[EditRequest], tmp_path: Path) -> None:
    made = run(fresh, edits[:2], steps=3)
    outcome = made.outcomes[0]
    assert outcome.best_nll <= outcome.nll < outcome.first_nll
    assert list(Run.load(made.save(tmp_path / "run")).outcomes) == list(made.outcomes)
    assert FitOutcome("computed", 0, 0.0, 0.0).status == "computed"


def test_an_answer_of_such_logits_warns(fresh: EditableModel, edits: list[EditRequest]) -> None:
    fresh.adapter.head = Broken(fresh.adapter.head, math.nan)
    with pytest.warns(RuntimeWarning, match="the logits were not finite in 1 of 1 answers"):
        assert fresh.answer(edits[0].image, edits[0].prompt) == ""
