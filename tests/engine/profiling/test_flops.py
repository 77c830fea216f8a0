"""Necessary operations against what torch counts, on small models where both must agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastedit.backbone import EditableModel, Encoded, load
from fastedit.backbone.cpu_linear import OneDnnLinear
from fastedit.deltas import DeltaSpec
from fastedit.engine.profiling.flops import FlopCounter, NecessaryFlops, Peak, nfu
from fastedit.fitting.solver import FitOutcome
from fastedit.requests import Query
from tests.backbone.padded import prefix, tail

MODELS = ("random:qwen2vl-tiny", "random:llava-tiny", "random:blip2-tiny")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    # the counter knows torch's own products
    return load(request.param, linear="torch")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def encode(model: EditableModel, *, images: int = 1) -> Encoded:
    return model.encode(
        [Query("what is on the table", picture(i), "two red cups") for i in range(images)], answers=True
    )


def labels_of(encoded: Encoded) -> list[int]:
    return [int(p) for p in encoded.label_positions()[0].tolist() if p >= 0]


def feed_forward(model: EditableModel, layers: list[int], names: tuple[str, ...] | None = None) -> DeltaSpec:
    known = [name for name in ("up", "gate", "down") if name in model.adapter.text.site_paths]
    return DeltaSpec("full", tuple(model.sites(layers, names or known)))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    # The plain attention backend is made of products that torch's counter knows on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def test_everything_once_is_the_stock_forward(model: EditableModel) -> None:
    # Down of layer 0 edited, labels everywhere: prefix, tail and vision together are one dense forward.
    encoded = encode(model)
    n = encoded.input_ids.shape[1]
    counter = FlopCounter(model, feed_forward(model, [0], ("down",)), causal=False)
    row = counter.row(n, range(n))
    with counting() as counted, torch.no_grad():
        model.hf(**encoded.model_inputs, use_cache=False)
    assert row.prefix + row.forward + counter.vision(encoded) == counted.get_total_flops()


@pytest.mark.parametrize("first", [1, -1])
def test_tail_is_what_the_engine_runs(model: EditableModel, first: int) -> None:
    # With the whole feed-forward block edited nothing of it is constant, and the tail has no product to spare.
    encoded = encode(model)
    n, labels = encoded.input_ids.shape[1], labels_of(encoded)
    layers = list(range(first % model.n_layers, model.n_layers))
    counter = FlopCounter(model, feed_forward(model, layers), causal=False)
    state = prefix(model, encoded, layers[0], "ffn")
    with counting() as counted, torch.no_grad():
        model.head(tail(model, state, positions=encoded.label_positions()))
    assert counter.row(n, labels).forward == counted.get_total_flops()
    if first == 1:
        model.image_features.clear()
        with counting() as counted, torch.no_grad():
            prefix(model, encoded, layers[0], "ffn")
        assert counter.row(n, labels).prefix + counter.vision(encoded) == counted.get_total_flops()


@pytest.mark.parametrize("names", [None, ("down",), ("up", "down")])
def test_backward_is_what_autograd_runs(model: EditableModel, names: tuple[str, ...] | None) -> None:
    encoded = encode(model)
    n, labels = encoded.input_ids.shape[1], labels_of(encoded)
    layers = [model.n_layers - 2, model.n_layers - 1]
    spec = feed_forward(model, layers, names)
    weights = [model.module(site).weight for site in spec.sites]
    state = prefix(model, encoded, layers[0], "ffn")
    try:
        for weight in weights:
            weight.requires_grad_(True)
        # Attention's own backward recomputes nothing with the plain backend.
        with sdpa_kernel(SDPBackend.MATH):
            loss = model.head(tail(model, state, positions=encoded.label_positions())).logsumexp(-1).sum()
        with counting() as counted:
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    assert FlopCounter(model, spec, causal=False).row(n, labels).backward == counted.get_total_flops()


def test_low_rank_counts_its_own_products(model: EditableModel) -> None:
    encoded = encode(model)
    n, labels = encoded.input_ids.shape[1], labels_of(encoded)
    sites = feed_forward(model, [model.n_layers - 1], ("down",)).sites
    rank = 3
    spec = DeltaSpec("low_rank", sites, {"rank": rank, "scale": 1.0})
    state = prefix(model, encoded, sites[0].layer, "ffn")
    down = torch.zeros(sites[0].d_in, rank, requires_grad=True)
    up = torch.zeros(rank, sites[0].d_out, requires_grad=True)
    handle = model.module(sites[0]).register_forward_hook(lambda _m, args, out: out + args[0] @ down @ up)
    try:
        with counting() as counted:
            logits = model.head(tail(model, state, positions=encoded.label_positions()))
            forward = counted.get_total_flops()
            logits.sum().backward()
            both = counted.get_total_flops()
    finally:
        handle.remove()
    row = FlopCounter(model, spec).row(n, labels)
    # The engine runs the frozen maps of the block at every step; they are necessary once.
    d, names = model.hidden_size, [n for n in ("up", "gate", "down") if n in model.adapter.text.site_paths]
    frozen = sum(2 * len(labels) * s.d_in * s.d_out for s in model.sites([sites[0].layer], names))
    assert row.forward == forward - frozen == row.head + 2 * len(labels) * rank * (sites[0].d_in + d)
    assert row.backward == both - forward


def test_a_side_memory_counts_as_the_map_beside_it_and_an_entry_as_none(model: EditableModel) -> None:
    sites = tuple(model.sites([1], ("down",)))
    kinds = ("full", "side", "codebook")
    full, side, entry = (FlopCounter(model, DeltaSpec(kind, sites)).row(9, [6, 8]) for kind in kinds)
    assert side == full
    product = 2 * 9 * sites[0].d_in * sites[0].d_out
    assert (entry.prefix - full.prefix, full.forward - entry.forward) == (product, product)
    assert full.backward - entry.backward == product


def test_rows_without_loss_have_a_prefix_to_the_end_of_the_prompt(model: EditableModel) -> None:
    encoded = encode(model)
    counter = FlopCounter(model, DeltaSpec("side", tuple(model.sites([1], ("down",)))))
    ended = [FitOutcome("max_steps", 3, 1.0, 1.0)]
    alone = counter.batch(encoded, [0], ended, beside_rows=[0])
    end = labels_of(encoded)[0]
    assert (alone.reference, alone.forward, alone.backward) == (0, 0, 0)
    assert alone.prefix == counter.row(end + 1, [end]).prefix
    assert alone.prefix < counter.batch(encoded, [0], ended).prefix


def test_what_another_row_has_is_not_counted(model: EditableModel) -> None:
    counter = FlopCounter(model, feed_forward(model, [1]), causal=False)
    whole, some, fewer = (counter.row(20, [17, 19], begin=begin) for begin in (0, 4, 8))
    for part in ("prefix", "forward", "backward"):
        counts = [getattr(row, part) for row in (whole, some, fewer)]
        assert counts[0] - counts[1] == counts[1] - counts[2] > 0
    encoded, ended = encode(model, images=2), [FitOutcome("max_steps", 3, 1.0, 1.0)]
    counter, labels = FlopCounter(model, feed_forward(model, [1])), labels_of(encoded)
    found = counter.batch(encoded, [0, 0], ended, begins={1: 3})
    row = counter.row(max(labels) + 1, labels)
    assert found.prefix == row.prefix + counter.row(max(labels) + 1, labels, begin=3).prefix


def test_an_entry_begins_at_the_end_of_the_prompt(model: EditableModel) -> None:
    encoded = encode(model)
    spec = DeltaSpec("codebook", tuple(model.sites([1], ("down",))), {"positions": "answer"})
    counter, labels = FlopCounter(model, spec), labels_of(encoded)
    ended = [FitOutcome("max_steps", 1, 1.0, 1.0)]
    assert counter.batch(encoded, [0], ended).forward == counter.row(max(labels) + 1, labels, labels[0]).forward


def test_first_and_last_layer_differ_by_what_is_constant(model: EditableModel) -> None:
    encoded = encode(model)
    n, labels = encoded.input_ids.shape[1], labels_of(encoded)
    counts = [
        FlopCounter(model, feed_forward(model, [layer], ("down",))).row(n, labels)
        for layer in (0, 1, -1 % model.n_layers)
    ]
    assert counts[0].prefix < counts[1].prefix < counts[2].prefix
    assert counts[0].forward > counts[1].forward > counts[2].forward
    assert counts[0].backward > counts[1].backward > counts[2].backward
    # What moves out of the prefix moves into the tail: one pass over all of it is the same, wherever the edit is.
    assert len({c.prefix + c.forward for c in counts}) == 1


def test_causal_attention_counts_less_and_windows_less_still() -> None:
    model = load("random:llava-next-tiny", linear="torch")
    spec = feed_forward(model, [0], ("down",))
    dense, causal = FlopCounter(model, spec, causal=False), FlopCounter(model, spec)
    n, width = 30, model.sites([0], ["q"])[0].d_out
    window = int(model.adapter.text.config.sliding_window)
    assert window < n
    pairs = sum(min(i + 1, window) for i in range(n))
    # Two products in each of the layers, whose queries stand at every position
    saved = 2 * 2 * (n * n - pairs) * width * model.n_layers
    a, b = dense.row(n, range(n)), causal.row(n, range(n))
    assert a.prefix + a.forward - b.prefix - b.forward == saved


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_positions_before_the_first_are_constant(model: EditableModel, kind: str) -> None:
    sites = feed_forward(model, [0, 1]).sites + tuple(model.sites([1], ["q", "k", "v"]))
    spec = DeltaSpec(kind, sites, {"rank": 2} if kind == "low_rank" else {})
    counter, n, labels, first = FlopCounter(model, spec), 12, [9, 10], 6
    all_of_it, behind = counter.row(n, labels), counter.row(n, labels, first)
    assert counter.row(n, labels, 0) == all_of_it
    # One pass over everything costs the same, but for the factors of a low-rank change at constant positions
    if kind == "full":
        assert behind.prefix + behind.forward == all_of_it.prefix + all_of_it.forward
    else:
        assert behind.prefix + behind.forward < all_of_it.prefix + all_of_it.forward
    assert behind.prefix > all_of_it.prefix
    assert behind.head == all_of_it.head
    # With nothing constant before them, labels alone cost at least as much as a row that begins with them
    alone = counter.row(n - first, [label - first for label in labels])
    assert alone.forward <= behind.forward < all_of_it.forward
    assert alone.backward <= behind.backward < all_of_it.backward


def test_gradients_go_to_keys_behind_the_first_alone() -> None:
    # Values of the last layer edited on 4 positions of which 2 are constant; queries stand at the label alone
    model = load("random:llava-tiny", linear="torch")
    last = model.n_layers - 1
    counter = FlopCounter(model, DeltaSpec("full", tuple(model.sites([last], ["v"]))))
    value, width = model.sites([last], ["v"])[0], model.sites([last], ["q"])[0].d_out
    per_position = 2 * value.d_in * value.d_out
    behind, all_of_it = counter.row(4, [3], 2), counter.row(4, [3])
    # Value map at 2 instead of 4 positions, by its weight; weight-value pairs of 2 instead of 4 keys, by the values
    assert all_of_it.backward - behind.backward == 2 * per_position + 2 * 2 * width
    assert all_of_it.forward - behind.forward == 2 * per_position


def test_batch_reads_where_the_image_ends(model: EditableModel) -> None:
    spec = feed_forward(model, [0])
    encoded = encode(model)
    last = int(encoded.image_mask[0].nonzero().max())
    ended = [FitOutcome("diverging", 1, 1.0, 1.0)]
    found = FlopCounter(model, replace(spec, options={"positions": "after_image"})).batch(encoded, [0], ended)
    row = FlopCounter(model, spec).row(int(encoded.lengths[0]), labels_of(encoded), last + 1)
    assert (found.prefix, found.forward, found.backward) == (row.prefix, row.forward, row.backward)
    assert FlopCounter(model, spec).batch(encoded, [0], ended).backward > found.backward


def test_batch_adds_images_once_and_steps_each(model: EditableModel) -> None:
    spec = feed_forward(model, [model.n_layers - 1])
    counter = FlopCounter(model, spec)
    same = model.encode(
        [Query("what is this", picture(), "a cup"), Query("who is that", picture(), "a man")], answers=True
    )
    one = model.encode([Query("what is this", picture(), "a cup")], answers=True)
    assert counter.vision(same) == counter.vision(one) > 0
    rows = [counter.row(int(length), labels) for length, labels in zip(same.lengths.tolist(), _labels(same))]
    outcomes = [FitOutcome("max_steps", 4, 1.0, 1.0), FitOutcome("converged", 2, 0.0, 0.0)]
    found = counter.batch(same, [0, 1], outcomes, reference_rows=[1])
    assert found.forward == 4 * rows[0].forward + 3 * rows[1].forward
    assert found.backward == 4 * rows[0].backward + 2 * rows[1].backward
    assert found.reference == rows[1].forward
    assert found.prefix == rows[0].prefix + rows[1].prefix
    assert found.total == found.vision + found.prefix + found.reference + found.forward + found.backward
    assert (found + found).total == 2 * found.total


def _labels(encoded: Encoded) -> list[list[int]]:
    return [[int(p) for p in row if p >= 0] for row in encoded.label_positions().tolist()]


def test_text_only_rows_have_no_vision() -> None:
    model = load(MODELS[0], linear="torch")
    encoded = model.encode([Query("what is red", None, "a cup")], answers=True)
    assert FlopCounter(model, feed_forward(model, [0])).vision(encoded) == 0


@pytest.mark.parametrize("name", MODELS)
def test_vision_counts_products_whoever_multiplies(name: str) -> None:
    # oneDNN's products are unknown to torch's counter: the tower would nearly vanish.
    try:
        served = load(name, linear="onednn")
    except ValueError:
        pytest.skip("torch without oneDNN")
    counts = []
    for model in (load(name, linear="torch"), served):
        counts.append(FlopCounter(model, feed_forward(model, [0])).vision(encode(model)))
    assert counts[0] == counts[1] > 0
    assert any(type(module) is OneDnnLinear for module in served.hf.modules()), "the model multiplies as before"


def test_nfu_is_one_at_the_peak() -> None:
    peak = Peak(matmul_gflop_per_s=2.0, copy_gib_per_s=1.0)
    assert nfu(2 * 10**9, 1.0, peak) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="seconds and peak are positive"):
        nfu(1, 0.0, peak)


def test_wrong_arguments_are_named(model: EditableModel) -> None:
    counter = FlopCounter(model, feed_forward(model, [0]))
    with pytest.raises(ValueError, match="labels lie in 0 to tokens - 1"):
        counter.row(4, [4])
    with pytest.raises(ValueError, match="labels lie in 0 to tokens - 1"):
        counter.row(4, [])
    with pytest.raises(ValueError, match="kind is one of"):
        FlopCounter(model, DeltaSpec("other", feed_forward(model, [0]).sites))


def test_sum_has_every_part() -> None:
    assert NecessaryFlops(1, 2, 3, 4, 5).total == 15
