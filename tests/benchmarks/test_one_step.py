"""A step along a gradient has the size that it is given, and shares are of the best size for each edit."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import one_step
from fastedit.methods.meta.hypernets import Gradients


def gradients() -> Gradients:
    generator = torch.Generator().manual_seed(0)
    x = tuple(torch.randn(2, 3, width, generator=generator) for width in (5, 7))
    grad = tuple(torch.randn(2, 3, width, generator=generator) for width in (4, 6))
    return Gradients(x, grad, tuple(torch.ones(2, 3, dtype=torch.bool) for _ in x), torch.zeros(2))


def test_the_change_of_all_maps_has_the_size_and_goes_downhill() -> None:
    given = gradients()
    changes = [(down @ up).mT for down, up in one_step.Step(2.5)(given, [])]
    slopes = [grad.mT @ x for x, grad in zip(given.x, given.grad, strict=True)]
    for edit in range(2):
        change = torch.cat([each[edit].flatten() for each in changes])
        slope = torch.cat([each[edit].flatten() for each in slopes])
        assert change.norm() == pytest.approx(2.5, rel=1e-5)
        assert torch.cosine_similarity(change, slope, dim=0) == pytest.approx(-1, abs=1e-5)


def test_the_oracle_takes_the_best_size_of_each_edit() -> None:
    outcome = one_step.Outcome({1.0: [1.0, 0.0, 0.0], 3.0: [0.0, 1.0, 0.0]}, [1, 5, 1], [4, 0, 0])
    assert outcome.best == [1.0, 1.0, 0.0]
    found = list(one_step.rows(1, outcome))
    assert [row["said"] for row in found[:3]] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    groups = {row["group"]: (row["edits"], row["said"]) for row in found[3:]}
    assert groups == {
        "up to three, an answer of training": (1, 1.0),
        "four tokens or more, no answer of training": (1, 1.0),
        "up to three, no answer of training": (1, 0.0),
    }


def test_stored_rows_have_every_size_and_the_oracle() -> None:
    rows = [json.loads(line) for line in one_step.STORED.read_text(encoding="utf-8").splitlines()]
    for layers in {row["layers"] for row in rows}:
        own = [row for row in rows if row["layers"] == layers and "group" not in row]
        assert [row["size"] for row in own] == [*one_step.SIZES, "oracle"]
        assert own[-1]["said"] >= max(row["said"] for row in own[:-1])
