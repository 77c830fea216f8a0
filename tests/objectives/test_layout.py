"""What is worked out once of a batch, against the masks that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastedit.objectives import ROLES, BatchLayout, Role
from fastedit.objectives.layout import ALL_COLUMNS, CE_COLUMNS, KL_COLUMNS
from fastedit.objectives.roles import CE_ROLES

#: Roles by token of three edits: every view; no rephrase, out of order; nothing but what must stay.
BATCHES = {
    "mixed": ([0, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 3, 4, 3, 0, 0, 4, 4]),
    "split": ([0, 0, 1, 1, 1, 0, 1, 2], [0, 2, 0, 0, 1, 3, 4, 3]),
    "fitted": ([0, 0, 1, 2], [0, 1, 0, 0]),
    "out": ([0, 1, 1], [3, 4, 4]),
    "empty": ([], []),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, BatchLayout]:
    edit, role = (torch.tensor(part, dtype=torch.long) for part in request.param)
    return edit, role, BatchLayout.of(edit, role, 3)


def is_fitted(role: Tensor) -> Tensor:
    return role < int(Role.TEXT_LOCALITY)


def test_parts_are_those_of_masks(batch: tuple[Tensor, Tensor, BatchLayout]) -> None:
    edit, role, layout = batch
    values = torch.randn(len(edit), 4, requires_grad=True)
    fitted, out = layout.split(values)
    mask = is_fitted(role)
    assert torch.equal(fitted, values[mask])
    assert torch.equal(layout.fitted(values), values[mask])
    assert (out is None) == bool(mask.all())
    assert torch.equal(layout.fitted_edits, edit[mask])
    assert torch.equal(layout.edits, edit)
    assert torch.equal(layout.slots, edit * len(ROLES) + role)
    if out is not None:
        assert torch.equal(out, values[~mask])
        assert torch.equal(layout.out_edits, edit[~mask])
        assert torch.equal(layout.out_slots, (edit * len(ROLES) + role)[~mask])
        assert torch.equal(layout.joined(fitted, out), values)
        weights = torch.randn_like(values)
        (gradient,) = torch.autograd.grad((fitted * weights[mask]).sum() + (out * weights[~mask]).sum(), values)
        assert torch.equal(gradient, weights)


@pytest.mark.parametrize("roles", [(Role.EDIT,), CE_ROLES, (Role.IMAGE_REPHRASE, Role.EDIT)])
def test_segments_are_of_the_named_roles(batch: tuple[Tensor, Tensor, BatchLayout], roles: tuple[Role, ...]) -> None:
    edit, role, layout = batch
    mask = is_fitted(role)
    expected = torch.full_like(edit, -1)
    for place, known in enumerate(roles):
        expected = torch.where(role == int(known), edit * len(roles) + place, expected)
    assert torch.equal(layout.segments(*roles), expected[mask])
    chosen = layout.chosen(*roles)
    assert torch.equal(expected[mask] >= 0, torch.ones_like(mask[mask]) if chosen is None else chosen)


def test_counts_and_means_are_of_what_is_there(batch: tuple[Tensor, Tensor, BatchLayout]) -> None:
    edit, role, layout = batch
    has = torch.zeros(3, len(ROLES) + 1, dtype=torch.bool)
    has[edit, role] = True
    has[:, -1] = has[:, 0] & (has[:, 1] | has[:, 2])
    assert torch.equal(layout.present, has)
    assert layout.has_generality == bool(has[:, -1].any())
    values = torch.randn(3, len(ROLES) + 1)
    for columns in (CE_COLUMNS, KL_COLUMNS, ALL_COLUMNS):
        mask = has[:, columns].float()
        expected = (values[:, columns] * mask).sum(1) / mask.sum(1).clamp(min=1)
        assert torch.equal(layout.mean(values[:, columns], columns), expected)
    assert torch.equal(layout.edit_sizes(torch.float32), torch.bincount(edit, minlength=3).clamp(min=1).float())
    assert torch.equal(layout.slot_sizes(torch.float64), torch.bincount(layout.slots)[layout.slots].double())


def test_groups_are_sorted_by_edit(batch: tuple[Tensor, Tensor, BatchLayout]) -> None:
    edit, role, layout = batch
    masks = {"edit": role == 0, "rephrased": (role == 1) | (role == 2)}
    sizes = [torch.bincount(edit[mask], minlength=3) for mask in masks.values()]
    for (name, mask), size in zip(masks.items(), sizes, strict=True):
        numbers = layout.group(name)  # type: ignore[arg-type]
        assert sorted(numbers.tolist()) == mask.nonzero()[:, 0].tolist()
        assert torch.equal(edit[numbers], edit[numbers].sort().values)
        assert torch.equal(layout.offsets(name).diff(), size)  # type: ignore[arg-type]
    assert torch.equal(layout.pooled(), torch.cat([edit[layout.group("edit")], edit[layout.group("rephrased")]]))
    assert torch.equal(layout.pooled_sizes(torch.float32, less=1), (sum(sizes) - 1).clamp(min=1).float())  # type: ignore[union-attr]


def test_nothing_is_made_twice() -> None:
    layout = BatchLayout([0, 1], [0, 3], 2, "cpu")
    assert layout.segments(*CE_ROLES) is layout.segments(*CE_ROLES)
    assert layout.group("edit") is layout.group("edit")
    assert layout.constant((1.0, 2.0)) is layout.constant((1.0, 2.0))
