"""Attention over packed rows against softmax written out row by row, with every kind of past."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastedit.backbone import PackedState
from fastedit.backbone.attention import AttentionPlan, StoredPast, attend, plan_attention, varlen_function
from fastedit.backbone.constant_past import ConstantPast
from fastedit.backbone.packed import KeyValue, token_indices, token_rows

D_HEAD, GROUPS, SCALE, LAYER = 3, 2, 0.6, 5
TOLERANCE = 1e-13
# Ragged, all alike, one row, one token
COUNTS = [(3, 1, 5), (4, 4), (6,), (1, 1, 1)]


def draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(
    counts: tuple[int, ...], starts: tuple[int, ...] | None = None, constant: dict[int, KeyValue] | None = None
) -> PackedState:
    """A state of which only the layout matters."""
    total = sum(counts)
    return PackedState(
        hidden=torch.zeros(total, 1, dtype=torch.float64),
        position_ids=torch.zeros(1, total, dtype=torch.long),
        rotary=None,
        counts=counts,
        starts=starts or (0,) * len(counts),
        wanted=torch.arange(total),
        wanted_counts=counts,
        layer=LAYER,
        stage="attention",
        constant=constant or {},
    )


def written_out(query: Tensor, keys: Tensor, values: Tensor, places: Tensor, window: int | None) -> Tensor:
    """One row: queries (n, heads, d_head) at their places over keys and values (m, groups, d_head) from place 0 on."""
    share = query.shape[1] // keys.shape[1]
    rows = []
    for asked, place in zip(query, places.tolist(), strict=True):
        first = 0 if window is None else max(0, place - window + 1)
        heads = []
        for head, vector in enumerate(asked):
            k, v = keys[first : place + 1, head // share], values[first : place + 1, head // share]
            heads.append(torch.softmax(SCALE * (k @ vector), 0) @ v)
        rows.append(torch.cat(heads))
    return torch.stack(rows) if rows else query.new_zeros(0, query.shape[1] * D_HEAD)


def reference(
    state: PackedState,
    chosen: Tensor | None,
    query: Tensor,
    before: list[KeyValue] | None,
    key: Tensor,
    value: Tensor,
    window: int | None,
) -> Tensor:
    """All rows, each by itself; `before` are a row's keys and values that come first."""
    row, place = token_rows(state.counts, key.device), token_indices(state, key.device)
    row_q, place_q = (row, place) if chosen is None else (row[chosen], place[chosen])
    found = []
    for number in range(len(state)):
        keys, values = key[row == number], value[row == number]
        if before is not None:
            keys, values = torch.cat([before[number][0], keys]), torch.cat([before[number][1], values])
        found.append(written_out(query[row_q == number], keys, values, place_q[row_q == number], window))
    return torch.cat(found)


def counts_of(state: PackedState, chosen: Tensor | None) -> tuple[int, ...]:
    if chosen is None:
        return state.counts
    row = token_rows(state.counts, chosen.device)[chosen]
    return tuple(torch.bincount(row, minlength=len(state)).tolist())


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, *,
    softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What flash-attn's function for packed rows computes: the last query of a row sees its last key."""
    assert causal
    assert softmax_scale == SCALE
    assert most_q == starts_q.diff().max()
    assert most_k == starts_k.diff().max()
    window = None if window_size == (-1, -1) else window_size[0] + 1
    found = []
    for (a, b), (c, d) in zip(*(itertools.pairwise(each.tolist()) for each in (starts_q, starts_k)), strict=True):
        places = torch.arange(d - c - (b - a), d - c)
        found.append(written_out(query[a:b], key[c:d], value[c:d], places, window))
    return torch.cat(found).view(len(query), -1, D_HEAD)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 99])
