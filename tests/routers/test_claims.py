"""Claims on prompts are those that a score for every pair gives, whatever the blocks and however close the call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastedit.deltas.questions import answering, best_of
from fastedit.routers import claims as module
from fastedit.routers.claims import Claims, claims_of, pairs_above, pairs_within


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, grid: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    # On a grid distances are equal to radii now and then
    return (values.mul(4).round().div(4) if grid else values).to(dtype)


def together(pairs: Any) -> set[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for row, edit in pairs:
        found += zip(row.tolist(), edit.tolist(), strict=True)
    assert len(found) == len(set(found)), "no pair twice"
    return set(found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 5),
    edits=st.integers(0, 40),
    entries=st.sampled_from([1, 7, 50, 1 << 20]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_pair_is_missed(seed: int, rows: int, edits: int, entries: int, size: float, dtype: torch.dtype) -> None:
    asked, stored = (drawn(seed + n, count, 6, dtype=dtype, grid=True) * size for n, count in ((0, rows), (1, edits)))
    radius = drawn(seed + 2, edits, dtype=dtype, grid=True).abs() * size
    stored[: min(rows, edits)] = asked[: min(rows, edits)]
    distance = (asked[:, None] - stored[None]).norm(dim=2)
    unit = [torch.nn.functional.normalize(each, dim=1) for each in (asked, stored)]
    product = (unit[0][:, None].double() * unit[1][None].double()).sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ENTRIES", entries)
        near, above = together(pairs_within(asked, stored, radius)), together(pairs_above(*unit, 0.5))
    wanted = {tuple(pair) for pair in (distance <= radius).nonzero().tolist()}
    assert wanted <= near
    # And what is just beyond is little
    assert near <= {tuple(pair) for pair in (distance <= radius * 1.01 + 0.01 * size).nonzero().tolist()}
    assert {tuple(pair) for pair in (product >= 0.5).nonzero().tolist()} <= above
    assert above <= {tuple(pair) for pair in (product >= 0.499).nonzero().tolist()}


def test_a_distance_of_nothing_is_found_among_large_vectors() -> None:
    """Rounding of the product form is far larger than the radius."""
    asked = drawn(0, 8, 64) + 1000
    assert {(n, n) for n in range(8)} <= together(pairs_within(asked, asked.clone(), 0.0))


def test_the_best_claim_is_that_of_all_scores() -> None:
    scores = drawn(3, 9, 12, grid=True)
    threshold = torch.linspace(0.5, 2, 12)
    texts = [{"questions": f'["{number % 5}"]'} for number in range(12)]
    allowed = torch.where(scores >= threshold, scores, -torch.inf)
    later = answering(texts)
    found = Claims.reaching(scores, threshold).best(9, later)
    assert torch.equal(found, best_of(allowed, later))
    assert set(found.tolist()) > {-1}, "some rows have no claim, some have"


def test_a_row_without_claims_has_no_edit() -> None:
    nothing = Claims(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert nothing.best(3, torch.arange(4)).tolist() == [-1, -1, -1]


def test_routers_without_claims_give_all_scores() -> None:
    router: Any = SimpleNamespace(
        scores=lambda state, fixed, own: torch.tensor([[0.1, 0.6], [0.5, 0.4]]),
        threshold=lambda fixed: torch.tensor([0.5, 0.5]),
    )
    state: Any = None
    found = claims_of(router, state, {})
    assert (found.row.tolist(), found.edit.tolist()) == ([0, 1], [1, 0])
    assert found.score.tolist() == pytest.approx([0.6, 0.5])
