"""The engine's promises: a batch equals its singles, the base model stays what it is, bad input stops before work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel, weights_hash
from fastedit.deltas import EditDelta
from fastedit.engine import Run

METHODS = ["ft", "lora", "kl+lora", "odedit+ft", "odedit+lora"]


def largest_difference(a: list[EditDelta], b: list[EditDelta]) -> float:
    pairs = [(x.tensors[k], y.tensors[k]) for x, y in zip(a, b, strict=True) for k in x.tensors]
    return max(float((x - y).abs().max()) for x, y in pairs)


def run(model: EditableModel, edits: list[EditRequest], method: str = "lora", **settings: Any) -> Run:
    settings = {"steps": 6, "lr": 1e-2, "evaluate": False, **settings}
    return fastedit.edit(model, edits, method, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_singles(exact_model: EditableModel, edits: list[EditRequest], method: str) -> None:
    together, alone = (run(exact_model, edits, method, batch_size=size, layers=2) for size in (5, 1))
    assert largest_difference(list(together.deltas), list(alone.deltas)) < 1e-8
    assert max(delta.norm for delta in together.deltas) > 0
    for a, b in zip(together.outcomes, alone.outcomes, strict=True):
        assert (a.status, a.steps) == (b.status, b.steps)
        assert a.loss == pytest.approx(b.loss, rel=1e-9)


def test_edits_that_stop_early_leave_the_others_alone(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    settings = {"steps": 40, "lr": 3e-3, "stop_loss": 0.6, "layers": 2}
    together, alone = (run(exact_model, edits, "ft", batch_size=size, **settings) for size in (5, 1))
    steps = [outcome.steps for outcome in together.outcomes]
    assert len(set(steps)) > 1, "the case needs edits that stop at different steps"
    assert steps == [outcome.steps for outcome in alone.outcomes]
    assert largest_difference(list(together.deltas), list(alone.deltas)) < 1e-8


def test_reference_rows_follow_the_edits_that_stay(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    settings = {"steps": 40, "lr": 3e-3, "stop_loss": 0.8, "layers": 2}
    together, alone = (run(exact_model, edits, "kl+ft", batch_size=size, **settings) for size in (5, 1))
    assert len({outcome.steps for outcome in together.outcomes}) > 1
    assert largest_difference(list(together.deltas), list(alone.deltas)) < 1e-8


def test_order_of_independent_edits_does_not_matter(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    forward = run(exact_model, edits, batch_size=3)
    backward = run(exact_model, edits[::-1], batch_size=3)
    assert largest_difference(list(forward.deltas), list(backward.deltas)[::-1]) < 1e-8


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_the_model_is_bit_identical_afterwards(model: EditableModel, edits: list[EditRequest], mode: str) -> None:
    before = weights_hash(model.hf)
    answer = model.answer(edits[0].image, edits[0].prompt)
    run(model, edits[:3], "odedit+ft", mode=mode, evaluate=True)
    assert weights_hash(model.hf) == before
    assert model.answer(edits[0].image, edits[0].prompt) == answer
    linears = [module for module in model.hf.modules() if isinstance(module, torch.nn.Linear)]
    assert not any(module._forward_hooks for module in linears)


def test_an_edit_takes_and_is_taken_back(model: EditableModel, edits: list[EditRequest]) -> None:
    result = run(model, edits[:2], "ft", steps=60, layers=2)
    first = edits[0]
    before = model.answer(first.image, first.prompt)
    with fastedit.applied(model, result.deltas[0]):
        assert model.answer(first.image, first.prompt) == first.target
    assert model.answer(first.image, first.prompt) == before
    assert before != first.target


def test_a_delta_is_refused_by_another_model(model: EditableModel, edits: list[EditRequest]) -> None:
    result = run(model, edits[:1], steps=1)
    other = fastedit.load("random:qwen2vl-tiny")
    with (
        pytest.raises(ValueError, match="a delta belongs to the model it was fitted on"),
        fastedit.applied(other, result.deltas[0]),
    ):
        pass


def test_sequential_edits_build_on_each_other(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    first = run(exact_model, edits[:1], "ft", mode="sequential", evaluate=True)
    both = run(exact_model, edits[:2], "ft", mode="sequential", evaluate=True)
    single = run(exact_model, edits[:2], "ft")
    assert largest_difference(list(first.deltas), list(both.deltas)[:1]) == 0
    assert largest_difference(list(single.deltas)[1:], list(both.deltas)[1:]) > 1e-4
    # Scored after the last edit: what the second edit did to the first shows
    kl = [r.edit_scores[0].strict["text_locality_kl"] for r in (first, both)]
    assert kl[0] != kl[1]
    assert both.scores["legacy"]["reliability"].n == 2


def test_sequential_scores_are_those_of_the_joint_delta(model: EditableModel, edits: list[EditRequest]) -> None:
    result = run(model, edits[:3], "lora", mode="sequential", evaluate=True, steps=15)
    with fastedit.applied(model, result.deltas):
        answers = [model.answer(edit.image, edit.prompt, max_new_tokens=48) for edit in edits[:3]]
    scored = [next(a["after"] for a in s.answers if a["score"] == "reliability") for s in result.edit_scores]
    assert scored == answers


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_a_sequence_is_never_put_together_on_the_host(
    exact_model: EditableModel, edits: list[EditRequest], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(deltas: Sequence[EditDelta]) -> EditDelta:
        raise AssertionError(f"{len(deltas)} deltas are copied for the next edit")

    settings: dict[str, Any] = {"mode": "sequential", "steps": 4, "stop_loss": None}
    with monkeypatch.context() as patched:
        patched.setattr("fastedit.methods.base.accumulate", refused)
        made = run(exact_model, edits[:3], method, **settings)
    # As where all before it are one delta on the host
    monkeypatch.setattr("fastedit.engine.schedule.grows", lambda _delta: False)
    again = run(exact_model, edits[:3], method, **settings)
    assert largest_difference(list(made.deltas), list(again.deltas)) < 1e-8
    assert [delta.fitted_on for delta in made.deltas[:2]] == [delta.fitted_on for delta in again.deltas[:2]]


def test_a_run_comes_back_from_disk(model: EditableModel, edits: list[EditRequest], tmp_path: Path) -> None:
    result = run(model, edits[:2], "lora", evaluate=True)
    folder = result.save(tmp_path / "run")
    again = Run.load(folder)
    assert again.scores.keys() == result.scores.keys()
    assert again.scores["strict"]["reliability"] == result.scores["strict"]["reliability"]
    assert largest_difference(list(again.deltas), list(result.deltas)) == 0
    assert again.outcomes == list(result.outcomes)
    for field in ("model", "data", "versions", "machine", "seed", "protocols", "config", "time"):
        assert again.provenance[field] not in ("", None, {}), field
    assert again.provenance["model"]["fingerprint"] == model.fingerprint


@pytest.mark.parametrize("method", ["lora", "wise"])
def test_another_seed_draws_something_else(model: EditableModel, edits: list[EditRequest], method: str) -> None:
    first, same, other = (run(model, edits[:2], method, steps=1, seed=seed) for seed in (0, 0, 1))
    assert largest_difference(list(first.deltas), list(same.deltas)) == 0
    assert largest_difference(list(first.deltas), list(other.deltas)) > 0
    assert other.provenance["config"]["method"]["seed"] == 1


def test_zero_steps_change_nothing(model: EditableModel, edits: list[EditRequest]) -> None:
    result = run(model, edits[:3], "ft", steps=0, evaluate=True)
    for name, score in result.scores["strict"].items():
        if name in ("text_locality", "image_locality", "near", "blind", "same"):
            assert score.mean == 1.0, name
        if name.endswith("_kl"):
            assert score.mean == 0.0, name
    assert result.scores["legacy"]["text_locality_top10"].mean == 1.0


def test_a_diverging_edit_is_reported_and_spares_its_neighbours(
    exact_model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.objectives import NLLObjective

    plain = run(exact_model, edits[:3], "ft", batch_size=3)
    original = NLLObjective.__call__

    def spoiled(self: NLLObjective, tokens: Any, steps: Any) -> Any:
        losses = original(self, tokens, steps)
        nan = torch.tensor([0.0, float("nan"), 0.0], dtype=torch.float64)
        losses.total = torch.where(steps >= 2, losses.total + nan, losses.total)
        return losses

    monkeypatch.setattr(NLLObjective, "__call__", spoiled)
    result = run(exact_model, edits[:3], "ft", batch_size=3)
    assert [outcome.status for outcome in result.outcomes] == ["max_steps", "diverged", "max_steps"]
    assert result.outcomes[1].steps == 2
    assert torch.isfinite(torch.stack([t.abs().max() for t in result.deltas[1].tensors.values()])).all()
    kept = [list(r.deltas)[::2] for r in (result, plain)]
    assert largest_difference(kept[0], kept[1]) < 1e-8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, r"method: 'lorra' is not known; did you mean 'lora'\? \(got method='lorra'\)"),
        ({"method": "odedt+ft"}, r"objective 'odedt' is not known; did you mean 'odedit'\?"),
        ({"method": "ft", "stepz": 3}, r"ft: field 'stepz' is not known; did you mean 'steps'\? \(got stepz=3\)"),
        ({"method": "ft", "layers": 9}, r"ft: layers is 1 to 4 on this model \(got layers=9\)"),
        ({"method": "ft", "layers": (1, 7)}, r"ft: layers lie in 0 to 3 on this model"),
        ({"method": "ft", "names": ("upp",)}, r"names must be among .* \(got name='upp'\)"),
        ({"method": "ft", "lr": -1.0}, r"solver: lr is positive"),
        ({"method": "ft", "steps": -1}, r"solver: steps is not negative"),
        ({"method": "lora", "rank": 0}, r"lora: rank is at least 1 \(got rank=0\)"),
        ({"mode": "parallel"}, r"edit: mode is one of \['single', 'sequential'\] \(got mode='parallel'\)"),
        ({"batch_size": 0}, r"edit: batch_size is at least 1"),
        ({"views": "mine"}, r"views: source is one of"),
    ],
)
def test_bad_settings_are_named_before_any_work(
    model: EditableModel, edits: list[EditRequest], settings: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(type(model), "encode", lambda *_a, **_k: pytest.fail("work had started"))
    with pytest.raises(ValueError, match=message):
        fastedit.edit(model, edits, **{"method": "ft", **settings})


def test_no_edits_is_an_error(model: EditableModel) -> None:
    with pytest.raises(ValueError, match="at least one edit"):
        fastedit.edit(model, [])


def test_locality_views_need_something_to_draw_from(model: EditableModel, edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match="views: locality views are drawn from a pool or from other edits"):
        fastedit.edit(model, edits[:1], "odedit+ft")
    assert run(model, edits[:1], "odedit+ft", views="record").outcomes[0].steps == 6


@pytest.mark.parametrize("name", ["random:blip2-tiny", "random:qwen2vl-tiny"])
def test_other_families_edit_too(name: str, edits: list[EditRequest]) -> None:
    model = fastedit.load(name, dtype="float64")
    together, alone = (run(model, edits[:3], "odedit+ft", batch_size=size, layers=2) for size in (3, 1))
    assert largest_difference(list(together.deltas), list(alone.deltas)) < 1e-8
    assert max(delta.norm for delta in together.deltas) > 0


def test_a_run_tells_how_much_of_the_machine_it_used(exact_model: EditableModel, edits: list[EditRequest]) -> None:
    from fastedit.engine.profiling.flops import Peak, nfu
    from fastedit.engine.profiling.utilisation import necessary_flops
    from fastedit.fitting.views import ViewSource
    from fastedit.objectives import ROLES

    assert run(exact_model, edits[:2]).timing.nfu is None
    result = run(exact_model, edits, "odedit+lora", peak=Peak(50.0, 10.0, "float64"))
    spec = result.deltas[0].spec
    source = ViewSource(edits, None)
    needed = necessary_flops(exact_model, spec, source, ROLES, result.outcomes)
    spent = sum(result.timing.seconds.values())
    assert result.timing.nfu == pytest.approx(nfu(needed.total, spent, Peak(50.0, 10.0)))
    # All five views of every edit are in it, and the unedited logits of two of them
    alone = necessary_flops(exact_model, spec, source, ROLES[:1], result.outcomes)
    assert needed.reference > 0 == alone.reference
    assert needed.backward > 3 * alone.backward


def test_the_measured_peak_is_reached_by_a_product() -> None:
    peak = fastedit.measure_peak("float32", seconds=0.1, scale=0.1)
    assert peak.matmul_gflop_per_s > 1
    assert peak.copy_gib_per_s > 0.1
