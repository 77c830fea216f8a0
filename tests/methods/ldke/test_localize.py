"""Localization: scores against autograd in float64, which layers are chosen of them, the controls."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import ViewSource
from fastedit.methods.ldke import localize
from fastedit.methods.ldke.localize import (
    GROUPS,
    best_layers,
    brute_force,
    gradient_times_activation,
    layer_scores,
    random_layers,
    trace,
    voted_layers,
    weight_gradient_norm,
)
from fastedit.objectives import ROLES, Role
from tests.engine.conftest import make_edits


class Untimed:
    def phase(self, _name: str) -> Any:
        return nullcontext()


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(request.param, dtype="float64")


@pytest.fixture(scope="module")
def rows(model: EditableModel) -> list[EditRows]:
    edits = make_edits(3)
    views = ViewSource(edits, None, source="record")
    spec = DeltaSpec("full", tuple(model.sites(range(model.n_layers), ["down"])))
    # The second edit lacks a view
    return prepare(
        model, spec, [views.views(n, ROLES if n != 1 else (Role.EDIT, Role.TEXT_LOCALITY)) for n in range(3)], Untimed()
    )


def sites_of(model: EditableModel) -> Any:
    return model.sites(range(model.n_layers), ["down"])


def by_autograd(model: EditableModel, rows: EditRows, row: int, site: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of one row's mean NLL by a site's weight and by its output, and that output: the row alone, by autograd.

    The output is cut to the tokens before the end: (tokens, d_out).
    """
    from fastedit.backbone.packed_forward import packed_tail

    module = model.module(site)
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    weight = module.weight
    weight.requires_grad_(True)
    handle = module.register_forward_hook(keep)
    try:
        logits = model.head(packed_tail(model, rows.state.of_row(row)))
        starts = [sum(rows.state.wanted_counts[:n]) for n in (row, row + 1)]
        loss = torch.nn.functional.cross_entropy(logits, rows.labels[starts[0] : starts[1]])
        grad, out_grad = torch.autograd.grad(loss, [weight, kept[0]])
    finally:
        handle.remove()
        weight.requires_grad_(False)
    return grad, kept[0].detach()[0], out_grad[0]


def test_scores_equal_those_of_autograd_row_by_row(model: EditableModel, rows: list[EditRows]) -> None:
    own = rows[0]
    sites = sites_of(model)
    for traced, site in zip(trace(model, sites, own.state, own.labels), sites, strict=True):
        norms = weight_gradient_norm(traced, len(own.state))
        effects = {name: gradient_times_activation(traced, len(own.state), [name]) for name in localize.GROUPS}
        every = gradient_times_activation(traced, len(own.state))
        for row in range(len(own.state)):
            grad, output, out_grad = by_autograd(model, own, row, site)
            torch.testing.assert_close(norms[row], grad.norm(), rtol=1e-9, atol=1e-14)
            effect = (output * out_grad).sum(1).abs()
            state = own.state.of_row(row)
            wanted = state.wanted if len(output) == state.hidden.shape[0] else torch.arange(len(output))
            torch.testing.assert_close(effects["last"][row], effect[wanted[0]], rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(effects["answer"][row], effect[wanted[1:]].sum(), rtol=1e-9, atol=1e-14)
            if state.image is not None and len(output) == state.hidden.shape[0]:
                expected = effect[state.image & ~torch.isin(torch.arange(len(effect)), state.wanted)].sum()
                torch.testing.assert_close(effects["image"][row], expected, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(every[row], sum(e[row] for e in effects.values()), rtol=1e-9, atol=1e-14)


def test_tokens_of_a_group_alone(model: EditableModel, rows: list[EditRows]) -> None:
    (traced,) = trace(model, sites_of(model)[:1], rows[0].state, rows[0].labels)
    size = len(rows[0].state)
    last = weight_gradient_norm(traced, size, ["last"])
    for row in range(size):
        token = ((traced.row == row) & (traced.group == localize.GROUPS.index("last"))).nonzero().item()
        expected = traced.x[token].norm() * traced.grad[token].norm()
        torch.testing.assert_close(last[row], expected, rtol=1e-9, atol=1e-14)
    assert bool((weight_gradient_norm(traced, size) > last).any())
    with pytest.raises(ValueError, match="groups are of"):
        gradient_times_activation(traced, size, ["first"])


@pytest.mark.parametrize("score", localize.SCORES)
def test_views_agree_and_probes_count_against(model: EditableModel, rows: list[EditRows], score: str) -> None:
    sites = sites_of(model)
    found = layer_scores(model, sites, rows, score=score, probes=0.25)
    for edit, own in enumerate(rows):
        found_here = trace(model, sites, own.state, own.labels)
        size = len(own.state)
        if score == "weight":
            tables = [torch.stack([weight_gradient_norm(traced, size) for traced in found_here], 1)]
        else:
            tables = [
                torch.stack([gradient_times_activation(traced, size, [group]) for traced in found_here], 1)
                for group in GROUPS
            ]
        # No token of a group, as images in text questions: the other groups speak alone
        parts = torch.stack([table / table.sum(1, keepdim=True) for table in tables])
        table = parts.nanmean(0)
        changes = torch.tensor([role <= Role.IMAGE_REPHRASE for role in own.row_roles])
        expected = table[changes].mean(0) - 0.25 * table[~changes].mean(0)
        torch.testing.assert_close(found[edit], expected, rtol=1e-9, atol=1e-12)
    alone = layer_scores(model, sites, rows[1:2], score=score, probes=0.25)
    torch.testing.assert_close(alone[0], found[1], rtol=1e-9, atol=1e-12)
    without = layer_scores(model, sites, rows, score=score, probes=0.0)
    torch.testing.assert_close(without.sum(1), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="score is one of"):
        layer_scores(model, sites, rows, score="gradient")


def test_nothing_stays_hooked(model: EditableModel, rows: list[EditRows]) -> None:
    sites = sites_of(model)
    layer_scores(model, sites, rows)
    assert not any(model.module(site)._forward_hooks for site in sites)


SCORES = torch.tensor([[0.1, 0.5, 0.2, 0.45], [0.4, 0.1, 0.3, 0.25], [0.4, 0.3, 0.2, 0.1]])


def test_the_best_layers_of_every_edit() -> None:
    assert best_layers(SCORES, 2) == [(1, 3), (0, 2), (0, 1)]
    assert best_layers(SCORES, 2, window=True) == [(1, 2), (2, 3), (0, 1)]
    assert best_layers(SCORES, 4) == [(0, 1, 2, 3)] * 3
    with pytest.raises(ValueError, match="count is 1 to 4"):
        best_layers(SCORES, 5)


def test_one_set_by_vote() -> None:
    # 0 has two votes; 1, 2 and 3 one or two: 1 is in two sets
    assert voted_layers(SCORES, 2) == (0, 1)
    assert voted_layers(SCORES, 1) == (0,)
    assert voted_layers(SCORES[:1], 2) == (1, 3)
    assert voted_layers(SCORES[[0, 2]], 2, window=True) == (0, 1)


def test_controls() -> None:
    assert random_layers(6, 3, "a") == random_layers(6, 3, "a")
    assert len({random_layers(6, 3, str(seed)) for seed in range(20)}) > 5
    ranked = brute_force(lambda chosen: -abs(sum(chosen) - 3), 4, 2)
    assert list(ranked) == [(0, 3), (1, 2), (0, 2), (1, 3), (0, 1), (2, 3)]
