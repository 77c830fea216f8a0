"""The ops against independent packages that compute the same by other means: opacus, liger-kernel, faiss, torch's own.

geomloss stands in test_mmd2.py, torch's single-tensor AdamW in test_adam_step.py.
"""

import os
from itertools import pairwise

import pytest
import torch

from fastedit import ops
from fastedit.testing import (
    adam_step_inputs,
    assert_close,
    key_value_inputs,
    low_rank_inputs,
    nearest_keys_inputs,
    providers,
    risk_inputs,
    topk_agreement_inputs,
)

LENGTHS = (4, 1, 0, 6)  # tokens per edit
# liger-kernel's kernels run where the tests' own Triton kernels do
LIGER_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KINDS = ("ce", "forward_kl", "reverse_kl")
# its masked lanes subtract infinities, of which an interpreter warns
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _on_cpu(op):
    return [p for p in providers(op) if p.device == "cpu"]


def _padded(rows, lengths):
    """Return rows (B, longest, ...) and which of them are (B, longest): an edit is an example, zeros fill it up."""
    parts = rows.split(list(lengths))
    live = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), live


def _per_example(module, x, grad, lengths):
    """Return y (T, o), the gradient by x and, by name, those of every edit by module's parameters, from opacus."""
    opacus = pytest.importorskip("opacus", reason="opacus is not installed")
    hooked = opacus.GradSampleModule(module.double(), loss_reduction="sum")
    rows, live = _padded(x, lengths)
    rows.requires_grad_()
    y = hooked(rows)[live]
    (y * grad).sum().backward()
    return y.detach(), rows.grad[live], {name: p.grad_sample for name, p in module.named_parameters()}


@pytest.mark.parametrize("provider", _on_cpu("low_rank"), ids=str)
def test_low_rank_equals_opacus(provider, available):
    """The same adapter in every edit: gradients of its stacked copies are those of the examples of one adapter."""
    available(provider)
    x, down, up, starts = low_rank_inputs(LENGTHS, 7, 3, 5, torch.float64)
    down, up = (t[:1].expand_as(t).contiguous() for t in (down, up))
    adapter = torch.nn.Sequential(torch.nn.Linear(7, 3, bias=False), torch.nn.Linear(3, 5, bias=False)).double()
    with torch.no_grad():
        adapter[0].weight.copy_(down[0].T)
        adapter[1].weight.copy_(up[0].T)
    grad = torch.randn(len(x), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    goal, goal_x, by_name = _per_example(adapter, x, grad, LENGTHS)
    assert by_name["0.weight"].abs().amax((1, 2)).tolist()[2] == 0.0
    got = provider.function("low_rank_backward")(grad, x, down, up, starts, [True] * 3)
    goals = (goal_x, by_name["0.weight"].mT, by_name["1.weight"].mT)
    assert_close(provider.function()(x, down, up, starts), goal, length=10, name="y")
    for name, one, other in zip(("x", "down", "up"), got, goals, strict=True):
        assert_close(one, other, length=30, name=f"gradient of {name}")


class _Neurons(torch.nn.Module):
    """A feed-forward layer as modelling files write it."""

    def __init__(self, x, keys, bias, values, starts, gate_keys, gate_bias, activation):
        super().__init__()
        self.act = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}[activation]
        self.up_proj = self._linear(keys, bias)
        self.gate_proj = None if gate_keys is None else self._linear(gate_keys, gate_bias)
        self.down_proj = self._linear(values, None)

    @staticmethod
    def _linear(weight, bias):
        made = torch.nn.Linear(*weight[0].shape, bias=bias is not None)
        made.double()
        with torch.no_grad():
            made.weight.copy_(weight[0].T)
            if bias is not None:
                made.bias.copy_(bias[0])
        return made

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


