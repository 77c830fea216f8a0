"""Balls around keys: distances of prompts, on the model's own states."""

from __future__ import annotations

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.deltas import DeltaSpec
from fastedit.deltas.kinds import new_stack
from fastedit.routers.ball import BallRouter, prompt_keys
from fastedit.routers.claims import Claims
from fastedit.testing import assert_close
from tests.engine.conftest import picture

ASKED = [
    Query("What is it?", picture(1), "a red cat"),
    Query("Who is that?", None, "me"),
    Query("Why?", picture(2), "b"),
]


@pytest.fixture(scope="module", params=[0, 1])
def layer(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def walked(model: EditableModel, layer: int, *, answers: bool) -> PackedState:
    return packed_prefix(model, packed_start(model, model.encode(ASKED, answers=answers)), layer, "ffn")


def test_answers_do_not_change_the_key_of_a_prompt(model: EditableModel, layer: int) -> None:
    keys = prompt_keys(model, layer, walked(model, layer, answers=False))
    assert keys.shape == (3, model.hidden_size)
    assert_close(prompt_keys(model, layer, walked(model, layer, answers=True)), keys, length=64)


def test_scores_and_thresholds(model: EditableModel, layer: int) -> None:
    (site,) = model.sites([layer], ["down"])
    stacked = new_stack(DeltaSpec("codebook", (site,), {"values": 1}), 2, dtype=torch.float64)
    state = walked(model, layer, answers=False)
    keys, place = prompt_keys(model, layer, state), f"{layer}.down:"
    for edit, row in enumerate((2, 0)):
        stacked.set(edit, {f"{place}key": keys[row], f"{place}radius": torch.tensor([0.5 + edit])})
    router = BallRouter(model, stacked)
    every = router.scores(state, stacked.fixed, None)
    assert every.shape == (3, 2)
    assert_close(every, -torch.stack([(keys - keys[2]).norm(dim=1), (keys - keys[0]).norm(dim=1)], 1), length=64)
    # a key's own prompt is at distance 0, exactly
    assert float(every[2, 0]) == 0.0
    assert float(every[0, 1]) == 0.0
    own = torch.tensor([0, 1, 1])
    assert_close(router.scores(state, stacked.fixed, own), every[torch.arange(3), own], length=64)
    assert router.threshold(stacked.fixed).tolist() == [-0.5, -1.5]
    claims, dense = router.claims(state, stacked.fixed), Claims.reaching(every, router.threshold(stacked.fixed))
    assert list(zip(claims.row.tolist(), claims.edit.tolist(), strict=True)) == list(
        zip(dense.row.tolist(), dense.edit.tolist(), strict=True)
    )
    assert_close(claims.score, dense.score, length=64)
