"""The op nearest_keys: every implementation against all scores sorted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import ops
from fastedit.reference import nearest_keys as reference
from fastedit.testing import assert_close, nearest_keys_inputs, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METRICS = ("cosine", "dot", "l2")
# queries, keys, features, k: odd, empty, size one, all keys, more than a block of each
SHAPES = (
    (3, 17, 5, 4),
    (1, 1, 1, 1),
    (0, 4, 3, 2),
    (2, 64, 33, 64),
    (40, 300, 20, 8),
    (9, 130, 70, 1),
    (300, 5, 3, 5),
)


def _scores(queries, keys, metric):
    """All values in float64, larger is better."""
    queries, keys = queries.double(), keys.double()
    if metric == "l2":
        return -torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    if metric == "cosine":
        return torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(keys).T
    return queries @ keys.T


def _check(got, queries, keys, k, metric):
    values, indices = got
    scores = _scores(queries, keys, metric)
    goal = scores.sort(dim=1, descending=True).values[:, :k]
    sign = -1.0 if metric == "l2" else 1.0
    size = float(queries.double().norm(dim=1).max() * keys.double().norm(dim=1).max()) if len(queries) else 1.0
    scale = 1.0 if metric == "cosine" else 4.0 * size
    # the k-th best value is the k-th best value, and the key it names has it
    assert_close(sign * values, goal, length=queries.shape[1], scale=scale, name="values")
    assert_close(sign * values, scores.gather(1, indices), length=queries.shape[1], scale=scale, name="named keys")
    # no key twice
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_reference(provider, dtype, metric, available):
    available(provider)
    # the interpreter takes a while for every query: of them just more than a block
    shapes = (*SHAPES[:4], (20, 300, 20, 8)) if "interpreted" in provider.id else SHAPES
    for seed, (count, stored, d, k) in enumerate(shapes):
        queries, keys = nearest_keys_inputs(count, stored, d, dtype, seed=seed, device=provider.device)
        layouts = [(queries, keys), (queries.t().contiguous().t(), keys.t().contiguous().t())]
        # rows of a wider tensor
        layouts.append((queries, torch.cat([keys, keys], 1)[:, :d]))
        for one, other in layouts[: 2 if "interpreted" in provider.id else 3]:
            values, indices = provider.function()(one, other, k, metric)
            assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert indices.dtype == torch.int64
            assert values.shape == indices.shape == (count, k)
            _check((values, indices), queries, keys, k, metric)


@pytest.mark.parametrize("provider", [p for p in providers("nearest_keys") if "csrc" in p.id], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_many_keys(provider, threads, available):
    """Enough keys that threads share them, with few and with many queries."""
    available(provider)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (3, 70):
            queries, keys = nearest_keys_inputs(count, 5000, 16, torch.float32)
            _check(provider.function()(queries, keys, 10, "cosine"), queries, keys, 10, "cosine")
        # threads share the queries
        queries, keys = nearest_keys_inputs(300, 70, 16, torch.float32)
        _check(provider.function()(queries, keys, 10, "l2"), queries, keys, 10, "l2")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("count", [3, 20])
def test_ties_by_lower_index(provider, metric, count, available):
    """Small whole numbers are exact in every order of sums, so equal values are equal."""
    available(provider)
    make = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (count, 4), generator=make).float().to(provider.device)
    keys = torch.randint(-1, 2, (200, 4), generator=make).float().to(provider.device)
    values, indices = provider.function()(queries, keys, 20, metric)
    goal_values, goal_indices = reference.nearest_keys(queries.double(), keys.double(), 20, metric)
    assert torch.equal(values.double(), goal_values)
    assert torch.equal(indices, goal_indices)


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_ties_across_parts(provider, metric, available):
    """So many keys that they are searched in parts: ties between parts go to the lower index, too."""
    available(provider)
    make = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (2, 6), generator=make).float().to(provider.device)
    keys = torch.randint(-2, 3, (8500, 6), generator=make).float().to(provider.device)
    # of the best some lie in the last part
    keys[[8300, 8499]] = queries
    keys[8400:8403] = 3.0 * queries[0]
    values, indices = provider.function()(queries, keys, 20, metric)
    goal_values, goal_indices = reference.nearest_keys(queries.double(), keys.double(), 20, metric)
    assert torch.equal(values.double(), goal_values)
    assert torch.equal(indices, goal_indices)
    assert indices.min() < 2000
    assert indices.max() > 8000


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
def test_equal_distances_far_from_zero(provider, available):
    """Whole numbers whose squares are rounded but whose differences are not: equal distances keep their order."""
    available(provider)
    make = torch.Generator().manual_seed(1)
    queries, keys = (5001.0 + torch.randint(-1, 2, (rows, 4), generator=make).float() for rows in (3, 40))
    values, indices = provider.function()(queries.to(provider.device), keys.to(provider.device), 40, "l2")
    goal_values, goal_indices = reference.nearest_keys(queries.double(), keys.double(), 40, "l2")
    assert torch.equal(values.cpu().double(), goal_values)
    assert torch.equal(indices.cpu(), goal_indices)


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [2, 12])
def test_nan_ranks_last(provider, metric, count, available):
    available(provider)
    queries, keys = nearest_keys_inputs(count, 9, 6, torch.float32, device=provider.device)
    keys[2, 1] = float("nan")
    keys[5] = float("nan")
    values, indices = provider.function()(queries, keys, 9, metric)
    assert torch.isfinite(values[:, :7]).all()
    assert torch.isnan(values[:, 7:]).all()
    assert (indices[:, 7:].cpu() == torch.tensor([2, 5])).all()
    queries[0] = float("nan")
    values, indices = provider.function()(queries, keys, 3, metric)
    assert torch.isnan(values[0]).all()
    assert indices[0].tolist() == [0, 1, 2]
    assert torch.isfinite(values[1:]).all()
    # infinities are numbers
    queries, keys = nearest_keys_inputs(count, 4, 2, torch.float32, device=provider.device)
    queries = queries.abs()
    keys[1] = -float("inf")
    values, indices = provider.function()(queries, keys, 4, "dot")
    assert (indices[:, 3] == 1).all()
    assert (values[:, 3] == -float("inf")).all()


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
def test_zero_vectors_have_cosine_zero(provider, available):
    available(provider)
    queries = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=provider.device)
    keys = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 0.0]], device=provider.device)
    values, indices = provider.function()(queries, keys, 3, "cosine")
    assert values.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    assert indices.tolist() == [[0, 1, 2], [2, 0, 1]]


@pytest.mark.parametrize("provider", providers("nearest_keys"), ids=str)
def test_near_duplicates_keep_their_distance(provider, available):
    """Squared norms of 25,000 hide a distance of 0.002 in float32; the values come from differences."""
    available(provider)
    queries, keys = nearest_keys_inputs(12, 40, 10, torch.float32, device=provider.device)
    keys = 50.0 + 5.0 * keys
    queries = keys[:12] + 0.015 * queries
    values, indices = provider.function()(queries, keys, 2, "l2")
    assert indices[:, 0].tolist() == list(range(12))
    goal = (queries.double() - keys[:12].double()).square().sum(1)
    assert ((values[:, 0] - goal).abs() <= 1e-5 * goal).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
def test_opcheck(case, metric):
    queries, keys = nearest_keys_inputs(3, 7, 4, torch.float32)
    if case == "permuted":
        queries, keys = queries.t().contiguous().t(), keys.t().contiguous().t()
    torch.library.opcheck(torch.ops.fastedit.nearest_keys.default, (queries, keys, 2, metric))
    if case == "with grad":
        values, indices = ops.nearest_keys(queries.requires_grad_(), keys, 2, metric)
        assert not values.requires_grad
        assert not indices.requires_grad


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def nearest(queries, keys):
        return ops.nearest_keys(queries * 2.0, keys, 3, "l2")

    for count, stored in ((4, 9), (6, 20)):
        queries, keys = nearest_keys_inputs(count, stored, 5, torch.float32)
        for one, other in zip(nearest(queries, keys), ops.nearest_keys(queries * 2.0, keys, 3, "l2"), strict=True):
            assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 40),
    stored=st.integers(1, 300),
    d=st.integers(1, 40),
    k=st.integers(1, 64),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_properties(count, stored, d, k, metric, seed):
    queries, keys = nearest_keys_inputs(count, stored, d, torch.float64, seed=seed)
    k = min(k, stored)
    values, indices = ops.nearest_keys(queries, keys, k, metric)
    _check((values, indices), queries, keys, k, metric)
    # fewer are the first of more
    fewer = ops.nearest_keys(queries, keys, max(k // 2, 1), metric)
    assert torch.equal(fewer[1], indices[:, : max(k // 2, 1)])
    # the order of the keys is that of their names only
    order = torch.randperm(stored, generator=torch.Generator().manual_seed(seed))
    shuffled = ops.nearest_keys(queries, keys[order], k, metric)
    assert torch.allclose(shuffled[0], values, atol=1e-12)
    if metric == "cosine":
        scaled = ops.nearest_keys(3.0 * queries, keys, k, metric)
        assert torch.allclose(scaled[0], values, atol=1e-12)


def test_errors():
    queries, keys = nearest_keys_inputs(2, 5, 3, torch.float32)
    with pytest.raises(
        ValueError, match=r"nearest_keys: queries is \(Q, d\) and keys is \(K, d\) \(got queries=\(2, 3\)"
    ):
        ops.nearest_keys(queries, keys[:, :2], 1)
    with pytest.raises(
        ValueError, match=r"nearest_keys: queries and keys have the same dtype and device \(got queries="
    ):
        ops.nearest_keys(queries, keys.double(), 1)
    with pytest.raises(ValueError, match=r"nearest_keys: metric is one of cosine, dot, l2 \(got metric=L2\)"):
        ops.nearest_keys(queries, keys, 1, "L2")
    for k in (0, 6, 65):
        with pytest.raises(ValueError, match=rf"nearest_keys: k is between 1 and .*, at most 64 \(got k={k}, K=5\)"):
            ops.nearest_keys(queries, keys, k)
    with pytest.raises(ValueError, match=r"nearest_keys: queries is float32, bfloat16, float16 or float64"):
        ops.nearest_keys(queries.long(), keys.long(), 1)