@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_token_asks(counts: tuple[int, ...], share: int, window: int | None) -> None:
    state, total = packed(counts), sum(counts)
    query, key, value = draw(total, GROUPS * share, D_HEAD, seed=1), *draw(2, total, GROUPS, D_HEAD, seed=2)
    plan = plan_attention(state, None, counts, window=window)
    assert (plan.key_slots is None) == (plan.query_slots is None) == (len(set(counts)) == 1)
    assert (plan.mask is None) == (window is None or window >= max(counts))
    expected = reference(state, None, query, None, key, value, window)
    for varlen in (None, plain_varlen):
        found = attend(LAYER, query, key, value, plan, scale=SCALE, past=None, varlen=varlen)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(
    ("counts", "chosen", "last"),
    [
        ((3, 1, 5), [1, 3, 5, 7, 8], False),
        ((3, 1, 5), [1, 2, 3, 6, 7, 8], True),
        ((4, 4), [0, 5], False),
        ((4, 4), [3, 7], True),
        # a row that asks nothing
        ((3, 1, 5), [0, 8], False),
        ((6,), [0, 1, 2, 3, 4, 5], True),
    ],
)
def test_chosen_tokens_ask(
    counts: tuple[int, ...], chosen: list[int], last: bool, share: int, window: int | None
) -> None:
    state, total, numbers = packed(counts), sum(counts), torch.tensor(chosen)
    query, key, value = draw(len(chosen), GROUPS * share, D_HEAD, seed=1), *draw(2, total, GROUPS, D_HEAD, seed=2)
    plan = plan_attention(state, numbers, counts_of(state, numbers), window=window)
    # Only queries that end their rows stand where a kernel for packed rows takes them to stand
    assert (plan.packed is not None) == last
    expected = reference(state, numbers, query, None, key, value, window)
    for varlen in (None, plain_varlen):
        found = attend(LAYER, query, key, value, plan, scale=SCALE, past=None, varlen=varlen)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def constants(starts: tuple[int, ...], seed: int) -> tuple[KeyValue, list[KeyValue]]:
    """Packed keys and values of constant tokens, and the same by row."""
    key, value = draw(2, sum(starts), GROUPS, D_HEAD, seed=seed)
    parts = zip(torch.split(key, list(starts)), torch.split(value, list(starts)), strict=True)
    return (key, value), list(parts)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(
    ("starts", "counts", "chosen"),
    [
        ((4, 0, 2), (3, 1, 5), None),
        ((4, 0, 2), (3, 1, 5), [2, 3, 4, 8]),
        ((2, 2), (3, 3), None),
        ((2, 2), (3, 3), [1, 5]),
        ((0, 7), (4, 1), None),
    ],
)
def test_constants_come_first(
    starts: tuple[int, ...], counts: tuple[int, ...], chosen: list[int] | None, share: int, window: int | None
) -> None:
    known, before = constants(starts, seed=3)
    state = packed(counts, starts, {LAYER: known, LAYER + 1: tuple(2 * part for part in known)})
    numbers = None if chosen is None else torch.tensor(chosen)
    asking = counts_of(state, numbers)
    query = draw(sum(asking), GROUPS * share, D_HEAD, seed=1).requires_grad_(True)
    key, value = (draw(sum(counts), GROUPS, D_HEAD, seed=seed).requires_grad_(True) for seed in (4, 5))
    plan = plan_attention(state, numbers, asking, window=window)
    assert plan.packed is None
    past = ConstantPast(state)
    weights = draw(sum(asking), GROUPS * share * D_HEAD, seed=6)
    # Twice: the second time what was laid out is there already
    for layer, first in ((LAYER, before), (LAYER + 1, [(2 * k, 2 * v) for k, v in before]), (LAYER, before)):
        found = attend(layer, query, key, value, plan, scale=SCALE, past=past, varlen=plain_varlen)
        expected = reference(state, numbers, query, first, key, value, window)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        ours, theirs = (torch.autograd.grad((each * weights).sum(), (query, key, value)) for each in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_constants_need_places_for_keys() -> None:
    state = packed((2, 2), (1, 1), {LAYER: constants((1, 1), seed=0)[0]})
    key = draw(4, GROUPS, D_HEAD, seed=0)
    plan = AttentionPlan(2, 2, 2, 2, None, None, None)
    with pytest.raises(ValueError, match=r"ConstantPast: a plan with places for keys .* \(got key_slots=None\)"):
        ConstantPast(state).extend(LAYER, plan, key, key)


class Rows:
    """Keys and values of every row as plain lists of tensors, beside a stored past that should hold the same."""

    def __init__(self, n_rows: int, capacity: int, share: int) -> None:
        empty = torch.zeros(0, GROUPS, D_HEAD, dtype=torch.float64)
        self.known: list[KeyValue] = [(empty, empty)] * n_rows
        self.past, self.share, self.seed = StoredPast(n_rows, capacity), share, 0

    def walk(
        self, starts: tuple[int, ...], counts: tuple[int, ...], window: int | None, chosen: list[int] | None = None
    ) -> AttentionPlan:
        """Put random tokens behind each row's first ones; compare what they find."""
        self.seed += 1
        state = packed(counts, starts)
        numbers = None if chosen is None else torch.tensor(chosen)
        asking = counts_of(state, numbers)
        plan = plan_attention(state, numbers, asking, window=window, capacity=self.past.capacity)
        query = draw(sum(asking), GROUPS * self.share, D_HEAD, seed=self.seed)
        key, value = draw(2, sum(counts), GROUPS, D_HEAD, seed=100 + self.seed)
        self.known = [(k[:start], v[:start]) for (k, v), start in zip(self.known, starts, strict=True)]
        expected = reference(state, numbers, query, self.known, key, value, window)
        found = attend(LAYER, query, key, value, plan, scale=SCALE, past=self.past, varlen=plain_varlen)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        new = zip(*(torch.split(part, list(counts)) for part in (key, value)), strict=True)
        self.known = [
            (torch.cat([k, k_new]), torch.cat([v, v_new]))
            for (k, v), (k_new, v_new) in zip(self.known, new, strict=True)
        ]
        return plan


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_stored_rows_go_on_stop_and_grow(share: int, window: int | None) -> None:
    rows = Rows(4, 6, share)
    rows.walk((0, 0, 0, 0), (3, 1, 5, 2), window)
    plan = rows.walk((3, 1, 5, 2), (1, 1, 1, 1), window)
    assert plan.present is None
    # Three rows of four go on, then two (picked out of the others), then one, with more than a token
    assert rows.walk((4, 2, 6, 3), (1, 1, 0, 1), window).present is None
    size = rows.past.n_bytes
    rows.past.grow(9)
    assert rows.past.n_bytes == size * 9 // 6
    rows.past.grow(4)
    assert rows.past.capacity == 9
    assert rows.walk((5, 3, 6, 4), (2, 0, 0, 1), window).present.tolist() == [0, 3]
    plan = rows.walk((7, 3, 6, 5), (0, 2, 0, 0), window)
    assert plan.present.tolist() == [1]
    assert (plan.rows, plan.queries, plan.query_slots) == (1, 2, None)
    # The others go on from where they were
    rows.walk((7, 5, 6, 5), (1, 3, 3, 1), window)


@pytest.mark.parametrize("share", [1, 2])
def test_a_second_walk_overwrites_the_first(share: int) -> None:
    rows = Rows(3, 8, share)
    for _ in range(2):
        # From the beginning, with shorter rows the second time: what stood behind them is not seen
        rows.walk((0, 0, 0), (4, 2, 6), None)
        rows.walk((4, 2, 6), (2, 1, 2), None)
        rows.walk((0, 0, 0), (2, 1, 3), None)
        rows.walk((2, 1, 3), (1, 0, 2), 3)
        # Over the middle of a row
        rows.walk((1, 1, 2), (2, 3, 1), None)


@pytest.mark.parametrize("share", [1, 2])
def test_rows_alike_are_stored_too(share: int) -> None:
    rows = Rows(2, 8, share)
    assert rows.walk((0, 0), (3, 3), None).query_slots is None
    rows.walk((3, 3), (2, 2), None)
    rows.walk((5, 5), (1, 1), 2)


@pytest.mark.parametrize("window", [None, 2])
def test_rows_without_tokens(window: int | None) -> None:
    """A row without constants among rows that have them is one, where these are read."""
    state = packed((3, 0, 2))
    query, key, value = draw(3, 5, GROUPS, D_HEAD, seed=1)
    plan = plan_attention(state, None, state.counts, window=window)
    # Kernels for packed rows are not asked what they make of those
    assert plan.packed is None
    found = attend(LAYER, query, key, value, plan, scale=SCALE, past=None, varlen=plain_varlen)
    expected = reference(state, None, query, None, key, value, window)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_last_tokens_ask_over_what_is_stored() -> None:
    rows = Rows(3, 9, 2)
    rows.walk((0, 0, 0), (4, 2, 6), None, chosen=[3, 5, 11])
    rows.walk((4, 2, 6), (2, 3, 1), 4, chosen=[1, 2, 4, 5])


def test_layers_are_stored_apart() -> None:
    past, state = StoredPast(2, 4), packed((2, 1))
    plan = plan_attention(state, None, (2, 1), window=None, capacity=4)
    pairs = {layer: draw(2, 3, GROUPS, D_HEAD, seed=layer) for layer in (0, 1)}
    for layer, (key, value) in pairs.items():
        past.extend(layer, plan, key, value)
    key, value = past.extend(0, plan, *pairs[0])
    assert key.shape == value.shape == (2, 2, GROUPS, D_HEAD)
    assert torch.equal(torch.cat([key[0], key[1, :1]]), pairs[0][0])
    assert torch.equal(torch.cat([value[0], value[1, :1]]), pairs[0][1])
    assert past.n_bytes == 2 * 2 * (2 * 4) * GROUPS * D_HEAD * 8


def test_flash_attention_is_for_gpus_and_for_models_that_want_it() -> None:
    assert varlen_function("flash_attention_2", torch.device("cpu")) is None
    assert varlen_function("sdpa", torch.device("cuda")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_heads_share_are_not_repeated(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    state = packed((4, 4))
    query, key, value = (draw(8, GROUPS * n, D_HEAD, seed=n).to(dtype).requires_grad_() for n in (4, 1, 1))
    plan = plan_attention(state, None, state.counts, window=None)
    assert plan.mask is None
    weights = draw(8, 4 * GROUPS * D_HEAD, seed=6).to(dtype)

    def gradients() -> tuple[Tensor, ...]:
        found = attend(LAYER, query, key, value, plan, scale=SCALE, past=None)
        return found, *torch.autograd.grad((found * weights).sum(), (query, key, value))

    repeats: list[int] = []
    repeat = Tensor.repeat_interleave
    counted = lambda tensor, *rest: repeats.append(1) or repeat(tensor, *rest)  # noqa: E731
    monkeypatch.setattr(Tensor, "repeat_interleave", counted, raising=False)
    shared = gradients()
    assert not repeats
    monkeypatch.setattr("fastedit.backbone.attention.shares_keys", lambda _query: False)
    torch.testing.assert_close(shared, gradients())
    assert repeats == [1, 1]
