"""What routing costs and how often it fires: on a tiny model, with a classifier that is hardly trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from benchmarks import routing
from benchmarks.long_sequence import consistent, held_memories
from fastedit.deltas import stack
from fastedit.pocket.world import render
from fastedit.requests import Query
from fastedit.routers.classifier import Disentangler
from fastedit.routers.scope import trained_part


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    model = fastedit.load("random:llava-tiny")
    pool = fastedit.read_edits("pocket-vqa", split="train", limit=12)
    trainer = {"steps": 4, "batch_size": 6, "valid_every": 4}
    path = tmp_path_factory.mktemp("routing") / "ldke.safetensors"
    artifact = fastedit.train(model, "ldke", pool, out=path, trainer=trainer, valid_records=4, show_progress=False)
    records = list(itertools.islice(consistent("pocket-vqa"), 12))
    return model, records, held_memories(model, records, artifact, threshold=0.2)


def test_costs_of_both_ways(stored: Any) -> None:
    model, records, deltas = stored
    queries = [Query(each.prompt, render(each.scene)) for each in records[:3]]
    rows = routing.costs(model, deltas[:8], queries, (4, 20), repeats=1, recalled=queries, index_to=20)
    assert [(row["stored"], row["at_once"]) for row in rows] == [(4, 1), (4, 3), (20, 1), (20, 3)]
    for row in rows:
        assert all(row[f"{name}_s"] > 0 for name in ("answer", "read", "exact", "whole", "index", "scores"))
        # So few are all named
        assert (row["recall"], row["fires"], row["wrong"]) == (1, 1, 0)
    assert model.index_from is None
    assert "index_s" not in routing.costs(model, deltas[:8], queries, (4,), repeats=1)[0]
    size = sum(each.numel() * each.element_size() for each in deltas[0].tensors.values())
    assert 0 < rows[-1]["bytes_per_edit"] <= size


def test_ways_that_differ_are_not_timed(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, deltas = stored
    monkeypatch.setattr(routing, "by_scores", lambda _holder, _state: [-2])
    with pytest.raises(RuntimeError, match=r"choose differently \(got stored=4,"):
        routing.costs(model, deltas[:4], [Query("What?", render(records[0].scene))], (4,), repeats=1)


def test_shares_of_questions_that_fire(stored: Any, tmp_path: Path) -> None:
    model, records, deltas = stored
    classifier = Disentangler.of(trained_part(model, deltas[0].spec.options), model.device)
    stacked, path = stack(deltas[:2]), tmp_path / "memories.pt"
    kept = routing.remembered(model, records, stacked, classifier, path)
    for name, each in kept.items():
        torch.testing.assert_close(each, torch.stack([delta.tensors[name] for delta in deltas]))
        assert torch.equal(routing.remembered(model, records[:5], stacked, classifier, path)[name], each[:5])
    rows = routing.firing(model, stacked, kept, records, (1, 8), 4)
    assert {row["stored"] for row in rows} == {1, 8}
    assert sum(not row["agreement"] for row in rows) == 2
    for row in rows:
        for kind in ("own", "reworded", "picture", "unseen"):
            assert 0 <= row[f"{kind}_right"] <= row[f"{kind}_any"] <= 1
        assert 0 <= row["foreign_any"] <= 1
    # Of one edit its own question alone is asked, and its vectors are those of that question
    assert rows[-1]["own_right"] == rows[0]["own_right"] == 1


def test_more_edits_than_records_have_vectors_of_the_same_lengths() -> None:
    known = {"entity": torch.nn.functional.normalize(torch.randn(5, 8), dim=1)}
    made = routing.extended(known, 12, 0.3)["entity"]
    assert torch.equal(made[:5], known["entity"])
    torch.testing.assert_close(made.norm(dim=1), torch.ones(12))
    assert torch.pdist(made).min() > 0
    assert torch.equal(routing.extended(known, 3, 0.3)["entity"], known["entity"][:3])
