"""Packed rows against padded ones: every split of every family, rows apart and joined, constants instead of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded, PackedState, load
from fastedit.backbone.packed_forward import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.requests import Query
from tests.backbone.padded import prefix, tail

from .conftest import cached_model, largest_gap, mixed_queries, picture

# Every family; llava-next has a sliding window of 24, which its image rows outgrow
NAMES = tuple(
    f"random:{name}-tiny"
    for name in ("llava", "llava-next", "qwen2vl", "qwen3vl", "blip2", "blip2-postnorm", "minigpt4")
)
TOLERANCE = 1e-12


@functools.cache
def exact(name: str) -> EditableModel:
    return cached_model(name, dtype="float64")


def text_rows() -> list[Query]:
    return [Query("what?", None, "blue"), Query("how many are there on the right, and where?", None, "three of them")]


CASES: dict[str, list[Query]] = {
    "ragged": mixed_queries(),
    "text only": text_rows(),
    "one row": [mixed_queries()[1]],
    # full rows: nothing is moved
    "equal lengths": [Query("what is it?", picture(0), "red"), Query("what is it?", picture(3), "red")],
}


def expected(model: EditableModel, encoded: Encoded, layer: int, stage: str) -> Tensor:
    """Final hidden states (M, d) at the labels from the padded walk."""
    positions = encoded.label_positions()
    return tail(model, prefix(model, encoded, layer, stage), positions=positions)[positions >= 0]


def points(model: EditableModel) -> list[tuple[int, str]]:
    return [(layer, stage) for layer in range(model.n_layers) for stage in ("attention", "ffn")]


def random_like(sizes: tuple[int, ...], seed: int = 0) -> Tensor:
    drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Where models are loaded to
    return drawn.to(exact("random:llava-tiny").device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_split_equals_the_padded_walk(name: str, case: str) -> None:
    model = exact(name)
    encoded = model.encode(CASES[case], answers=True)
    if case == "equal lengths":
        assert len(set(encoded.lengths.tolist())) == 1
    reference = expected(model, encoded, 0, "attention")
    start = packed_start(model, encoded)
    before = start.hidden.clone()
    for layer, stage in points(model):
        state = packed_prefix(model, start, layer, stage)
        assert (state.layer, state.stage) == (layer, stage)
        assert largest_gap(packed_tail(model, state), reference) < TOLERANCE, (layer, stage)
        assert largest_gap(expected(model, encoded, layer, stage), reference) < TOLERANCE, (layer, stage)
    assert torch.equal(start.hidden, before)


def test_the_window_is_shorter_than_the_rows() -> None:
    model = exact("random:llava-next-tiny")
    lengths = model.encode(CASES["ragged"], answers=True).lengths
    window = model.adapter.text.config.sliding_window
    assert set(model.adapter.text.kinds) == {"sliding_attention"}
    assert lengths.max() > window > lengths.min()


@pytest.mark.parametrize("name", NAMES)
def test_a_walk_goes_on_from_any_point(name: str) -> None:
    model = exact(name)
    encoded = model.encode(CASES["ragged"], answers=True)
    start = packed_start(model, encoded)
    middle = packed_prefix(model, start, 1, "attention")
    for layer, stage in points(model)[2:]:
        whole, onward = (packed_prefix(model, state, layer, stage) for state in (start, middle))
        assert largest_gap(whole.hidden, onward.hidden) == 0.0
        assert whole.deep.keys() == onward.deep.keys() == {index for index in whole.deep if index >= layer}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_answers_want_their_last_token(name: str) -> None:
    model = exact(name)
    encoded = model.encode(mixed_queries(), answers=False)
    full = tail(model, prefix(model, encoded, 1, "ffn"))
    last = full[torch.arange(len(encoded)), encoded.last_prompt]
    assert largest_gap(packed_tail(model, packed_start(model, encoded)), last) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_rows_taken_out_and_joined_in_another_order(name: str) -> None:
    model = exact(name)
    encoded = model.encode(mixed_queries(), answers=True)
    order = [4, 1, 3, 2, 0, 1]
    for layer, stage in points(model):
        state = packed_prefix(model, packed_start(model, encoded), layer, stage)
        whole = torch.split(packed_tail(model, state), list(state.wanted_counts))
        rows = [state.of_row(row) for row in order]
        joined = PackedState.cat(rows)
        assert len(joined) == len(order)
        assert joined.counts == tuple(state.counts[row] for row in order)
        gap = largest_gap(packed_tail(model, joined), torch.cat([whole[row] for row in order]))
        assert gap < TOLERANCE, (layer, stage, gap)
        for row, single in zip(order, rows, strict=True):
            assert single.hidden.data_ptr() >= state.hidden.data_ptr(), "a row shares the memory of its batch"
            assert largest_gap(packed_tail(model, single), whole[row]) < TOLERANCE


def test_states_of_different_questions_join_with_and_without_deep_features() -> None:
    model = exact("random:qwen3vl-tiny")
    asked = mixed_queries()
    parts = [model.encode(rows, answers=True) for rows in ([asked[2]], [asked[1]], text_rows())]
    for layer, stage in ((0, "attention"), (1, "attention"), (1, "ffn"), (2, "ffn")):
        states = [packed_prefix(model, packed_start(model, part), layer, stage) for part in parts]
        apart = torch.cat([expected(model, part, 0, "attention") for part in parts])
        joined = PackedState.cat(states)
        assert bool(joined.deep) == (layer < 2)
        assert largest_gap(packed_tail(model, joined), apart) < TOLERANCE
        assert joined.live is not None
        live = [torch.ones_like(s.hidden[:, 0], dtype=torch.bool) if s.live is None else s.live for s in states]
        assert torch.equal(joined.live, torch.cat(live))


@pytest.mark.parametrize("name", NAMES)
def test_only_drops_tokens_that_nobody_sees_any_more(name: str) -> None:
    model = exact(name)
    encoded = model.encode(mixed_queries(), answers=True)
    state = packed_prefix(model, packed_start(model, encoded), model.n_layers - 1, "attention")
    reference = packed_tail(model, state)
    small = packed_prefix(model, state, model.n_layers - 1, "ffn")
    assert small.hidden.shape[0] == len(small.wanted) == sum(state.wanted_counts) < state.hidden.shape[0]
    assert small.counts == small.wanted_counts == state.wanted_counts
    assert largest_gap(packed_tail(model, small), reference) < TOLERANCE
    # Of the small state every other token of every row: what is left is where it was
    chosen = torch.zeros_like(small.hidden[:, 0], dtype=torch.bool)
    chosen[::2] = True
    sparse = small.only(chosen)
    assert torch.equal(sparse.hidden, small.hidden[::2])
    assert sum(sparse.counts) == sparse.hidden.shape[0] == sparse.position_ids.shape[1]


def shifted(model: EditableModel, names: list[str], layers: list[int]) -> tuple[list[Tensor], list[tuple[str, Tensor]]]:
    """Per site a vector (d_out,) that is added to the output, and a direction that makes it differ by token."""
    sites = model.sites(layers, names)
    scales = [random_like((site.d_out, site.d_in), n).mul_(0.02).requires_grad_(True) for n, site in enumerate(sites)]
    return scales, [(site.module_path, scale) for site, scale in zip(sites, scales, strict=True)]


@contextmanager
def acting(model: EditableModel, pairs: list[tuple[str, Tensor]], *, masked: bool = False) -> Iterator[None]:
    """Full matrices act beside modules; masked, on the live tokens of the packed walk alone."""

    def hook_for(matrix: Tensor):
        def hook(_module, inputs, output):
            change = inputs[0] @ matrix.T
            if masked:
                assert model.running is not None
                live = model.running.layouts[inputs[0].shape[1]].live
                change = change if live is None else change * live[None, :, None]
            return output + change

        return hook

    handles = [model.hf.get_submodule(path).register_forward_hook(hook_for(matrix)) for path, matrix in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_the_padded_walk(name: str) -> None:
    model = exact(name)
    encoded = model.encode(mixed_queries(), answers=True)
    layer, last = model.n_layers - 2, model.n_layers - 1
    weights = random_like((encoded.label_mask.sum().item(), model.hidden_size))
    positions = encoded.label_positions()
    for stage, names in (("attention", ["q", "k", "v", "down"]), ("ffn", ["up", "down"])):
        parameters, pairs = shifted(model, names, [layer, last])
        packed = packed_prefix(model, packed_start(model, encoded), layer, stage)
        padded = prefix(model, encoded, layer, stage)
        with acting(model, pairs):
            ours = packed_tail(model, packed)
            theirs = tail(model, padded, positions=positions)[positions >= 0]
        assert largest_gap(ours, theirs) < TOLERANCE
        assert largest_gap(ours, packed_tail(model, packed)) > 1e-3, "the hooks act"
        found, wanted = (torch.autograd.grad((out * weights).sum(), parameters) for out in (ours, theirs))
        for one, other in zip(found, wanted, strict=True):
            assert other.norm() > 1e-6
            assert largest_gap(one, other) < 1e-11 * max(1.0, other.norm().item())


@pytest.mark.parametrize("name", NAMES)
def test_constants_stand_for_tokens_that_are_not_live(name: str) -> None:
    model = exact(name)
    encoded = model.encode(mixed_queries(), answers=True)
    last = model.n_layers - 1
    for layer, stage in points(model):
        state = packed_prefix(model, packed_start(model, encoded), layer, stage)
        held = hold_constant(model, state)
        # What is live is behind the image; all of a row without one
        assert state.live is not None
        if (layer, stage) != (last, "ffn"):
            assert held.hidden.shape[0] == int(state.live.sum()) < state.hidden.shape[0]
            assert held.starts[2] == held.starts[4] == 0 < min(held.starts[0], held.starts[1], held.starts[3])
            assert [a + b for a, b in zip(held.starts, held.counts, strict=True)] == list(state.counts)
        assert largest_gap(packed_tail(model, held), packed_tail(model, state)) < TOLERANCE, (layer, stage)
        names = ["q", "k", "v", "up", "down"] if stage == "attention" else ["up", "down"]
        parameters, pairs = shifted(model, names, list(range(layer, model.n_layers)))
        if stage == "ffn" and layer < last:
            # attention of the layers above, which sees constants and what the delta changed
            parameters, pairs = ([*a, *b] for a, b in zip((parameters, pairs), shifted(model, ["k", "v"], [last])))
        with acting(model, pairs, masked=True):
            masked, ours = packed_tail(model, state), packed_tail(model, held)
        assert largest_gap(masked, packed_tail(model, state)) > 1e-3, "the hooks act"
        assert largest_gap(ours, masked) < TOLERANCE, (layer, stage)
        weights = random_like(tuple(ours.shape))
        found, wanted = (torch.autograd.grad((out * weights).sum(), parameters) for out in (ours, masked))
        assert max(largest_gap(*pair) for pair in zip(found, wanted, strict=True)) < 1e-10, (layer, stage)


@pytest.mark.parametrize("name", NAMES)
def test_constants_of_the_last_layer_are_its_keys_and_values(name: str) -> None:
    model = exact(name)
    state = packed_prefix(model, packed_start(model, model.encode(mixed_queries(), answers=True)), 1, "attention")
    seen: dict[str, int] = {}
    handles = [
        model.module(site).register_forward_hook(
            lambda _module, args, _output, name=site.name: seen.update({name: args[0].shape[-2]})
        )
        for site in model.sites([model.n_layers - 1], ["q", "k", "down"])
    ]
    try:
        held = hold_constant(model, state)
    finally:
        for handle in handles:
            handle.remove()
    rows = sum(start > 0 for start in held.starts)
    assert seen == {"q": rows, "k": sum(held.starts)}


@pytest.mark.parametrize("name", ["random:llava-tiny", "random:qwen3vl-tiny", "random:blip2-tiny"])
def test_rows_with_constants_join_rows_without(name: str) -> None:
    """Text-only questions that were prepared by themselves hold no constants at all."""
    model = exact(name)
    asked = mixed_queries()
    parts = [model.encode(rows, answers=True) for rows in (text_rows(), asked[:2], text_rows()[:1], asked[3:])]
    for layer, stage in ((1, "attention"), (1, "ffn")):
        states = [packed_prefix(model, packed_start(model, part), layer, stage) for part in parts]
        apart = torch.cat([packed_tail(model, state) for state in states])
        held = [hold_constant(model, state) for state in states]
        joined = PackedState.cat(held)
        assert largest_gap(packed_tail(model, joined), apart) < TOLERANCE
        order = [6, 0, 2, 3, 5]
        again = PackedState.cat([joined.of_row(row) for row in order])
        split = torch.split(apart, list(joined.wanted_counts))
        assert largest_gap(packed_tail(model, again), torch.cat([split[row] for row in order])) < TOLERANCE


def test_an_image_at_the_end_of_a_prompt_leaves_nothing_constant() -> None:
    """There the first answer token is predicted at an image token, which therefore has to stay."""
    model = load("random:llava-tiny", dtype="float64", template="{} {image}")
    encoded = model.encode(mixed_queries(), answers=True)
    assert bool(encoded.image_mask[0, encoded.last_prompt[0]])
    for layer, stage in points(model):
        state = packed_prefix(model, packed_start(model, encoded), layer, stage)
        reference = packed_tail(model, state)
        assert largest_gap(packed_tail(model, hold_constant(model, state)), reference) == 0.0


def test_live_are_the_tokens_behind_the_image() -> None:
    model = exact("random:llava-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    live = packed_start(model, encoded).live
    assert live is not None
    for row, part in enumerate(torch.split(live, encoded.lengths.tolist())):
        images = encoded.image_mask[row].nonzero().flatten().tolist()
        first = images[-1] + 1 if images else 0
        assert part.tolist() == [place >= first for place in range(len(part))]


def test_features_that_enter_behind_the_last_layer() -> None:
    """No model here has them that late, but nothing else says so."""
    model = exact("random:llava-tiny")
    encoded, last = model.encode(mixed_queries(), answers=True), model.n_layers - 1
    for layer, stage in ((1, "attention"), (last, "attention"), (last, "ffn")):
        padded = prefix(model, encoded, layer, stage)
        packed = packed_prefix(model, packed_start(model, encoded), 1, "attention")
        deep = random_like(tuple(padded.hidden.shape))
        padded.deep, packed.deep = {last: deep}, {last: deep[encoded.attention_mask]}
        packed = packed_prefix(model, packed, layer, stage)
        positions = encoded.label_positions()
        reference = tail(model, padded, positions=positions)[positions >= 0]
        assert largest_gap(packed_tail(model, packed), reference) < TOLERANCE
        assert largest_gap(packed_tail(model, hold_constant(model, packed)), reference) < TOLERANCE


def test_nothing_to_hold_leaves_a_state_alone() -> None:
    model = exact("random:llava-tiny")
    text = packed_start(model, model.encode(text_rows(), answers=True))
    assert text.live is None
    assert hold_constant(model, text) is text
    mixed = packed_start(model, model.encode(mixed_queries(), answers=True))
    row = mixed.of_row(2)
    assert row.live is not None
    assert hold_constant(model, row) is row


def test_every_tensor_is_mapped_and_counted() -> None:
    model = exact("random:qwen3vl-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    state = hold_constant(model, packed_prefix(model, packed_start(model, encoded), 1, "attention"))
    assert state.live is not None
    assert state.rotary is not None
    assert state.deep
    assert state.constant
    reference = packed_tail(model, state)
    assert state.memory
    seen: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    copy = state.map(change)
    parts = [state.hidden, state.position_ids, *state.rotary, *state.deep.values()]
    parts += [part for pair in state.constant.values() for part in pair]
    assert state.n_bytes == copy.n_bytes == sum(part.numel() * part.element_size() for part in parts)
    assert {id(part) for part in seen} == {id(part) for part in (*parts, state.wanted, state.live, state.image)}
    assert not copy.memory
    for part in seen:
        part.zero_()
    assert largest_gap(packed_tail(model, copy), reference) == 0.0


def test_what_is_made_of_a_state_is_made_once_and_not_passed_on() -> None:
    model = exact("random:llava-tiny")
    state = packed_start(model, model.encode(mixed_queries(), answers=True))
    assert state.remembered("plan", lambda: 3) == state.remembered("plan", lambda: 4) == 3
    for other in (state.of_row(0), state.map(torch.clone), PackedState.cat([state, state])):
        assert "plan" not in other.memory


def test_the_walk_says_whose_tokens_run_and_takes_it_back() -> None:
    model = exact("random:llava-tiny")
    encoded = model.encode(mixed_queries(), answers=True)
    state = packed_prefix(model, packed_start(model, encoded), 2, "attention")
    seen = []
    path = model.sites([3], ["down"])[0].module_path

    def hook(_module, inputs, _output):
        assert model.running is not None
        seen.append(model.running.layouts[inputs[0].shape[1]])
        if len(seen) == 2:
            raise RuntimeError("in the middle")

    handle = model.hf.get_submodule(path).register_forward_hook(hook)
    try:
        packed_tail(model, state)
        assert model.running is None
        with pytest.raises(RuntimeError, match="in the middle"):
            packed_tail(model, state)
    finally:
        handle.remove()
    assert model.running is None
    # The last layer runs for the wanted tokens alone
    assert seen[0].counts == state.wanted_counts
    assert state.live is not None
    assert torch.equal(seen[0].live, state.live[state.wanted])


def test_states_that_do_not_fit_are_refused() -> None:
    model = exact("random:llava-tiny")
    start = packed_start(model, model.encode(mixed_queries(), answers=True))
    with pytest.raises(ValueError, match=r"PackedState\.cat: at least one state is needed \(got 0\)"):
        PackedState.cat([])
    later = packed_prefix(model, start, 1, "ffn")
    message = r"must agree on \(layer, stage\) \(got \[\(0, 'attention'\), \(1, 'ffn'\)\]\)"
    with pytest.raises(ValueError, match=message):
        PackedState.cat([later, start])