@pytest.mark.parametrize("provider", _on_cpu("key_value"), ids=str)
@pytest.mark.parametrize(
    ("activation", "gated", "bias"), [("relu", False, True), ("gelu", False, False), ("silu", True, True)]
)
def test_key_value_equals_opacus(provider, activation, gated, bias, available):
    available(provider)
    made = key_value_inputs(LENGTHS, 7, 3, 5, torch.float64, gated=gated, bias=bias)
    # the same neurons in every edit; offsets are the one integer tensor
    shared = [t if t is None or not t.is_floating_point() else t[:1].expand_as(t).contiguous() for t in made[1:]]
    keys, own_bias, values, starts, gate_keys, gate_bias = shared
    x = made[0]
    grad = torch.randn(len(x), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = _Neurons(x, *shared, activation)
    goal, goal_x, by_name = _per_example(module, x, grad, LENGTHS)
    y, entering = provider.function()(x, keys, own_bias, values, starts, activation, gate_keys, gate_bias)
    assert_close(y, goal, length=10, name="y")
    weights = ("up_proj.weight", "up_proj.bias", "down_proj.weight", "gate_proj.weight", "gate_proj.bias")
    needs = [True, *(name in by_name for name in weights)]
    assert sum(needs) == 1 + len(by_name)
    got = provider.function("key_value_backward")(grad, x, keys, values, starts, entering, activation, gate_keys, needs)
    goals = [goal_x, *(by_name.get(name) for name in weights)]
    for name, one, other in zip(("x", *weights), got, goals, strict=True):
        if other is not None:
            assert_close(one, other.mT if other.dim() == 3 else other, length=30, name=f"gradient of {name}")


def _liger(name):
    """Return liger-kernel's autograd function, whose kernels are Triton's; TRITON_INTERPRET runs them on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    functions = pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed")
    if LIGER_DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("liger-kernel needs a GPU where TRITON_INTERPRET is not 1")
    return getattr(functions, name)


def _compare_segments(made, leaves, scaled, risk_of_segment, bound):
    """Compare value, gradients and env_grad of each segment with a peer that knows no scale w.

    Euler: the derivative by a scale on the logits is that by a common scale on all they are linear in, ``scaled``.
    """
    value, env_grad = made
    for segment in range(len(value)):
        goal = risk_of_segment(segment)
        goals = torch.autograd.grad(goal, leaves)
        got = torch.autograd.grad(value[segment], leaves, retain_graph=True)
        assert abs(value[segment].item() - goal.item()) < bound
        for one, other in zip(got, goals, strict=True):
            assert (one - other).abs().max() < bound
            assert one.abs().max() > 100 * bound
        by_scale = sum(
            (leaf * grad).sum().item() for leaf, grad in zip(leaves, goals) if any(leaf is t for t in scaled)
        )
        assert abs(env_grad[segment].item() - by_scale) < 10 * bound


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_risk_equals_liger(kind):
    peer = _liger("LigerCrossEntropyFunction" if kind == "ce" else "LigerJSDFunction")
    logits, target, segments, _, _ = risk_inputs(12, 700, 3, kind, torch.float32, device=LIGER_DEVICE)
    logits.requires_grad_()

    def risk_of_segment(segment):
        if kind == "ce":
            # the peer writes its gradient over the logits
            return peer.apply(logits.clone(), torch.where(segments == segment, target, -100), None)[0]
        own = torch.where(segments == segment, 0, -100)
        beta = 0.0 if kind == "forward_kl" else 1.0
        return peer.apply(logits.log_softmax(-1), target.log_softmax(-1), own, beta)

    _compare_segments(ops.risk(logits, target, segments, 2, kind), [logits], [logits], risk_of_segment, 2e-6)


@pytest.mark.parametrize("provider", _on_cpu("adam_step_"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("radius", [None, 0.05])
def test_adam_step_equals_fused_adamw(provider, dtype, radius, available):
    """Twenty steps of torch's fused AdamW per row, clipped, and projected onto FT-L's ball."""
    available(provider)
    params, *_, lr, _ = adam_step_inputs(3, 60, dtype)
    params = params * 0.1
    first, second = torch.zeros_like(params), torch.zeros_like(params)
    step, active = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    rows = [torch.nn.Parameter(row.clone()) for row in params]
    optimisers = [torch.optim.AdamW([p], lr=float(r), fused=True) for p, r in zip(rows, lr, strict=True)]
    make = torch.Generator().manual_seed(2)
    clipped = held = 0
    for _ in range(20):
        # norms on both sides of the clip
        grads = (torch.randn(3, 60, generator=make) * torch.rand(3, 1, generator=make)).to(dtype)
        settings = (0.9, 0.999, 1e-8, 0.01, 4.0, radius)
        norm = provider.function()(params, grads, first, second, step, lr, active, *settings)
        for row, (parameter, optimiser) in enumerate(zip(rows, optimisers, strict=True)):
            parameter.grad = grads[row].clone()
            total = torch.nn.utils.clip_grad_norm_([parameter], 4.0)
            clipped += int(total > 4.0)
            assert_close(norm[row], total.double(), length=60, name="norm")
            optimiser.step()
            if radius is not None:
                with torch.no_grad():
                    parameter.clamp_(-radius, radius)
                    held += int((parameter.abs() == radius).sum())
    assert 0 < clipped < 60
    assert held > 0 or radius is None
    # a step of lr in the direction of a ratio: its error is that of the ratio, and it is made twenty times
    bound = 20 * float(lr.max()) * 16 * torch.finfo(dtype).eps
    assert (params - torch.stack([p.detach() for p in rows])).abs().max() < bound


@pytest.mark.parametrize("provider", _on_cpu("nearest_keys"), ids=str)
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_nearest_keys_equals_faiss(provider, metric, available):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    available(provider)
    queries, keys = nearest_keys_inputs(9, 900, 24, torch.float32)
    values, indices = provider.function()(queries, keys, 10, metric)
    if metric == "cosine":
        queries, keys = (torch.nn.functional.normalize(t) for t in (queries, keys))
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(24) if metric == "l2" else faiss.IndexFlatIP(24)
    index.add(keys.numpy())
    goal, goal_indices = index.search(queries.numpy(), 10)
    assert_close(values, torch.from_numpy(goal).double(), length=24, name="values")
    # the values differ by far more than rounding
    assert indices.tolist() == goal_indices.tolist()


@pytest.mark.parametrize("provider", _on_cpu("topk_agreement"), ids=str)
def test_topk_agreement_equals_a_plain_sort(provider, available):
    available(provider)
    before, after = topk_agreement_inputs(9, 300, torch.float32)
    top1, ranked = provider.function()(before, after, 10)
    for token, pair in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        one, other = (sorted(range(300), key=lambda place: (-logits[place], place))[:10] for logits in pair)
        assert float(top1[token]) == float(one[0] == other[0])
        assert float(ranked[token]) == sum(a == b for a, b in zip(one, other, strict=True)) / 10
    # not all alike, and ties among the ten
    assert 0 < float(ranked.mean()) < 1
    assert any(a == b for row in before.sort(descending=True).values[:, :10].tolist() for a, b in pairwise(row))
