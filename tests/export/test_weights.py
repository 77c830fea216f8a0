"""What is no change of weights is refused by name and told what serves instead."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta, company
from fastedit.export.weights import require_linear, require_sum, require_weights


def delta(kind: str, texts: dict[str, str] | None = None, **options: Any) -> EditDelta:
    spec = DeltaSpec(kind, (Site(1, "down", "layers.1.down", 4, 3),), options)
    return EditDelta(spec, {"1.down:delta": torch.zeros(3, 4)}, request_id="e1", texts=texts or {})


def test_full_and_low_rank_are_weights() -> None:
    require_weights([delta("full"), delta("low_rank", rank=2, router=None), delta("full", positions="all")], "peft")


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (delta("codebook"), "a delta of kind 'codebook' is none"),
        (delta("low_rank", rank=1, router="ball"), "acts on the prompts that its router 'ball' chooses"),
        (delta("full", positions="after_image"), "acts on some tokens of a prompt"),
        (delta("full", {"template": "Now {prompt}"}), "asks another question"),
    ],
    ids=["kind", "router", "positions", "template"],
)
def test_all_else_is_refused(refused: EditDelta, why: str) -> None:
    with pytest.raises(
        ValueError, match=r"fastedit.attach lets it act .* \(got deltas\[1\] of request 'e1'\)"
    ) as error:
        require_weights([delta("full"), refused], "peft")
    assert why in str(error.value)


class _Layers(nn.Module):
    """Two layers, of which both have the same map, one has a map of its own, and one a block that is none."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 3)
        first = nn.ModuleDict({"shared": shared, "down": nn.Linear(4, 3)})
        self.layers = nn.ModuleList([first, nn.ModuleDict({"shared": shared, "block": nn.Sequential(nn.Linear(4, 4))})])

    def module(self, site: Site) -> nn.Module:
        return self.get_submodule(site.module_path)


def beside(path: str) -> EditDelta:
    return replace(delta("full"), spec=DeltaSpec("full", (Site(0, "down", path, 4, 3),)))


def test_only_linear_maps_that_stand_in_one_place_have_a_weight_to_change() -> None:
    layers = _Layers()
    model: Any = SimpleNamespace(hf=layers, module=layers.module)
    require_linear(model, [beside("layers.0.down")], "merged")
    with pytest.raises(ValueError, match=r"'layers.1.block' is a Sequential, .* fastedit.attach"):
        require_linear(model, [beside("layers.0.down"), beside("layers.1.block")], "merged")
    with pytest.raises(ValueError, match=r"got paths=\['layers.0.shared', 'layers.1.shared'\]"):
        require_linear(model, [beside("layers.1.shared")], "merged")


def test_maps_beneath_an_adapter_are_refused() -> None:
    layers = _Layers()
    wrapper = nn.Module()
    wrapper.base_layer = layers.layers[0]["down"]
    layers.layers[0]["down"] = wrapper
    model: Any = SimpleNamespace(hf=layers, module=layers.module)
    with pytest.raises(ValueError, match=r"at 'layers.0.down' an adapter is a part of that already; merge it first"):
        require_linear(model, [beside("layers.0.down")], "peft")


def test_only_a_sequence_adds_up() -> None:
    first = replace(delta("full"), fitted_on=())
    second = replace(delta("full"), fitted_on=company([first]), request_id="e2")
    require_sum([first], "split it")
    require_sum([first, second], "split it")
    with pytest.raises(ValueError, match=r"split it \(got: deltas\[1\] \(request 'e1'\) was fitted alone, .*scored\)$"):
        require_sum([first, first], "split it")
    with pytest.raises(ValueError, match=r"split it \(got: deltas\[0\] \(request 'e2'\) was fitted on top of"):
        require_sum([second], "split it")
