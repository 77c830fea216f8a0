"""Prefix and tail against the stock forward, at every layer and stage of every family."""

from __future__ import annotations

import pytest
import torch

from fastedit.requests import Query
from tests.backbone.padded import prefix, tail

from .conftest import DISTINCT, TINY, cached_model, largest_gap, mixed_queries, picture, stock_logits

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", TINY)
def test_every_split_equals_the_stock_forward_of_each_row(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=True)
    stock = [stock_logits(model, encoded.select([row])) for row in range(len(encoded))]
    assert min(reference.std().item() for reference in stock) > 0.5, "logits too flat to tell anything"
    for layer in range(model.n_layers):
        for stage in ("attention", "ffn"):
            logits = model.head(tail(model, prefix(model, encoded, layer, stage)))
            for row, reference in enumerate(stock):
                gap = largest_gap(logits[row, : len(reference)], reference)
                assert gap < TOLERANCE, (layer, stage, row, gap)


@pytest.mark.parametrize("name", TINY)
def test_chosen_positions_equal_the_full_tail_there(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=True)
    positions = encoded.label_positions()
    kept = positions >= 0
    assert not kept.all(), "rows with different numbers of labels are wanted"
    for layer in range(model.n_layers):
        for stage in ("attention", "ffn"):
            state = prefix(model, encoded, layer, stage)
            full = tail(model, state)
            chosen = tail(model, state, positions=positions)
            expected = torch.stack([full[row, place] for row, place in enumerate(positions.clamp(min=0))])
            assert chosen.shape == expected.shape
            assert largest_gap(chosen[kept], expected[kept]) < TOLERANCE, (layer, stage)


@pytest.mark.parametrize("name", TINY)
def test_float64_splits_agree_to_rounding(name: str) -> None:
    model = cached_model(name, dtype="float64")
    encoded = model.encode(mixed_queries()[:3], answers=True)
    whole = model.head(tail(model, prefix(model, encoded, 0)))
    for row in range(3):
        reference = stock_logits(model, encoded.select([row]))
        assert largest_gap(whole[row, : len(reference)], reference) < 1e-12
    last = prefix(model, encoded, model.n_layers - 1, "ffn")
    mask = encoded.attention_mask
    assert largest_gap(model.head(tail(model, last))[mask], whole[mask]) < 1e-12


@pytest.mark.parametrize("name", TINY)
def test_stock_batch_of_image_rows_equals_ours(name: str) -> None:
    model = cached_model(name)
    rows = [query for query in mixed_queries() if query.image is not None]
    encoded = model.encode(rows, answers=True)
    if hasattr(getattr(model.hf, "model", None), "rope_deltas"):
        model.hf.model.rope_deltas = None
    stock = model.hf(**encoded.model_inputs).logits
    mask = encoded.attention_mask
    assert largest_gap(model.head(tail(model, prefix(model, encoded, 1)))[mask], stock[mask]) < TOLERANCE


def test_gathered_last_layer_state_gives_the_label_positions() -> None:
    model = cached_model("random:llava-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    positions = encoded.label_positions()
    state = prefix(model, encoded, model.n_layers - 1, "ffn")
    small = state.at(positions)
    assert small.hidden.shape == (*positions.shape, model.hidden_size)
    kept = positions >= 0
    assert largest_gap(tail(model, small)[kept], tail(model, state, positions=positions)[kept]) == 0.0
    with pytest.raises(ValueError, match="only the stage 'ffn'"):
        prefix(model, encoded, 1, "attention").at(positions)
    with pytest.raises(ValueError, match="gathered state must be of the last layer"):
        tail(model, prefix(model, encoded, 1, "ffn").at(positions))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["random:llava-next-tiny", "random:qwen2vl-tiny", "random:blip2-tiny"])
def test_attention_implementations_agree(name: str, attention: str) -> None:
    model, other = cached_model(name), cached_model(name, attention=attention)
    assert other.adapter.text.config._attn_implementation == attention
    encoded = model.encode(mixed_queries(), answers=True)
    mask = encoded.attention_mask
    first, second = (each.head(tail(each, prefix(each, encoded, 1))) for each in (model, other))
    assert largest_gap(first[mask], second[mask]) < TOLERANCE
    assert model.generate(mixed_queries(), max_new_tokens=5) == other.generate(mixed_queries(), max_new_tokens=5)


