"""The op topk_agreement: every implementation against its definition, and the definition against the metrics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines.metrics import ranked_agreement, top_ids
from fastedit import ops
from fastedit.reference import topk_agreement as reference
from fastedit.testing import providers, topk_agreement_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# tokens, V, k: odd, empty and size-one shapes, several blocks, k = V
# the interpreter is slow: the last shapes
SHAPES = ((7, 501, 10), (3, 4999, 10), (4, 130, 64), (2, 3000, 1), (1, 1, 1), (0, 9, 3), (2, 17, 17), (1, 2100, 3))


def _same(got, goal):
    return all(
        one.dtype == torch.float64 and torch.equal(one.cpu(), other) for one, other in zip(got, goal, strict=True)
    )


@pytest.mark.parametrize("provider", providers("topk_agreement"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(provider, dtype, available):
    available(provider)
    for seed, (tokens, vocabulary, k) in enumerate(SHAPES[4:] if "interpreted" in provider.id else SHAPES):
        before, after = topk_agreement_inputs(tokens, vocabulary, dtype, device=provider.device, seed=seed)
        goal = reference.topk_agreement(before.cpu(), after.cpu(), k)
        for layout in ((before, after), (before.t().contiguous().t(), torch.cat([after, after], 1)[:, :vocabulary])):
            assert _same(provider.function()(*layout, k), goal)
        assert _same(provider.function()(before, before, k), (torch.ones(tokens).double(),) * 2)


@pytest.mark.parametrize("provider", providers("topk_agreement"), ids=str)
def test_unusual_logits(provider, available):
    available(provider)
    before, after = topk_agreement_inputs(7, 200, torch.float32, seed=3)
    infinity = float("inf")
    before[0, 5] = float("nan")
    after[1, 199] = float("nan")
    before[2, 3:] = after[2, 5:] = -infinity  # fewer finite logits than ranks
    before[3], after[3] = 0.0, -0.0  # all equal
    before[4, [7, 9]] = after[4, [9, 150]] = infinity
    before[5, :12], after[5, :12] = infinity, infinity  # a NaN behind k infinite ones
    after[5, 180] = float("nan")
    before[6] = after[6] = -infinity
    goal = reference.topk_agreement(before, after, 10)
    got = provider.function()(before.to(provider.device), after.to(provider.device), 10)
    assert _same(got, goal)
    assert goal[1][[0, 1, 5]].tolist() == [0.0, 0.0, 0.0]
    assert goal[1][[3, 6]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("provider", providers("topk_agreement"), ids=str)
@pytest.mark.parametrize("vocabulary", [2049, 4500])
def test_every_block_is_looked_at(provider, vocabulary, available):
    """Ascending logits, so that each block is better than all before it; and a NaN in one block only."""
    available(provider)
    before = torch.arange(vocabulary).float().repeat(3, 1).to(provider.device)
    after = before.clone()
    after[1, -2:] = after[1, -2:].flip(0)
    after[2] = after[2].flip(0)
    for k in (3, 8):
        top1, ranked = provider.function()(before, after, k)
        assert top1.tolist() == [1.0, 0.0, 0.0]
        assert ranked.tolist() == [1.0, (k - 2) / k, 0.0]
    for place in (0, 2047, vocabulary - 1):
        broken = before.clone()
        broken[1, place] = float("nan")
        for pair in ((broken, before), (before, broken)):
            assert _same(provider.function()(*pair, 3), (torch.tensor([1.0, 0.0, 1.0]).double(),) * 2)


def test_opcheck():
    before, after = topk_agreement_inputs(5, 40, torch.float32)
    torch.library.opcheck(torch.ops.fastedit.topk_agreement.default, (before, after, 4))
    permuted = [t.t().contiguous().t() for t in (before, after)]
    torch.library.opcheck(torch.ops.fastedit.topk_agreement.default, (*permuted, 4))


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def score(before, after):
        top1, ranked = ops.topk_agreement(before * 2.0, after * 2.0, 5)
        return top1.mean() + ranked.mean()

    for shape in ((4, 60), (7, 90)):
        before, after = topk_agreement_inputs(*shape, torch.float32)
        assert torch.equal(score(before, after), sum(t.mean() for t in ops.topk_agreement(before, after, 5)))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5),
    vocabulary=st.integers(1, 300),
    k=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_properties(tokens, vocabulary, k, dtype, seed):
    k = min(k, vocabulary)
    before, after = topk_agreement_inputs(tokens, vocabulary, dtype, seed=seed)
    top1, ranked = ops.topk_agreement(before, after, k)
    # the metrics' definition, token by token
    mask = torch.ones(tokens, 1, dtype=torch.bool)
    for scores, ranks in ((top1, 1), (ranked, k)):
        ids = [top_ids(t[:, None], ranks) for t in (before, after)]
        assert torch.equal(scores, ranked_agreement(*ids, mask))
    # which comes first does not matter, nor does a common shift of exact logits
    assert _same(ops.topk_agreement(after, before, k), (top1, ranked))
    assert _same(ops.topk_agreement(before.double() + 8.0, after.double() + 8.0, k), (top1, ranked))
    # tokens do not see each other
    for token in range(tokens):
        alone = ops.topk_agreement(before[token : token + 1], after[token : token + 1], k)
        assert _same(alone, (top1[token : token + 1], ranked[token : token + 1]))


def test_needs_no_gradient():
    before, after = topk_agreement_inputs(3, 20, torch.float32)
    top1, ranked = ops.topk_agreement(before.requires_grad_(), after, 4)
    assert not top1.requires_grad
    assert not ranked.requires_grad


def test_errors():
    before, after = topk_agreement_inputs(3, 20, torch.float32)
    with pytest.raises(
        ValueError, match=r"topk_agreement: before and after are \(T, V\) \(got before=\(3, 20\), after=\(3, 19\)\)"
    ):
        ops.topk_agreement(before, after[:, :19])
    with pytest.raises(
        ValueError, match=r"topk_agreement: before and after have one dtype .* \(got before=torch.float32"
    ):
        ops.topk_agreement(before, after.half())
    with pytest.raises(ValueError, match=r"topk_agreement: k is 1 to V, at most 64 \(got k=21, V=20\)"):
        ops.topk_agreement(before, after, 21)
    with pytest.raises(ValueError, match=r"topk_agreement: k is 1 to V, at most 64 \(got k=0, V=20\)"):
        ops.topk_agreement(before, after, 0)
    with pytest.raises(ValueError, match=r"topk_agreement: before is float32, .* \(got before=torch.int64\)"):
        ops.topk_agreement(before.long(), after.long())
