"""Deltas whose edits choose their layers: what they add, where they are silent, whose gradient goes where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows, TokenSpans, load_deltas, save_deltas, stack
from fastedit.deltas.kinds import new_stack

D_IN, D_OUT, RANK = 9, 5, 2
SITES = tuple(Site(layer, "down", f"{layer}.down", D_IN, D_OUT) for layer in (1, 2, 4))
SPEC = DeltaSpec("localized", SITES, {"slots": 2, "rank": RANK, "scale": 0.5, "seed": 3, "entity": 4})
# Of four edits: sites by slot, from 1; the last has chosen nothing
LAYERS = ([1, 3], [3, 2], [0, 1], [0, 0])


def filled(trainable: bool = True) -> Any:
    stacked = new_stack(SPEC, len(LAYERS), dtype=torch.float64, trainable=trainable)
    make = torch.Generator().manual_seed(0)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=make, dtype=torch.float64))
    for edit, layers in enumerate(LAYERS):
        stacked.set(edit, {"layers": torch.tensor(layers), "entity": torch.randn(4, generator=make)})
    return stacked


def written_out(stacked: Any, site: int, x: torch.Tensor, owner: list[int]) -> torch.Tensor:
    """What edits add at a site, token by token."""
    out = []
    for token, edit in zip(x, owner, strict=True):
        change = torch.zeros(D_OUT, dtype=x.dtype)
        for slot, number in enumerate(LAYERS[edit]):
            if number == site + 1:
                change = change + 0.5 * token @ stacked.parts["down"][edit, slot] @ stacked.parts["up"][edit, slot]
        out.append(change)
    return torch.stack(out)


COUNTS = ((1, 2, 1, 1), (2, 0, 3, 0), (0, 2, 0, 0), (0, 0, 0, 2))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("site", range(3))
def test_adds_what_the_chosen_pairs_add(counts: tuple[int, ...], site: int) -> None:
    stacked = filled()
    owner = [edit for edit, count in enumerate(counts) for _ in range(3 * count)]
    x = torch.randn(len(owner), D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = stacked.delta(site, x, Rows(counts))
    torch.testing.assert_close(found, written_out(stacked, site, x, owner), rtol=1e-12, atol=1e-14)
    spans = TokenSpans.of(Rows(counts), [3] * sum(counts), 4)
    assert torch.equal(stacked.delta(site, x, spans), found)


def test_silence_is_exact_where_an_edit_did_not_choose_a_site() -> None:
    stacked = filled()
    x = torch.randn(8, D_IN, dtype=torch.float64)
    found = stacked.delta(1, x, Rows((2, 2, 2, 2))).view(4, 2, D_OUT)
    assert torch.equal(found[[0, 2, 3]], torch.zeros(3, 2, D_OUT, dtype=torch.float64))
    assert bool(found[1].any())


def test_gradients_are_those_of_the_chosen_pairs_and_zero_elsewhere() -> None:
    stacked = filled()
    x = torch.randn(8, D_IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 8, D_OUT, dtype=torch.float64)
    # Rows of an edit alone, and all, in one step: gradients of several sites add up in a part
    stacked.begin_step()
    total = torch.stack([(stacked.delta(site, x, Rows((2, 2, 2, 2))) * weight[site]).sum() for site in range(3)]).sum()
    (by_x,) = torch.autograd.grad(total, x, retain_graph=True)
    # What an earlier step left is forgotten
    for _ in range(2):
        stacked.begin_step()
        total.backward(retain_graph=True)
        stacked.end_step()

    parts = {name: part.clone().requires_grad_(True) for name, part in stacked.parts.items()}
    wide = x.detach().clone().requires_grad_(True)
    owner = [0, 0, 1, 1, 2, 2, 3, 3]
    expected = torch.zeros((), dtype=torch.float64)
    for site in range(3):
        for t, edit in enumerate(owner):
            for slot, number in enumerate(LAYERS[edit]):
                if number == site + 1:
                    change = 0.5 * wide[t] @ parts["down"][edit, slot] @ parts["up"][edit, slot]
                    expected = expected + (change * weight[site, t]).sum()
    expected.backward()
    torch.testing.assert_close(by_x, wide.grad, rtol=1e-12, atol=1e-14)
    for name, part in parts.items():
        assert part.grad is not None
        torch.testing.assert_close(stacked.part_grads[name], part.grad, rtol=1e-12, atol=1e-14)
    assert not bool(stacked.grad[3].any())
    assert not bool(stacked.part_grads["up"][2, 0].any()), "a slot that is not used"


def test_gradients_of_a_site_that_is_walked_twice_add_up() -> None:
    stacked = filled()
    x = torch.randn(8, D_IN, dtype=torch.float64)
    grads = []
    for parts in ((x,), (x, x)):
        stacked.begin_step()
        torch.stack([stacked.delta(0, part, Rows((2, 2, 2, 2))).sum() for part in parts]).sum().backward()
        stacked.end_step()
        grads.append(stacked.grad.clone())
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_a_step_without_any_chosen_pair_leaves_no_gradient_of_the_step_before() -> None:
    stacked = filled()
    x = torch.randn(2, D_IN, dtype=torch.float64, requires_grad=True)
    for rows in (Rows((2, 0, 0, 0)), Rows((0, 0, 0, 2))):
        stacked.begin_step()
        (stacked.delta(0, x, rows) + x.sum()).sum().backward()
        stacked.end_step()
    assert not bool(stacked.grad.any())


def test_a_fresh_delta_changes_nothing_whatever_it_chose() -> None:
    stacked = new_stack(SPEC, 2, dtype=torch.float64)
    stacked.set(0, {"layers": torch.tensor([2.0, 1.0])})
    x = torch.randn(4, D_IN, dtype=torch.float64)
    for site in range(3):
        assert not bool(stacked.delta(site, x, Rows((1, 1))).any())
    stacked.parts["up"].normal_()
    assert bool(stacked.delta(0, x, Rows((1, 1))).any())
    drawn = stacked.parts["down"][0].clone()
    stacked.parts["down"].zero_()
    stacked.restart([0])
    assert torch.equal(stacked.parts["down"][0], drawn)
    assert not bool(stacked.parts["up"][0].any())
    assert not bool(stacked.delta(0, x, Rows((1, 1))).any())


def test_edits_come_back_from_a_file_as_they_were(tmp_path: Any) -> None:
    stacked = filled()
    deltas = [stacked.unstack(edit, request_id=str(edit)) for edit in range(4)]
    save_deltas(deltas, tmp_path / "deltas.safetensors")
    again = stack(load_deltas(tmp_path / "deltas.safetensors"), dtype=torch.float64)
    x = torch.randn(8, D_IN, dtype=torch.float64)
    for site in range(3):
        assert torch.equal(again.delta(site, x, Rows((2, 2, 2, 2))), stacked.delta(site, x, Rows((2, 2, 2, 2))))
    assert torch.equal(again.fixed["entity"], stacked.fixed["entity"])


def test_refuses_sites_and_layers_that_do_not_fit() -> None:
    wide = (*SITES, replace(SITES[0], d_in=D_IN + 1))
    with pytest.raises(ValueError, match="one shape"):
        new_stack(replace(SPEC, sites=wide), 1)
    with pytest.raises(ValueError, match="slots is 1 to 3"):
        new_stack(replace(SPEC, options={**SPEC.options, "slots": 4}), 1)
    stacked = new_stack(SPEC, 1)
    for layers in ([2, 2], [1, 4], [-1, 0]):
        stacked.set(0, {"layers": torch.tensor(layers)})
        with pytest.raises(ValueError, match=r"layers are numbers of different sites.*of edit 0"):
            stacked.delta(0, torch.zeros(1, D_IN), Rows())
