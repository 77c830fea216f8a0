"""A first pass over reduced vectors misses no pair, whatever is left out of them, and grows with what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastedit.routers import claims, reduced
from fastedit.routers.claims import pairs_above, pairs_within
from fastedit.routers.reduced import Reduced, short_dtype

WIDTH, KEPT = 24, 6


@pytest.fixture(autouse=True)
def few_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "KEPT", KEPT)


def vectors(seed: int, count: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Near few directions (spread 0) to near-orthogonal ones; every fifth again."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(count, KEPT - 1, generator=generator) @ torch.randn(KEPT - 1, WIDTH, generator=generator)
    made = (low + spread * 4 * torch.randn(count, WIDTH, generator=generator)).to(dtype)
    made[::5] = made[0]
    return made


def pairs(found: object) -> set[tuple[int, int]]:
    return {(int(r), int(e)) for row, edit in found for r, e in zip(row, edit, strict=True)}  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.01, 0.3, 10.0]),
    least=st.floats(-0.5, 0.999),
    few=st.sampled_from([1, 64, 10**6]),
    entries=st.sampled_from([7, 50, 1 << 20]),
    kind=st.sampled_from(["float32", "float64", "bfloat16"]),
)
def test_no_pair_is_missed(seed: int, spread: float, least: float, few: int, entries: int, kind: str) -> None:
    short = torch.bfloat16 if kind == "bfloat16" else None
    dtype = torch.float64 if kind == "float64" else torch.float32
    stored, asked = (vectors(seed + n, count, spread, dtype) for n, count in ((0, 60), (1, 7)))
    asked[:3] = stored[:3] + 0.01 * asked[:3]
    unit, queries = F.normalize(stored, dim=1), F.normalize(asked, dim=1)
    small = Reduced(unit, dtype=short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "ENTRIES", entries)
        patch.setattr(claims, "FEW", few)
        above = pairs(pairs_above(queries, unit, least, small))
        radius = (stored.norm(dim=1) * 0.5).to(dtype)
        within = pairs(pairs_within(asked, stored, radius, Reduced(stored, centred=True)))
    product = queries.double() @ unit.double().T
    assert {tuple(pair) for pair in (product >= least).nonzero().tolist()} <= above
    distance = torch.cdist(asked.double(), stored.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert {tuple(pair) for pair in (distance <= radius.double()).nonzero().tolist()} <= within


@pytest.mark.parametrize("short", [None, torch.bfloat16])
def test_little_passes_where_little_is_left_out(short: torch.dtype | None) -> None:
    unit = F.normalize(vectors(0, 400, 0.02, torch.float32)[torch.arange(400) % 5 > 0], dim=1)
    small = Reduced(unit, dtype=short)
    assert small.is_close
    wanted = pairs(pairs_above(unit[:4], unit, 0.9))
    found = pairs(pairs_above(unit[:4], unit, 0.9, small))
    assert wanted <= found
    assert len(found) < len(wanted) + 40
    assert not Reduced(vectors(0, 400, 10.0, torch.float32)).is_close


def test_where_much_passes_the_whole_vectors_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = F.normalize(vectors(1, 100, 10.0, torch.float32), dim=1)
    small = Reduced(unit)
    monkeypatch.setattr(claims, "FEW", 0)
    loose = pairs(pairs_above(unit[:4], unit, 0.6, small))
    exact = pairs(pairs_above(unit[:4], unit, 0.6))
    monkeypatch.setattr(claims, "FEW", 10**6)
    assert pairs(pairs_above(unit[:4], unit, 0.6, small)) == exact
    assert exact < loose, "the bound alone lets more pass"


def test_only_new_rows_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = vectors(2, 90, 0.1, torch.float32)
    small = Reduced(stored[:40])
    first = small.rows(stored[:40]).clone()
    seen: list[int] = []
    reduce = Reduced.of
    monkeypatch.setattr(Reduced, "of", lambda self, part: (seen.append(len(part)), reduce(self, part))[1])
    assert torch.equal(small.rows(stored[:42])[:40], first)
    assert len(small.rows(stored[:30])) == 30
    torch.testing.assert_close(small.rows(stored), reduce(small, stored), atol=1e-4, rtol=1e-5)
    assert seen == [2, 48]


def test_few_or_narrow_vectors_are_compared_whole() -> None:
    assert not Reduced.pays(torch.zeros(10, 512))
    assert not Reduced.pays(torch.zeros(reduced.LEAST_ROWS, 8))
    assert not Reduced.pays(torch.zeros(reduced.LEAST_ROWS, 512, dtype=torch.bfloat16))
    assert Reduced.pays(torch.zeros(reduced.LEAST_ROWS, 512))
    assert short_dtype(torch.device("cpu")) in (None, torch.bfloat16)
