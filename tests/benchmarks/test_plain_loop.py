"""The plain loops fit the same deltas as the engine, and leave the model as it was."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastedit
from benchmarks.baselines import peft_loop, plain_loop
from benchmarks.baselines.evaluation import stock_inputs, stock_model
from benchmarks.cases import Case, made_up_edits
from benchmarks.gate import DELTA_TOLERANCE, compare
from benchmarks.implementations import IMPLEMENTATIONS, engine, plain
from fastedit.backbone import EditableModel, load
from fastedit.deltas import EditDelta
from fastedit.methods import LoRAConfig, resolve
from fastedit.requests import EditRequest, Query

FAMILIES = ("random:llava-tiny", "random:blip2-tiny", "random:qwen3vl-tiny")


def largest_difference(a: EditDelta, b: EditDelta) -> float:
    assert a.tensors.keys() == b.tensors.keys()
    return max(float((a.tensors[k] - b.tensors[k]).abs().max()) for k in a.tensors)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ft", {}),
        ("ft", {"clip": None, "weight_decay": 0.1, "radius": 0.02}),
        ("ft", {"names": ("q", "v", "down")}),
        ("lora", {"weight_decay": 0.1}),
        ("lora", {"names": ("q", "k", "v", "o", "up", "gate", "down"), "rank": 2}),
        ("grace", {}),
        ("grace", {"layer": 0, "values": 3}),
        ("wise", {}),
        ("wise", {"layer": 1, "name": "up", "alpha": 0.01, "beta": 5.0}),
        ("wise", {"layer": -1}),
    ],
)
def test_equals_the_engine_in_float64(
    exact: EditableModel, two_edits: list[EditRequest], tiny: Case, method: str, options: dict[str, Any]
) -> None:
    case = replace(tiny, method=method, steps=8, options=options)
    found, wanted = engine(exact, two_edits, case), plain(exact, two_edits, case)
    for a, b, outcome in zip(found.deltas, wanted.deltas, wanted.outcomes, strict=True):
        assert largest_difference(a, b) < DELTA_TOLERANCE
        assert max(float(t.abs().max()) for t in b.tensors.values()) > 1e-3
        assert outcome.steps == 8
    for a_end, b_end in zip(found.outcomes, wanted.outcomes, strict=True):
        assert a_end.nll == pytest.approx(b_end.nll, abs=1e-10)


def test_stops_like_the_engine(exact: EditableModel, tiny: Case) -> None:
    edits = made_up_edits(3, seed=1)
    case = replace(tiny, edits=3, batch_size=3, steps=25, stop_loss=0.3)
    found, wanted = engine(exact, edits, case), plain(exact, edits, case)
    ends = [(end.status, end.steps) for end in wanted.outcomes]
    assert ends == [(end.status, end.steps) for end in found.outcomes]
    assert len({steps for _, steps in ends}) > 1, "edits that stop at different steps were wanted"
    assert "converged" in {status for status, _ in ends}
    for a, b in zip(found.deltas, wanted.deltas, strict=True):
        assert largest_difference(a, b) < DELTA_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_engine_in_every_family(name: str, two_edits: list[EditRequest], tiny: Case) -> None:
    model = load(name, dtype="float64")
    for method in ("ft", "lora"):
        case = replace(tiny, model=name, method=method, steps=4)
        assert compare("engine", engine(model, two_edits, case), "plain_loop", plain(model, two_edits, case)) < 1e-8


def test_scores_equal_the_engines(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    case = replace(tiny, steps=10, evaluate=True)
    found, wanted = engine(exact, two_edits, case), plain(exact, two_edits, case)
    assert {"reliability", "text_locality", "image_locality_top10"} <= set(wanted.scores[0].legacy)
    for a, b in zip(found.scores, wanted.scores, strict=True):
        assert a.legacy == pytest.approx(b.legacy, abs=1e-9)
        assert a.strict == pytest.approx(b.strict, abs=1e-9)
    assert any(score.legacy["reliability"] > 0 for score in wanted.scores)


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_half_precision_runs_and_agrees(two_edits: list[EditRequest], tiny: Case, method: str) -> None:
    model = load("random:qwen2vl-tiny", dtype="bfloat16")
    case = replace(tiny, method=method, dtype="bfloat16", steps=4)
    found, wanted = engine(model, two_edits, case), plain(model, two_edits, case)
    for a, b in zip(found.outcomes, wanted.outcomes, strict=True):
        assert a.nll == pytest.approx(b.nll, rel=0.1)


def test_views_that_must_not_change_are_in_the_loss_of_wise(
    exact: EditableModel, two_edits: list[EditRequest], tiny: Case
) -> None:
    # Rows that must not change move, so that margins of all kinds count
    case = replace(tiny, method="wise", steps=8, options={"layer": 1, "alpha": 0.001})
    with_margins, without = (
        plain(exact, two_edits, replace(case, options={**(case.options or {}), "weight": weight}))
        for weight in (1.0, 0.0)
    )
    assert largest_difference(with_margins.deltas[0], without.deltas[0]) > 1e-3


def test_routed_edits_are_not_scored(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    with pytest.raises(ValueError, match=r"a router chooses are not scored here \(got method='grace'\)"):
        plain(exact, two_edits, replace(tiny, method="grace", evaluate=True))


def test_model_is_left_as_it_was(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    before = {name: tensor.clone() for name, tensor in exact.hf.state_dict().items()}
    forwards = {id(module): "forward" in vars(module) for module in exact.hf.modules()}
    for method in ("ft", "lora", "grace", "wise"):
        plain(exact, two_edits, replace(tiny, method=method))
    after = exact.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in exact.hf.parameters())
    for module in exact.hf.modules():
        assert ("forward" in vars(module)) == forwards[id(module)]
        assert not module._forward_hooks


def test_nothing_remains_when_a_fit_fails(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    spec = resolve("ft", {}).method.spec(exact, resolve("ft", {}).config)
    parameters = plain_loop.initial_parameters(exact, spec)
    with pytest.raises(RuntimeError, match="stop"), plain_loop.beside(exact, spec, parameters):
        raise RuntimeError("stop")
    assert all("forward" not in vars(exact.module(site)) for site in spec.sites)


def test_the_whole_model_runs_at_every_step(
    exact: EditableModel, two_edits: list[EditRequest], tiny: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    handles = [
        exact.hf.model.visual.register_forward_hook(lambda *_: seen.append(())),
        exact.hf.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(tuple(args[0].shape))),
    ]
    try:
        plain(exact, two_edits[:1], replace(tiny, steps=4))
    finally:
        for handle in handles:
            handle.remove()
    length = exact.encode([two_edits[0].query], answers=True).input_ids.shape[1]
    assert seen == [(), (1, length, exact.hidden_size)] * 4


@pytest.mark.parametrize("kind", ["ft", "lora"])
@pytest.mark.parametrize("name", ["random:qwen2vl-tiny", "random:blip2-tiny"])
def test_deltas_act_behind_the_image_alone(name: str, kind: str, two_edits: list[EditRequest]) -> None:
    model = load(name, dtype="float64")
    plan = resolve(kind, {"layers": 1})
    spec = plan.method.spec(model, plan.config)
    spec = replace(spec, options={**spec.options, "positions": "after_image"})
    parameters = plain_loop.initial_parameters(model, spec)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    with_image = model.encode([two_edits[0].query], answers=True)
    first = plain_loop.first_slot(spec, with_image)
    slots = with_image.image_mask[0].nonzero().flatten().tolist()
    assert first == slots[-1] + 1
    assert plain_loop.first_slot(replace(spec, options={}), with_image) == 0
    without = model.encode([Query("what is red", None, "a cup")], answers=True)
    assert plain_loop.first_slot(spec, without) == 0
    # In the last layer its inputs do not depend on the delta; hooks run in the order of their making
    module, outputs = model.module(spec.sites[0]), []
    handles = [module.register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()))]
    try:
        with torch.no_grad(), plain_loop.beside(model, spec, parameters, first):
            handles.append(module.register_forward_hook(lambda _m, _a, output: outputs.append(output.detach())))
            inputs = stock_inputs(model, with_image)
            stock_model(model, inputs)(**inputs, use_cache=False)
            # A step of a generation is a row of one slot, and behind the image
            module(torch.randn(1, 1, spec.sites[0].d_in, dtype=torch.float64))
    finally:
        for handle in handles:
            handle.remove()
    plain, edited, plain_step, edited_step = (output.flatten(0, -2) for output in outputs)
    assert torch.equal(plain[:first], edited[:first])
    assert (plain[first:] != edited[first:]).any(-1).all()
    assert not torch.equal(plain_step, edited_step)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_engine_behind_the_image(name: str, two_edits: list[EditRequest], tiny: Case) -> None:
    if "positions" not in {field.name for field in fields(LoRAConfig)}:
        pytest.skip("lora has no field 'positions'")
    model = load(name, dtype="float64")
    case = replace(tiny, model=name, method="lora", steps=4, evaluate=True, options={"positions": "after_image"})
    found, wanted = engine(model, two_edits, case), plain(model, two_edits, case)
    assert compare("engine", found, "plain_loop", wanted) < DELTA_TOLERANCE
    everywhere = plain(model, two_edits, replace(case, options=None, evaluate=False))
    assert largest_difference(wanted.deltas[0], everywhere.deltas[0]) > 1e-4


def test_peft_refuses_chosen_positions(exact: EditableModel, two_edits: list[EditRequest]) -> None:
    pytest.importorskip("peft")
    plan = resolve("lora", {})
    spec = plan.method.spec(exact, plan.config)
    spec = replace(spec, options={**spec.options, "positions": "after_image"})
    method: Any = SimpleNamespace(spec=lambda _m, _c: spec, solver=plan.method.solver)
    with pytest.raises(ValueError, match="adapters act at every position"):
        peft_loop.run(exact, two_edits, replace(plan, method=method))


def test_other_objectives_are_refused(exact: EditableModel, two_edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match="only methods with the plain objective"):
        plain_loop.run(exact, two_edits, resolve("kl+ft", {}))


def test_deltas_of_the_loop_apply_to_the_model(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    edit = two_edits[0]
    delta = plain(exact, [edit], replace(tiny, steps=40)).deltas[0]
    with fastedit.applied(exact, delta):
        assert exact.answer(edit.image, edit.prompt) == edit.target


def test_every_implementation_has_a_name() -> None:
    assert set(IMPLEMENTATIONS) == {"engine", "plain_loop", "peft", "plain_onednn"}