@pytest.mark.parametrize("name", TINY)
def test_hooks_on_every_site_fire_on_rows_and_carry_gradients(name: str) -> None:
    model = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=True)
    last = model.n_layers - 1
    names = list(model.adapter.text.site_paths)
    sites = model.sites([last - 1, last], names)
    scales, seen, handles = {}, {}, []
    for site in sites:
        module = model.module(site)
        assert (site.d_out, site.d_in) == tuple(module.weight.shape)
        scale = torch.ones(len(encoded), 1, 1, device=model.device, requires_grad=True)
        scales[site.module_path] = scale

        def hook(_module, inputs, output, path=site.module_path, scale=scale):
            seen.setdefault(path, []).append(tuple(inputs[0].shape))
            return output * scale

        handles.append(module.register_forward_hook(hook))
    try:
        state = prefix(model, encoded, last - 1)
        hidden = tail(model, state, positions=encoded.label_positions())
    finally:
        for handle in handles:
            handle.remove()
    # A hook on a lower layer must not have been called by the prefix.
    assert all(len(shapes) == 1 and len(shapes[0]) == 3 for shapes in seen.values()), seen
    assert all(shapes[0][0] == len(encoded) for shapes in seen.values())
    # Only the first row carries loss: no other row's scale may get a gradient.
    hidden[0].pow(2).sum().backward()
    for site in sites:
        gradient = scales[site.module_path].grad.flatten()
        assert gradient[0].abs() > 0, site
        assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:])), site


@pytest.mark.parametrize("name", DISTINCT)
def test_gradient_at_chosen_positions_equals_that_of_the_stock_forward(name: str) -> None:
    model = cached_model(name, dtype="float64")
    encoded = model.encode([mixed_queries()[1]], answers=True)
    site = model.sites([model.n_layers - 2], ["v"])[0]
    shift = torch.zeros(site.d_out, dtype=torch.float64, device=model.device, requires_grad=True)
    handle = model.module(site).register_forward_hook(lambda _m, _i, output: output + shift)
    try:
        if hasattr(getattr(model.hf, "model", None), "rope_deltas"):
            model.hf.model.rope_deltas = None
        stock = model.hf(**encoded.model_inputs).logits[encoded.label_mask]
        (expected,) = torch.autograd.grad(stock.logsumexp(-1).sum(), shift)
        state = prefix(model, encoded, model.n_layers - 2)
        logits = model.head(tail(model, state, positions=encoded.label_positions()))[0]
        (ours,) = torch.autograd.grad(logits.logsumexp(-1).sum(), shift)
    finally:
        handle.remove()
    assert expected.norm() > 1e-3
    assert largest_gap(ours, expected) < 1e-6 * expected.norm().item()


def test_model_is_frozen_and_describes_itself() -> None:
    model = cached_model("random:llava-tiny")
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    assert (model.n_layers, model.hidden_size, model.vocab_size) == (4, 64, 640)
    assert model.dtype == torch.float32
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.head(torch.zeros(2, 3, 64, device=model.device)).shape == (2, 3, 640)


def test_wrong_places_are_refused() -> None:
    model = cached_model("random:llava-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.3 \(got layer=4\)"):
        prefix(model, encoded, 4)
    with pytest.raises(ValueError, match=r"names must be among .*gate.*\(got name='fc1'\)"):
        model.sites([0], ["fc1"])
    with pytest.raises(ValueError, match="got name='gate'"):
        cached_model("random:blip2-tiny").sites([0], ["gate"])


def test_prefix_leaves_the_model_bit_identical() -> None:
    from fastedit.backbone import weights_hash

    model = cached_model("random:qwen3vl-tiny")
    before = weights_hash(model.hf)
    model.generate([Query("what is it?", picture(5))], max_new_tokens=3)
    assert weights_hash(model.hf) == before
