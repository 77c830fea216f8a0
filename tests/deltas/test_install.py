"""Deltas that act on some prompts only, that read another module's input, or that ask another question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel, PackedState
from fastedit.deltas import DeltaSpec, EditDelta, Rows, installed, stack
from fastedit.deltas import install as install_module
from fastedit.deltas.full import FullDelta
from fastedit.deltas.kinds import new_stack
from tests.backbone.padded import prefix, tail
from tests.engine.conftest import picture

LAYER = 2


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def queries() -> list[Query]:
    images = [picture(seed) for seed in range(3)]
    return [
        Query("what is it ?", images[0]),
        Query("how many are there ?", images[1]),
        Query("of what colour ?", None),
        Query("what is it ?", images[2]),
    ]


def deltas(model: EditableModel, count: int, **options: Any) -> list[EditDelta]:
    """Full deltas that change answers."""
    spec = DeltaSpec("full", tuple(model.sites([LAYER], ["down"])), options)
    generator = torch.Generator().manual_seed(1)
    stacked = new_stack(spec, count, dtype=torch.float64, trainable=False)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=generator, dtype=torch.float64) * 0.7)
    return [stacked.unstack(index) for index in range(count)]


class Fixed:
    """A router whose scores are written down."""

    def __init__(self, table: list[list[float]]) -> None:
        self.table = torch.tensor(table, dtype=torch.float64)
        self.states: list[PackedState] = []

    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        self.states.append(state)
        return self.table if own is None else self.table[torch.arange(len(own)), own]

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        return torch.full((self.table.shape[1],), 0.5, dtype=torch.float64)


def use(monkeypatch: pytest.MonkeyPatch, router: Fixed) -> None:
    monkeypatch.setattr(install_module, "make_router", lambda _model, _stacked: router)


def test_each_row_is_answered_by_its_own_edit_or_by_the_base_model(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = queries()
    base = model.generate(asked, max_new_tokens=6)
    both = deltas(model, 2)
    alone = []
    for delta in both:
        with installed(model, stack([delta]), Rows()):
            alone.append(model.generate(asked, max_new_tokens=6))
    assert all(found != base for found in alone)
    router = Fixed([[0.9, 0.9], [0.1, 0.9], [0.1, 0.6], [0.6, 0.1]])
    use(monkeypatch, router)
    with installed(model, stack(both), Rows((2, 2))) as holder:
        found = model.generate(asked, max_new_tokens=6)
        # Rows 0 and 1 belong to edit 0, rows 2 and 3 to edit 1
        assert holder.choice == [0, -1, 1, -1]
    assert found == [alone[0][0], base[1], alone[1][2], base[3]]
    (state,) = router.states
    assert (state.layer, state.stage) == (LAYER, "ffn")
    assert len(state) == 4
    assert state.image is not None
    assert model.holders == []
    assert model.generate(asked, max_new_tokens=6) == base


def test_the_best_of_many_edits_acts(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fixed([[0.6, 0.7, 0.2], [0.4, 0.3, 0.49], [0.1, 0.2, 0.9], [0.5, 0.1, 0.2]]))
    with installed(model, stack(deltas(model, 3)), Rows()) as holder:
        model.generate(queries(), max_new_tokens=1)
        assert holder.choice == [1, -1, 2, 0]


def test_rows_that_no_edit_acts_on_are_equal_to_the_bit(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Tensor] = []
    (site,) = model.sites([LAYER], ["down"])

    def watch(_module: Any, _args: Any, output: Tensor) -> None:
        outputs.append(output.clone())

    handle = None
    try:
        use(monkeypatch, Fixed([[0.0], [1.0], [0.0], [0.0]]))
        with installed(model, stack(deltas(model, 1)), Rows()) as holder:
            handle = model.module(site).register_forward_hook(watch)
            model.generate(queries(), max_new_tokens=1)
            routed = outputs.pop()
            with holder.paused():
                model.generate(queries(), max_new_tokens=1)
            base = outputs.pop()
    finally:
        if handle is not None:
            handle.remove()
    rows = [len(model.encode([query], answers=False).input_ids[0]) for query in queries()]
    for row, (one, other) in enumerate(zip(routed.split(rows, 1), base.split(rows, 1), strict=True)):
        assert torch.equal(one, other) == (row != 1)


def test_padded_rows_have_no_router(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Fixed([[1.0]] * 4))
    encoded = model.encode(queries(), answers=False)
    (delta,) = deltas(model, 1, router="ball")
    with (
        installed(model, stack([delta]), Rows()),
        pytest.raises(ValueError, match="router='ball' acts in generate, answer and edits"),
    ):
        tail(model, prefix(model, encoded, 0))


class Reading(FullDelta):
    """A full delta of the feed-forward block: from what enters it to what leaves it."""

    def reader(self, site: int) -> str:
        return "up"


def test_a_change_may_be_a_function_of_another_modules_input(model: EditableModel) -> None:
    (up,), (down,) = model.sites([LAYER], ["up"]), model.sites([LAYER], ["down"])
    site = replace(down, d_in=up.d_in)
    stacked = Reading(
        DeltaSpec("full", (site,)), 1, dtype=torch.float64, device="cpu", trainable=False
    )  # fmt: skip
    stacked.flat.fill_(0.01)
    entered: list[Tensor] = []
    left: list[Tensor] = []
    handles = [model.module(up).register_forward_pre_hook(lambda _m, args: entered.append(args[0].clone()))]
    handles.append(model.module(down).register_forward_hook(lambda _m, _a, output: left.append(output.clone())))
    try:
        with installed(model, stacked, Rows()):
            handles.append(model.module(down).register_forward_hook(lambda _m, _a, output: left.append(output.clone())))
            model.generate(queries()[:1], max_new_tokens=1)
    finally:
        for handle in handles:
            handle.remove()
    base, changed = left
    expected = base + entered[0].sum(-1, keepdim=True) * 0.01
    torch.testing.assert_close(changed, expected)


def test_another_question_is_asked_of_the_edited_model(model: EditableModel) -> None:
    fact = EditDelta(DeltaSpec("context", ()), {}, texts={"template": "it is a cat . {prompt}"})
    asked = queries()[:2]
    expected = model.generate([replace(q, prompt=f"it is a cat . {q.prompt}") for q in asked], max_new_tokens=6)
    assert expected != model.generate(asked, max_new_tokens=6)
    with fastedit.applied(model, fact, check_model=False):
        assert model.generate(asked, max_new_tokens=6) == expected
    # Only where its router says so
    other = EditDelta(DeltaSpec("context", ()), {}, texts={"template": "{prompt}"})
    with installed(model, stack([fact, other]), Rows((1, 1))):
        found = model.generate(asked, max_new_tokens=6)
    assert found == [expected[0], model.generate(asked, max_new_tokens=6)[1]]


def test_a_router_decides_on_the_question_as_it_was_put(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    router = Fixed([[1.0], [0.0]])
    use(monkeypatch, router)
    (delta,) = deltas(model, 1)
    fact = replace(delta, texts={"template": "it is a cat . {prompt}"})
    asked = queries()[:2]
    with installed(model, stack([delta]), Rows()):
        pass
    with installed(model, stack([fact]), Rows()) as holder:
        changed = holder.rewrite_prompts(asked)
        assert [query.prompt for query in changed] == [f"it is a cat . {asked[0].prompt}", asked[1].prompt]
        found = model.generate(asked, max_new_tokens=6)
        with holder.paused():
            assert holder.rewrite_prompts(asked) == asked
    assert found[1] == model.generate(asked, max_new_tokens=6)[1]
    alone = model.generate([replace(asked[0], prompt=f"it is a cat . {asked[0].prompt}")], max_new_tokens=6)
    assert found[0] != alone[0]
    assert {(len(state), state.layer) for state in router.states} == {(2, LAYER)}
