"""A change that all edits share, taken from an artifact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta, Rows, installed, load_deltas, save_deltas, stack
from fastedit.deltas.counterfactual import PREFIX, shared_shapes


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def spec_of(model: EditableModel, rank: int) -> DeltaSpec:
    options = {"scope_size": 3, "rank": rank, "scale": 2.0, "artifact": "made"}
    return DeltaSpec("counterfactual", tuple(model.sites([1], ["q", "down"])), options)


@pytest.mark.parametrize("rank", [0, 2])
def test_every_token_gets_the_shared_change(model: EditableModel, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(model, rank)
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shared_shapes(spec).items()}
    artifact = SimpleNamespace(tensors={PREFIX + name: weight for name, weight in weights.items()})
    monkeypatch.setitem(model.artifacts, "made", artifact)
    deltas = [EditDelta(spec, {"scope": torch.full((3,), float(n), dtype=torch.float64)}) for n in range(2)]
    stacked = stack(deltas)
    with installed(model, stacked, Rows((1, 2)), route=False):
        for site in spec.sites:
            x = torch.randn(3, 4, site.d_in, dtype=torch.float64)
            part = f"{site.layer}.{site.name}"
            if rank:
                change = 2.0 * (weights[f"{part}:down"] @ weights[f"{part}:up"]).T
            else:
                change = weights[f"{part}:delta"]
            module = model.module(site)
            expected = module.forward(x) + x @ change.T
            torch.testing.assert_close(module(x), expected)
    assert stacked.fixed["scope"].tolist() == [[0.0] * 3, [1.0] * 3]
    assert not stacked.part_names()


def test_it_does_not_act_without_its_artifact(model: EditableModel) -> None:
    delta = EditDelta(spec_of(model, 0), {"scope": torch.zeros(3)})
    with pytest.raises(ValueError, match="load_artifact"), installed(model, stack([delta]), Rows(), route=False):
        pass


def test_saved_edits_are_text_and_a_place(model: EditableModel, tmp_path: Path) -> None:
    delta = EditDelta(spec_of(model, 0), {"scope": torch.arange(3.0)}, texts={"template": "a b {prompt}"})
    path = save_deltas([delta], tmp_path / "deltas.safetensors")
    (found,) = load_deltas(path)
    assert found.spec == delta.spec
    assert found.texts == delta.texts
    assert torch.equal(found.tensors["scope"], delta.tensors["scope"])
    assert path.stat().st_size < 4096
