"""The index names what lies near, of the edits that are stored now alone; what acts is scored exactly."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("hnswlib")

from fastedit.routers import index as module
from fastedit.routers.index import VectorIndex
from fastedit.routers.tables import Tables

WIDTH = 16


class Owner:
    """Rows that are written once."""


def unit(seed: int, count: int) -> Tensor:
    """Random directions are near-orthogonal."""
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


def pairs(index: VectorIndex, asked: Tensor, owner: Any, stored: Tensor, version: Any = None) -> set[tuple[int, int]]:
    row, edit = index.pairs(asked, owner, version, len(stored), lambda where: stored[where])
    found = list(zip(row.tolist(), edit.tolist(), strict=True))
    assert found == sorted(set(found)), "sorted, no pair twice"
    return set(found)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 300),
    copies=st.integers(0, 40),
    removed=st.lists(st.integers(0, 299), max_size=250),
    space=st.sampled_from(["ip", "l2"]),
)
def test_versions_copies_and_edits_taken_back(
    seed: int, count: int, copies: int, removed: list[int], space: str
) -> None:
    stored = unit(seed, count)
    stored = torch.cat([stored, stored[:1].repeat(copies, 1)])
    asked = F.normalize(stored[:5] + 0.02 * unit(seed + 1, 5)[: len(stored)], dim=1)
    index, first = VectorIndex(WIDTH, space), Owner()
    half = len(stored) // 2
    pairs(index, asked, first, stored[:half])
    assert {(n, n) for n in range(len(asked))} <= pairs(index, asked, first, stored), "grown from the version before"
    assert {(0, count + n) for n in range(copies)} <= pairs(index, asked, first, stored), "all of equal ones"
    kept = [n for n in range(len(stored)) if n not in removed]
    second = Owner()
    found = pairs(index, asked, second, stored[kept])
    assert all(edit < len(kept) for _, edit in found)
    left = {(n, kept.index(n)) for n in range(len(asked)) if n in kept}
    assert left <= found, "at their new places"
    # Calls under way have the version before
    assert pairs(index, asked, first, stored[:half]) <= {(r, e) for r in range(5) for e in range(half)}


def test_nearest_of_many_are_found() -> None:
    stored, asked = unit(0, 4000), unit(1, 200)
    index = VectorIndex(WIDTH, "ip")
    found = pairs(index, asked, Owner(), stored)
    best = (asked @ stored.T).argmax(1).tolist()
    assert sum((row, edit) in found for row, edit in enumerate(best)) >= 199


def test_an_index_of_edits_taken_back_is_made_anew() -> None:
    stored = unit(2, 1000)
    index = VectorIndex(WIDTH, "ip")
    pairs(index, stored[:2], Owner(), stored)
    assert len(index) == 1000
    assert (0, 0) in pairs(index, stored[:2], Owner(), stored[:900])
    assert len(index) == 1000, "few of them are gone"
    assert (0, 0) in pairs(index, stored[:2], Owner(), stored[:300])
    assert len(index) == 300


def test_only_new_vectors_are_looked_at() -> None:
    stored, owner, index = unit(3, 500), Owner(), VectorIndex(WIDTH, "ip")
    asked: list[slice] = []

    def vectors(where: slice) -> Tensor:
        asked.append(where)
        return stored[where]

    for count in (400, 400, 450, 300):
        index.pairs(stored[:1], owner, None, count, vectors)
    assert [(each.start, each.stop) for each in asked] == [(0, 400), (400, 450)]
    # Those of a stack that may be written to are looked at again where it was
    for version in (0, 0, 1):
        index.pairs(stored[:1], owner, version, 300, vectors)
    assert [(each.start, each.stop) for each in asked[2:]] == [(0, 300), (0, 300)]


def test_nothing_stored_and_nothing_asked() -> None:
    index = VectorIndex(WIDTH, "ip")
    assert not pairs(index, unit(0, 2), Owner(), unit(0, 0))
    assert not pairs(index, unit(0, 0), Owner(), unit(0, 3))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any) -> Any:
        if name == "hnswlib":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match=r"pip install 'fastedit-mllm\[index\]'"):
        module.hnswlib_module()


def test_tables_keep_one_index_for_all_versions() -> None:
    tables, stored = Tables(), unit(4, 60)
    for kept in (stored, stored[10:]):
        row, edit = tables.pairs("key", "ip", Owner(), stored[20:21], [(kept, 1.0)])
        assert (kept[edit[row == 0]] == stored[20]).all(1).any()
    assert len(tables._indexes) == 1
