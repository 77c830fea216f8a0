"""What enters modules where answers are predicted."""

from __future__ import annotations

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.methods.captured import answer_inputs, captured
from tests.backbone.padded import prefix, tail
from tests.engine.conftest import picture

QUERIES = [Query("What is it?", picture(1), "a red cat"), Query("And the capital?", None, "Paris")]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.mark.parametrize("name", ["q", "up"])
def test_they_are_those_of_the_stock_forward(model: EditableModel, name: str) -> None:
    sites = model.sites([0, model.n_layers - 1], [name])
    ((found, counts),) = answer_inputs(model, QUERIES, sites)
    encoded = model.encode(QUERIES, answers=True)
    with captured(model, sites) as inputs:
        tail(model, prefix(model, encoded, 0))
    for site in sites:
        torch.testing.assert_close(found[site], inputs[site][encoded.label_mask])
    assert counts == tuple(encoded.label_mask.sum(1).tolist())


def test_questions_come_in_order_some_at_a_time(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = model.sites([1], ["up"])
    ((whole, counts),) = answer_inputs(model, QUERIES, sites)
    monkeypatch.setattr("fastedit.methods.captured.QUESTIONS", 1)
    parts = list(answer_inputs(model, QUERIES, sites))
    assert [part[1] for part in parts] == [(count,) for count in counts]
    torch.testing.assert_close(torch.cat([part[0][sites[0]] for part in parts]), whole[sites[0]])


def test_no_hook_remains(model: EditableModel) -> None:
    sites = model.sites([0], ["q"])
    with pytest.raises(RuntimeError), captured(model, sites):
        raise RuntimeError
    assert not model.module(sites[0])._forward_pre_hooks
