"""Encoded rows and prefix states as containers."""

from __future__ import annotations

import pytest
import torch

from fastedit.backbone import PrefixState
from fastedit.backbone.states import gather_positions, join_padded


def state(lengths: list[int], *, layer: int = 1, stage: str = "attention", deep: bool = False) -> PrefixState:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows, width = len(lengths), max(lengths)
    hidden = torch.randn(rows, width, 4, generator=generator)
    return PrefixState(
        hidden=hidden,
        position_ids=torch.arange(width).expand(rows, 3, width),
        lengths=torch.tensor(lengths),
        layer=layer,
        stage=stage,
        deep={layer: torch.randn(rows, width, 4, generator=generator)} if deep else {},
    )


def test_cat_pads_and_select_trims() -> None:
    first, second = state([3, 5], deep=True), state([7])
    joined = PrefixState.cat([first, second])
    assert joined.hidden.shape == (3, 7, 4)
    assert joined.position_ids.shape == (3, 3, 7)
    assert joined.attention_mask.sum(1).tolist() == [3, 5, 7]
    # The state without images adds nothing.
    assert torch.equal(joined.deep[1][2], torch.zeros(7, 4))
    back = joined.select([0, 1])
    assert torch.equal(back.hidden, first.hidden)
    assert torch.equal(back.deep[1], first.deep[1])
    assert torch.equal(joined.select(torch.tensor([2])).hidden, second.hidden)
    assert joined.n_bytes == 3 * 7 * 4 * 4 * 2 + 3 * 3 * 7 * 8 + 3 * 8


def test_states_of_different_places_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"must agree on \(layer, stage, gathered\)"):
        PrefixState.cat([state([3]), state([3], layer=2)])
    with pytest.raises(ValueError, match=r"at least one state is needed \(got 0\)"):
        PrefixState.cat([])


def test_gathering_keeps_order_and_zeroes_padding() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    positions = torch.tensor([[2, 0], [1, -1]])
    gathered = gather_positions(values, positions)
    assert torch.equal(gathered[0], values[0, [2, 0]])
    assert torch.equal(gathered[1], torch.stack([values[1, 1], torch.zeros(4)]))
    small = state([3, 3], stage="ffn", deep=True).at(positions)
    assert small.gathered
    assert small.hidden.shape == small.deep[1].shape == (2, 2, 4)
    assert small.select([1]).hidden.shape == (1, 2, 4)
    assert small.to("cpu").gathered


def test_caches_do_not_survive_a_change_of_rows() -> None:
    original = state([3, 5])
    original.cache["context"] = object()
    assert original.select([0]).cache == original.to("cpu").cache == PrefixState.cat([original]).cache == {}


def test_joining_pads_every_dimension_with_zeros() -> None:
    joined = join_padded([torch.ones(1, 2, 3), torch.ones(2, 3, 1)])
    assert joined.shape == (3, 3, 3)
    assert joined.sum() == 12
