"""Rows that are made ready: of views without loss, what a delta reads of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel, PackedState, branches
from fastedit.backbone.branches import branched
from fastedit.backbone.token_layout import token_layout
from fastedit.engine import fitting
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting import prepared
from fastedit.fitting.prepared import EditRows, can_branch, leaders, prepare
from fastedit.fitting.views import ViewSource
from fastedit.methods import resolve
from fastedit.objectives import Role, beside_roles
from tests.engine.conftest import make_edits
from tests.engine.test_editing import largest_difference


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:qwen2vl-tiny", dtype="float64")


def rows_of(model: EditableModel, **options: object) -> tuple[EditRows, EditRows]:
    """Rows of an edit of ``wise``, with and without views that have no loss."""
    model.forget()
    plan = resolve("wise", options)
    objective, spec = plan.build_objective(1), plan.method.spec(model, plan.config)
    views = [ViewSource(make_edits(2), None).views(0, objective.roles)]
    (found,) = prepare(model, spec, views, PhaseTimer(), beside=beside_roles(objective))
    model.forget()
    (whole,) = prepare(model, spec, views, PhaseTimer())
    return found, whole


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_views_without_loss_are_read_as_far_as_they_are_compared(model: EditableModel, tokens: str) -> None:
    found, whole = rows_of(model, tokens=tokens)
    assert found.row_roles == whole.row_roles == (0, 1, 3, 4)
    assert found.reference is None
    assert whole.reference is not None
    assert set(found.role.tolist()) == {int(Role.EDIT), int(Role.TEXT_REPHRASE)}
    assert found.state.wanted_counts[2:] == (0, 0)
    for row in (2, 3):
        one, other = found.state.of_row(row), whole.state.of_row(row)
        end = token_layout(other).prompts[0]
        assert torch.equal(one.hidden, other.hidden[end - 1 : end] if tokens == "last" else other.hidden[:end])
    for row in (0, 1):
        assert torch.equal(found.state.of_row(row).hidden, whole.state.of_row(row).hidden)


def test_behind_the_last_attention_rows_stay_as_they_are(model: EditableModel) -> None:
    found, whole = rows_of(model, layer=-1)
    assert found.reference is None
    assert found.state.counts == whole.state.counts


@pytest.mark.parametrize("options", [{}, {"tokens": "all"}, {"tokens": "after_image"}, {"layer": 0}, {"layer": -1}])
def test_edits_are_those_of_whole_rows(
    model: EditableModel, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 4, "stop_loss": None, "evaluate": False, "alpha": 0.001, **options}
    edits = make_edits(3)
    model.forget()
    found = fastedit.edit(model, edits, "wise", batch_size=2, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(prepared, "_ends_before_the_last", lambda *_: False)
    model.forget()
    whole = fastedit.edit(model, edits, "wise", batch_size=2, **settings)  # type: ignore[arg-type]
    assert largest_difference(list(found.deltas), list(whole.deltas)) < 1e-10


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Adam divides the rounding of small gradients by its epsilon of 1e-8; norms of the others compute in float32, where
    # a gradient that is added up before or behind one differs
    [("random:blip2-tiny", 1e-10), ("random:qwen2vl-tiny", 1e-6), ("random:llava-tiny", 1e-6)],
)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wise", {"layer": 0}),
        ("odedit+lora", {"layers": 2, "names": ("q", "v")}),
        ("kl+ft", {"layers": 1, "kl_rephrases": True}),
    ],
)
def test_edits_are_those_of_rows_apart(
    name: str, tolerance: float, method: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "FEWEST", 2)
    model = fastedit.load(name, dtype="float64")
    settings = {"steps": 4, "stop_loss": None, "evaluate": False, "batch_size": 2, **options}
    edits, tokens = make_edits(3), []

    def walked(state: PackedState, off: Mapping[int, tuple[int, int]]) -> PackedState:
        found = branched(state, off)
        tokens.append((state.hidden.shape[0], found.hidden.shape[0]))
        return found

    monkeypatch.setattr(prepared, "branched", walked)
    found = fastedit.edit(model, edits, method, **settings)  # type: ignore[arg-type]
    assert all(shared < apart for apart, shared in tokens)
    assert tokens
    monkeypatch.setattr(fitting, "can_branch", lambda *_: False)
    model.forget()
    count = len(tokens)
    apart = fastedit.edit(model, edits, method, **settings)  # type: ignore[arg-type]
    assert len(tokens) == count
    assert largest_difference(list(found.deltas), list(apart.deltas)) < tolerance
    assert max(delta.norm for delta in found.deltas) > 0


def test_deltas_that_tell_rows_apart_have_whole_rows(model: EditableModel) -> None:
    def of(method: str, **options: object) -> bool:
        plan = resolve(method, options)
        return can_branch(model, plan.method.spec(model, plan.config))

    assert all(of(method) for method in ("ft", "lora", "wise"))
    assert not any(of(method) for method in ("grace", "tpatcher", "ft-vision"))
    assert not of("wise", tokens="all")
    assert not of("lora", positions="after_image")


def test_rephrased_views_branch_off_their_own_edit() -> None:
    roles = [Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE, Role.TEXT_LOCALITY, Role.EDIT, Role.IMAGE_REPHRASE]
    assert leaders(roles) == [0, 0, 0, 3, 4, 4]


def test_rows_of_a_view_with_and_without_loss_are_kept_apart(model: EditableModel) -> None:
    # Both ask the same locality questions: what one has kept is of no use to the other
    settings = {"steps": 2, "stop_loss": None, "evaluate": False, "layer": 1}
    edits = make_edits(2)
    model.forget()
    expected = fastedit.edit(model, edits, "kl+wise", batch_size=2, **settings)  # type: ignore[arg-type]
    model.forget()
    fastedit.edit(model, edits, "wise", batch_size=2, **settings)  # type: ignore[arg-type]
    found = fastedit.edit(model, edits, "kl+wise", batch_size=2, **settings)  # type: ignore[arg-type]
    assert largest_difference(list(found.deltas), list(expected.deltas)) == 0
