"""Routers choose as from all scores, whether vectors are compared whole, reduced first, or named by an index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.deltas import DeltaSpec
from fastedit.routers import make_router, reduced
from fastedit.routers.claims import Claims, claims_of
from fastedit.routers.classifier import ANSWER, ClassifierShape, Disentangler
from fastedit.routers.scope import ScopeHeads, ScopeShape
from fastedit.routers.tables import Tables, tables_of
from fastedit.training import Artifact
from tests.engine.conftest import picture

STORED = 600
QUERIES = [Query("what colour is it ?", picture(1)), Query("who ?", None), Query("where is it ?", picture(2))]


class Stack:
    """What a router needs of stacked deltas."""

    def __init__(self, spec: DeltaSpec, fixed: dict[str, Tensor]) -> None:
        self.spec, self.fixed, self.size = spec, fixed, STORED
        self.texts = [{ANSWER: str(number % 3)} for number in range(STORED)]


@pytest.fixture(scope="module")
def loaded() -> EditableModel:
    return fastedit.load("random:llava-tiny")


@pytest.fixture
def model(loaded: EditableModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[EditableModel]:
    monkeypatch.setattr(reduced, "LEAST_ROWS", 100)
    monkeypatch.setattr(reduced, "KEPT", 8)
    monkeypatch.setattr(reduced, "MOST_LEFT_OUT", 1.0)
    yield loaded
    loaded.tables, loaded.index_from = None, None
    loaded.artifacts.clear()


def near(vectors: Tensor, seed: int) -> Tensor:
    """So many vectors around some, nearer and further; the first are those themselves."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0, 1.5, STORED)[:, None] * vectors.norm(dim=1).mean() / vectors.shape[1] ** 0.5
    every = vectors[torch.arange(STORED) % len(vectors)]
    return every + spread * torch.randn(STORED, vectors.shape[1], generator=generator)


def routed(model: EditableModel, name: str) -> tuple[Any, Any, Stack]:
    """A router, prompts, and stored edits near them."""
    state = packed_prefix(model, packed_start(model, model.encode(QUERIES, answers=False)), 1, "ffn")
    (site,) = model.sites([1], ["down"])
    if name == "ball":
        from fastedit.routers.ball import prompt_keys

        keys = prompt_keys(model, 1, state)
        radius = torch.linspace(0.1, 1.2, STORED)[:, None] * keys.norm(dim=1).mean()
        stack = Stack(
            DeltaSpec("codebook", (site,), {"router": "ball"}), {"1.down:key": near(keys, 0), "1.down:radius": radius}
        )
    elif name == "classifier":
        made = Disentangler(ClassifierShape(model.hidden_size, size=24, queries=2, key=5), seed=4)
        artifact = Artifact("ldke", model.fingerprint, {"classifier": made.settings()}, made.tensors())
        model.artifacts[artifact.id] = artifact
        from fastedit.routers.features import prompt_tokens

        tokens = prompt_tokens(state)
        entity, relation = made(tokens)
        kept = {
            "entity": near(entity.detach(), 1),
            "relation": near(relation.detach(), 2),
            "image": near(tokens.centre(), 3),
        }
        options = {"router": "classifier", "artifact": artifact.id, "threshold": 0.6}
        stack = Stack(
            DeltaSpec("localized", (site,), options), {key: F.normalize(each, dim=1) for key, each in kept.items()}
        )
    else:
        heads = ScopeHeads(ScopeShape(model.hidden_size, size=10, hidden=8), seed=1).eval()
        artifact = Artifact("serac", model.fingerprint, {"scope": heads.settings()}, heads.tensors())
        model.artifacts[artifact.id] = artifact
        from fastedit.routers.scope import scope_features

        embedded = heads(scope_features(model, state, heads.shape)).detach()
        options = {"router": "scope", "artifact": artifact.id, "threshold": 0.6}
        stack = Stack(DeltaSpec("counterfactual", (site,), options), {"scope": near(embedded, 4)})
    return make_router(model, stack), state, stack  # type: ignore[arg-type]


def listed(claims: Claims) -> list[tuple[int, int]]:
    return sorted(zip(claims.row.tolist(), claims.edit.tolist(), strict=True))


@pytest.mark.parametrize("name", ["ball", "classifier", "scope"])
def test_a_first_pass_leaves_the_claims_as_they_are(
    name: str, model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, state, stack = routed(model, name)
    whole = Claims.reaching(router.scores(state, stack.fixed, None), router.threshold(stack.fixed))
    assert len(whole.row), "some claim"
    assert len(whole.row) < 3 * STORED / 2, "and many do not"
    found = claims_of(router, state, stack.fixed)
    assert listed(found) == listed(whole)
    kept = next(iter(tables_of(model)._of.values()))
    assert len(kept) == 1, "reduced vectors were used"
    assert listed(claims_of(router, state, stack.fixed)) == listed(whole)
    assert next(iter(tables_of(model)._of.values())) is kept


@pytest.mark.parametrize("name", ["ball", "classifier", "scope"])
def test_an_index_claims_nothing_that_exact_search_does_not(name: str, model: EditableModel) -> None:
    pytest.importorskip("hnswlib")
    router, state, stack = routed(model, name)
    exact = claims_of(router, state, stack.fixed)
    model.index_from = STORED
    found = claims_of(router, state, stack.fixed)
    assert not tables_of(model)._of or len(tables_of(model)._indexes) == 1
    later = torch.arange(STORED)
    # The edit that acts is among those that are nearest
    assert found.best(len(QUERIES), later).tolist() == exact.best(len(QUERIES), later).tolist()
    if name != "classifier":
        assert set(listed(found)) <= set(listed(exact))
    model.index_from = STORED + 1
    assert listed(claims_of(router, state, stack.fixed)) == listed(exact)


def test_vectors_that_were_written_to_are_reduced_again() -> None:
    tables, stack = Tables(), Stack(DeltaSpec("codebook", ()), {})
    stored = torch.randn(reduced.LEAST_ROWS, 2 * reduced.KEPT, generator=torch.Generator().manual_seed(0))
    stored[:, 8:] *= 0.01
    first = tables.reduced(stack, "key", stored)
    assert first is not None
    assert tables.reduced(stack, "key", stored) is first
    stored[3] += 1
    assert tables.reduced(stack, "key", stored) is not first
    stored.normal_()
    assert tables.reduced(stack, "key", stored) is None, "too much is left out"
