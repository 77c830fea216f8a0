"""The peft baseline fits the same low-rank deltas, and takes its adapters out again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gate import compare
from benchmarks.implementations import engine, peft, plain
from fastedit.backbone import EditableModel, load
from fastedit.requests import EditRequest

pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("name", ["random:qwen2vl-tiny", "random:blip2-tiny"])
def test_equals_engine_and_plain_loop_in_float64(name: str, two_edits: list[EditRequest], tiny: Case) -> None:
    model = load(name, dtype="float64")
    case = replace(tiny, model=name, method="lora", steps=6, options={"weight_decay": 0.1, "alpha": 4.0})
    assert compare("peft", peft(model, two_edits, case), "engine", engine(model, two_edits, case)) < 1e-8
    # Adapters stay in the model while it is scored, on for one question and off for the next.
    scored = replace(case, evaluate=True)
    found, wanted = peft(model, two_edits[:1], scored), plain(model, two_edits[:1], scored)
    assert compare("peft", found, "plain_loop", wanted) < 1e-8
    assert found.scores


def test_model_is_left_as_it_was(two_edits: list[EditRequest], tiny: Case) -> None:
    model = load("random:qwen2vl-tiny")
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    modules = [type(module) for module in model.hf.modules()]
    answer = model.answer(two_edits[0].image, two_edits[0].prompt)
    peft(model, two_edits, replace(tiny, method="lora"))
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [type(module) for module in model.hf.modules()]
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    assert answer == model.answer(two_edits[0].image, two_edits[0].prompt)


def test_half_precision_keeps_factors_in_float32(two_edits: list[EditRequest], tiny: Case) -> None:
    model = load("random:qwen2vl-tiny", dtype="bfloat16")
    case = replace(tiny, method="lora", dtype="bfloat16", steps=4)
    found, wanted = peft(model, two_edits, case), engine(model, two_edits, case)
    assert {tensor.dtype for delta in found.deltas for tensor in delta.tensors.values()} == {torch.float32}
    for a, b in zip(found.outcomes, wanted.outcomes, strict=True):
        assert a.nll == pytest.approx(b.nll, rel=0.1)


def test_full_deltas_are_refused(exact: EditableModel, two_edits: list[EditRequest], tiny: Case) -> None:
    with pytest.raises(ValueError, match="low-rank adapters only"):
        peft(exact, two_edits, tiny)
