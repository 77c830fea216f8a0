"""Routing by how far an edit moves a prompt, on the model's own activations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.backbone.probe import feed_forward_parts
from fastedit.deltas import DeltaSpec
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.side import SideDelta
from fastedit.routers.distance import DistanceRouter
from fastedit.testing import assert_close
from tests.engine.conftest import picture

ASKED = [Query("What is it then?", picture(1)), Query("Who is that over there?", None), Query("Why?", picture(2))]
OPTIONS = {"alpha": 1.0, "beta": 2.0, "gamma": 1.0, "weight": 1.0, "share": 0.5, "keep": 0.2}


@pytest.fixture(scope="module", params=["llava", "blip2"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float64")


def made(model: EditableModel, layer: int, tokens: str, name: str = "down") -> tuple[SideDelta, PackedState]:
    (site,) = model.sites([layer], [name])
    stacked: SideDelta = new_stack(DeltaSpec("side", (site,), {**OPTIONS, "tokens": tokens}), 2, dtype=torch.float64)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=torch.Generator().manual_seed(1)))
    stacked.fixed[f"{layer}.{name}:threshold"][:, 0] = torch.tensor([1.0, 2.0])
    encoded = model.encode(ASKED, answers=False)
    return stacked, packed_prefix(model, packed_start(model, encoded), layer, "ffn")


@pytest.mark.parametrize("tokens", ["all", "after_image", "last"])
@pytest.mark.parametrize("name", ["down", "up"])
def test_scores_are_distances_averaged_over_a_prompts_tokens(model: EditableModel, tokens: str, name: str) -> None:
    stacked, state = made(model, 0, tokens, name)
    router = DistanceRouter(model, stacked)
    every = router.scores(state, stacked.fixed, None)
    assert every.shape == (3, 2)
    x, y = feed_forward_parts(model, 0, state.hidden, name)
    starts = [0, *torch.tensor(state.counts).cumsum(0).tolist()]
    for row in range(3):
        chosen = list(range(starts[row], starts[row + 1]))
        if tokens == "last":
            chosen = chosen[-1:]
        elif tokens == "after_image" and state.image is not None:
            images = [t for t in chosen if bool(state.image[t])]
            chosen = [t for t in chosen if not images or t > images[-1]] or chosen[-1:]
        for edit in range(2):
            moved = functional.silu(y + x @ stacked.parts[f"0.{name}:delta"][edit].T) - functional.silu(y)
            assert_close(every[row, edit], moved[chosen].norm(dim=1).mean() / (1 + edit), length=100)
    own = torch.tensor([1, 0, 1])
    assert_close(router.scores(state, stacked.fixed, own), every[torch.arange(3), own], length=100)
    assert router.threshold(stacked.fixed).tolist() == [1.0, 1.0]


def test_a_memory_without_edits_acts_nowhere(model: EditableModel) -> None:
    stacked, state = made(model, 0, "last")
    stacked.fixed["0.down:threshold"][1] = torch.inf
    scores = DistanceRouter(model, stacked).scores(state, stacked.fixed, None)
    assert bool((scores[:, 1] == 0).all())
    assert bool((scores[:, 0] > 0).all())


def test_the_last_layer_has_the_last_tokens(model: EditableModel) -> None:
    """Others are not walked there: whatever is asked for, they are what is averaged over."""
    last = model.n_layers - 1
    found = []
    for tokens in ("all", "after_image", "last"):
        stacked, state = made(model, last, tokens)
        found.append(DistanceRouter(model, stacked).scores(state, stacked.fixed, None))
    assert_close(found[0], found[2], length=100)
    assert_close(found[1], found[2], length=100)


def test_the_weight_is_not_read(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized module has none of the usual form; its forward is all there is."""
    stacked, state = made(model, 0, "last")
    router = DistanceRouter(model, stacked)
    before = router.scores(state, stacked.fixed, None)
    module = model.module(stacked.spec.sites[0])
    forward, weight, bias = module.forward, module.weight, module.bias
    del module._parameters["weight"]

    def hidden_weight(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    monkeypatch.setattr(module, "forward", hidden_weight)
    try:
        assert torch.equal(router.scores(state, stacked.fixed, None), before)
    finally:
        module._parameters["weight"] = weight
    assert forward is not None


@pytest.mark.parametrize("room", [1, 10_000, 1 << 22])
def test_all_memories_are_asked_together(model: EditableModel, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever there is room for at a time; and own ones in any order, some without a row."""
    monkeypatch.setattr("fastedit.deltas.side._TOGETHER", {"cpu": room})
    (site,) = model.sites([0], ["down"])
    spec = DeltaSpec("side", (site,), {**OPTIONS, "tokens": "all"})
    stacked: SideDelta = new_stack(spec, 7, dtype=torch.float64)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=torch.Generator().manual_seed(2)))
    stacked.fixed["0.down:threshold"][:, 0] = torch.arange(1.0, 8.0)
    state = packed_prefix(model, packed_start(model, model.encode(ASKED, answers=False)), 0, "ffn")
    router = DistanceRouter(model, stacked)
    with torch.no_grad():
        every = router.scores(state, stacked.fixed, None)
        x, output = feed_forward_parts(model, 0, state.hidden, "down")
        starts = [0, *torch.tensor(state.counts).cumsum(0).tolist()]
        for edit in range(7):
            distance = stacked.distances(edit, x, output)
            for row in range(3):
                mean = distance[starts[row] : starts[row + 1]].mean() / (1 + edit)
                assert_close(every[row, edit], mean, length=100)
        for own in ([5, 0, 3], [2, 2, 6]):
            chosen = router.scores(state, stacked.fixed, torch.tensor(own))
            assert_close(chosen, every[range(3), own], length=100)


def test_a_pass_over_all_memories_is_no_pass_for_each(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked, state = made(model, 0, "all")
    calls: list[int] = []
    monkeypatch.setattr(stacked, "distances", lambda edit, *_rest: calls.append(edit))
    router = DistanceRouter(model, stacked)
    router.scores(state, stacked.fixed, None)
    router.scores(state, stacked.fixed, torch.tensor([0, 1, 1]))
    assert not calls
