"""What hypernetworks share: gradients as pairs, factors that act with gradients, statistics, artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import DeltaSpec, EditDelta, Rows, installed, stack
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import ViewSource
from fastedit.methods.mend import MENDConfig, MendNetwork
from fastedit.methods.meta.hypernets import Acting, Gradients, Scale, computed, edit_gradients, restore, sketch
from fastedit.objectives import ROLES, Role
from fastedit.training import Artifact
from tests.engine.conftest import make_edits


@pytest.fixture(scope="module", params=["llava", "blip2"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float64")


def sites(model: EditableModel, *, layers: int = 2, positions: str = "all") -> DeltaSpec:
    chosen = model.sites(range(model.n_layers - layers, model.n_layers), ["up", "down"])
    return DeltaSpec("low_rank", tuple(chosen), {"rank": 1, "scale": 1.0, "positions": positions})


def rows_of(model: EditableModel, spec: DeltaSpec, count: int, roles: Any = (Role.EDIT,)) -> list[EditRows]:
    edits = make_edits(count)
    source = ViewSource(edits, None, source="record")
    return prepare(model, spec, [source.views(index, roles) for index in range(count)], PhaseTimer())


@contextmanager
def free_weights(model: EditableModel, spec: DeltaSpec) -> Iterator[list[Any]]:
    weights: list[Any] = [model.module(site).weight for site in spec.sites]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def assert_close(a: Tensor, b: Tensor) -> None:
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-7 * float(b.abs().max() + 1e-6))


def test_pairs_make_up_the_gradient_of_the_weight(model: EditableModel) -> None:
    spec = sites(model)
    rows = rows_of(model, spec, 3)
    gradients = edit_gradients(model, spec.sites, rows)
    for edit, own in enumerate(rows):
        with free_weights(model, spec) as weights:
            logits = model.head(packed_tail(model, own.state))
            loss = torch.nn.functional.cross_entropy(logits, own.labels)
            expected = torch.autograd.grad(loss * len(own.labels), weights)
        assert gradients.nll[edit].item() == pytest.approx(loss.item(), rel=1e-6)
        for site, whole in enumerate(expected):
            made = gradients.grad[site][edit].T @ gradients.x[site][edit]
            assert float(whole.abs().max()) > 0
            assert_close(made, whole)


def test_only_the_edit_view_counts_and_edits_are_apart(model: EditableModel) -> None:
    spec = sites(model)
    together = edit_gradients(model, spec.sites, rows_of(model, spec, 3))
    with_views = edit_gradients(model, spec.sites, rows_of(model, spec, 3, ROLES))
    for edit, own in enumerate(rows_of(model, spec, 3)):
        (alone, among) = edit_gradients(model, spec.sites, [own]), with_views
        for site in range(len(spec.sites)):
            count = int(alone.mask[site].sum())
            assert int(together.mask[site][edit].sum()) == count
            for name in ("x", "grad"):
                single = getattr(alone, name)[site][0, :count]
                assert_close(getattr(together, name)[site][edit, :count], single)
                assert_close(getattr(among, name)[site][edit, :count], single)


def test_tokens_that_change_nothing_are_left_out(model: EditableModel) -> None:
    spec = sites(model)
    rows = rows_of(model, spec, 3)
    gradients = edit_gradients(model, spec.sites, rows)
    for site in range(len(spec.sites)):
        kept = gradients.mask[site]
        live = (gradients.x[site] != 0).any(-1) & (gradients.grad[site] != 0).any(-1)
        assert torch.equal(live, kept)
        assert kept.any(1).all()
        # What is filled up comes last
        assert torch.equal(kept, kept.sort(dim=1, descending=True).values)
    # In the last layer only tokens that carry labels have a gradient
    last = [n for n, site in enumerate(spec.sites) if site.layer == model.n_layers - 1]
    assert [gradients.mask[n].sum(1).tolist() for n in last] == [[len(own.labels) for own in rows]] * len(last)


def test_gradients_are_those_of_the_model_as_it_acts(model: EditableModel) -> None:
    spec = sites(model)
    rows = rows_of(model, spec, 2)
    before = edit_gradients(model, spec.sites, rows)
    down = torch.randn(1, spec.sites[0].d_in, 2, dtype=torch.float64)
    up = torch.randn(1, 2, spec.sites[0].d_out, dtype=torch.float64)
    one = DeltaSpec("low_rank", spec.sites[:1], spec.options)
    acting: Any = Acting(one, [(down, up)])
    with installed(model, acting, Rows(), route=False):
        during = edit_gradients(model, spec.sites, rows)
    after = edit_gradients(model, spec.sites, rows)
    assert not torch.allclose(during.nll, before.nll)
    assert torch.equal(after.nll, before.nll)
    assert all(torch.equal(a, b) for a, b in zip(after.grad, before.grad, strict=True))


def factors_of(
    spec: DeltaSpec, size: int, rank: int, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, site.d_in, rank, generator=generator, dtype=dtype),
            torch.randn(size, rank, site.d_out, generator=generator, dtype=dtype) * 0.1,
        )
        for site in spec.sites
    ]


def test_factors_act_like_weights_and_carry_gradients(model: EditableModel) -> None:
    spec = sites(model)
    rows = rows_of(model, spec, 1)[0]
    factors = [(down.requires_grad_(), up.requires_grad_()) for down, up in factors_of(spec, 1, 3)]
    acting: Any = Acting(spec, factors)
    with installed(model, acting, Rows((1,)), route=False):
        logits = model.head(packed_tail(model, rows.state))
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, rows.labels), [f for p in factors for f in p])
    with free_weights(model, spec) as weights, torch.no_grad():
        kept = [weight.detach().clone() for weight in weights]
        for weight, (down, up) in zip(weights, factors, strict=True):
            weight += (down[0] @ up[0]).T
        with torch.enable_grad():
            expected = model.head(packed_tail(model, rows.state))
            whole = torch.autograd.grad(torch.nn.functional.cross_entropy(expected, rows.labels), weights)
        for weight, own in zip(weights, kept, strict=True):
            weight.copy_(own)
    assert_close(logits, expected)
    for site, (down, up) in enumerate(factors):
        assert_close(grads[2 * site][0], whole[site].T @ up[0].T)
        assert_close(grads[2 * site + 1][0], down[0].T @ whole[site].T)


@pytest.mark.parametrize("positions", ["all", "after_image"])
def test_written_deltas_act_like_the_factors(model: EditableModel, positions: str) -> None:
    spec = sites(model, positions=positions)
    rows = rows_of(model, spec, 2)
    gradients = edit_gradients(model, spec.sites, rows)
    factors = [
        (x.double().transpose(1, 2), -0.1 * g.double()) for x, g in zip(gradients.x, gradients.grad, strict=True)
    ]
    made = computed(spec, factors)
    ranks = [each.options["rank"] for each in made]
    assert ranks == [max(int(mask[edit].sum()) for mask in gradients.mask) for edit in range(2)]
    state = type(rows[0].state).cat([own.state for own in rows])
    acting: Any = Acting(spec, factors)
    outputs = []
    deltas = [EditDelta(DeltaSpec(spec.kind, spec.sites, {**spec.options, **w.options}), w.tensors) for w in made]
    for stacked in (acting, stack(deltas, dtype=torch.float64)):
        with torch.no_grad(), installed(model, stacked, Rows((1, 1)), route=False):
            outputs.append(packed_tail(model, state))
    assert_close(outputs[1], outputs[0])
    with torch.no_grad():
        assert not torch.allclose(outputs[0], packed_tail(model, state))


def test_after_image_leaves_image_tokens_out() -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    whole, behind = sites(model), sites(model, positions="after_image")
    many = edit_gradients(model, whole.sites, rows_of(model, whole, 2))
    few = edit_gradients(model, behind.sites, rows_of(model, behind, 2))
    assert (few.mask[0].sum(1) < many.mask[0].sum(1)).all()
    assert_close(few.nll, many.nll)


def test_edits_without_gradient_are_written_as_nothing() -> None:
    model = fastedit.load("random:llava-tiny")
    spec = sites(model)
    zeros = [(torch.zeros(2, site.d_in, 4), torch.zeros(2, 4, site.d_out)) for site in spec.sites]
    made = computed(spec, zeros)
    assert [each.options["rank"] for each in made] == [1, 1]
    assert all(float(tensor.abs().sum()) == 0 for each in made for tensor in each.tensors.values())


def test_a_summary_is_a_function_of_the_change_alone() -> None:
    model = fastedit.load("random:llava-tiny")
    spec = sites(model)
    factors = factors_of(spec, 2, 5)
    found = sketch(factors)
    assert found.shape == (2, 256 * len(spec.sites))
    order = torch.randperm(5)
    other = [
        (torch.nn.functional.pad(down[..., order] * 2, (0, 3)), torch.nn.functional.pad(up[:, order] / 2, (0, 0, 0, 3)))
        for down, up in factors
    ]
    assert_close(sketch(other), found)
    assert_close(sketch([(down, 3 * up) for down, up in factors]), 3 * found)
    assert not torch.allclose(found[0], found[1])
    # The expected squared norm is that of the change
    norms = torch.stack([(down @ up).square().sum((1, 2)) for down, up in factors]).sum(0)
    seen = torch.stack([sketch(factors, seed=seed).square().sum(1) for seed in range(200)]).mean(0)
    torch.testing.assert_close(seen, norms, rtol=0.05, atol=0)


def test_dimensions_are_brought_to_size_one() -> None:
    tokens = torch.tensor([[1.0, 0, 4], [3, 0, 4], [5, 0, 4]])
    scale = Scale(3)
    scale.measure(tokens)
    assert scale.deviation.tolist() == pytest.approx([(35 / 3) ** 0.5, 1, 4])
    assert scale(tokens)[0].tolist() == pytest.approx([1 / (35 / 3) ** 0.5, 0, 1])
    with pytest.raises(ValueError, match=r"at least 2 tokens \(got 1\)"):
        scale.measure(tokens[:1])


@pytest.mark.parametrize("directions", [12, 3])
def test_directions_are_brought_to_size_one(directions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    sizes = torch.tensor([30.0, 10, 5] + [1.0] * 9)
    # Many times more tokens than are looked at
    tokens = torch.randn(20_000, 12, generator=generator) * sizes @ mixing
    scale = Scale(12, directions)
    scale.measure(tokens)
    seen = scale(tokens) @ mixing.T
    assert (seen.square().mean(0).sqrt()[:3] - 1).abs().max() < 0.2
    # A share of the mean variance is added everywhere: small directions stay small
    rest = float((1 / (1 + 0.01 * sizes.square().mean())) ** 0.5)
    assert seen.square().mean(0).sqrt()[3:].tolist() == pytest.approx([rest] * 9, rel=0.25)


@pytest.mark.parametrize("count", [8, 24, 64])
def test_statistics_of_few_tokens_blow_nothing_up(count: int) -> None:
    """Directions that no measured token had are as large in others, and come out at a size near one."""
    tokens = 1e-3 * torch.randn(count + 500, 64, generator=torch.Generator().manual_seed(0))
    scale = Scale(64, 48)
    scale.measure(tokens[:count])
    size = scale(tokens[count:]).square().mean().sqrt().item()
    assert 0.7 < size < 1.5


def test_statistics_of_fewer_tokens_than_directions() -> None:
    tokens = torch.eye(6)[:2] * torch.tensor([[2.0], [4.0]])
    scale = Scale(6, 6)
    scale.measure(tokens)
    found = scale(tokens)
    # Mean squares of 2 and 8 shrunk by 10 / 12 towards 20 / 12, and a hundredth of that beside them
    mean = 20 / 12
    assert found[0, 0].item() == pytest.approx(2 / (2 / 6 + mean * 5 / 6 + 0.01 * mean) ** 0.5)
    assert found[1, 1].item() == pytest.approx(4 / (8 / 6 + mean * 5 / 6 + 0.01 * mean) ** 0.5)
    again = Scale(6, 6)
    again.measure(torch.zeros(4, 6))
    assert bool(again(tokens).isfinite().all())


def test_artifacts_of_other_settings_are_refused(model: EditableModel) -> None:
    spec = sites(model)
    network = MendNetwork(spec.sites, MENDConfig(rank=3))
    artifact = Artifact("mend", "m", {"rank": 3}, network.state_dict())
    again = MendNetwork(spec.sites, MENDConfig(rank=3, seed=1))
    restore(again, artifact, "mend")
    assert all(torch.equal(tensor, artifact.tensors[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match=r"mend: the artifact has the shape of these settings.*with.*'rank': 3"):
        restore(MendNetwork(spec.sites, MENDConfig(rank=4)), artifact, "mend")
    with pytest.raises(ValueError, match=r"log_(lr|ridge)=\(4,\), now \(1,\)"):
        restore(MendNetwork(spec.sites[:1], MENDConfig(rank=3)), artifact, "mend")
    with pytest.raises(ValueError, match=r"got more=\(1,\), now None"):
        restore(again, Artifact("mend", "m", {}, {**network.state_dict(), "more": torch.ones(1)}), "mend")


def test_gradients_hold_no_graph(model: EditableModel) -> None:
    spec = sites(model)
    found: Gradients = edit_gradients(model, spec.sites, rows_of(model, spec, 1))
    assert not any(t.requires_grad for part in (found.x, found.grad) for t in part)
    assert not found.nll.requires_grad
