"""The candidates of nearest_keys: how far tensor cores may be off, and what is searched again because of it."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastedit.kernels import nearest_keys as module
from fastedit.reference import nearest_keys as reference
from fastedit.testing import nearest_keys_inputs, providers

INTERPRETED = [p for p in providers("nearest_keys") if p.id == "triton:interpreted"]
AT_ONCE = 8  # products that a tensor core adds up at once, the fewest


@pytest.fixture(autouse=True)
def _interpreter(available):
    available(INTERPRETED[0])


@pytest.fixture
def searched(monkeypatch):
    """Give what was handed from kernel to kernel: names -> tensors of the last call."""
    handed = {}

    class Watched:
        def __init__(self, kernel, *names):
            self.kernel, self.names = kernel, names

        def __getitem__(self, grid):
            def launch(*arguments, **named):
                handed.update(zip(self.names, (one.clone() for one in arguments[2 : 2 + len(self.names)]), strict=True))
                return self.kernel[grid](*arguments, **named)

            return launch

    monkeypatch.setattr(module, "_choose_kernel", Watched(module._choose_kernel, "scores", "indices", "slack"))
    monkeypatch.setattr(module, "_search_kernel", Watched(module._search_kernel, "again"))
    return handed


@pytest.fixture
def tensor_cores(monkeypatch):
    """Let the interpreter multiply as the worst tensor cores do: addends cut behind 23 bits of the largest."""

    def halves(operand):
        whole = torch.from_numpy(np.ascontiguousarray(operand))
        high = whole.bfloat16().float()
        return high.double().numpy(), (whole - high).bfloat16().double().numpy()

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if "x3" in str(input_precision):
            (left, left_low), (right, right_low) = halves(a.data), halves(b.data)
            pairs = ((left_low, right), (left, right_low), (left, right))
        else:
            pairs = ((a.data.astype(np.float64), b.data.astype(np.float64)),)
        total = d.data.astype(np.float64)
        for left, right in pairs:
            for k in range(0, left.shape[1], AT_ONCE):
                addends = [left[:, k + i, None] * right[k + i] for i in range(min(AT_ONCE, left.shape[1] - k))]
                addends.append(total)
                unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(addends).max(axis=0), 1e-300))) - 23)
                total = sum(np.trunc(addend / unit) * unit for addend in addends)
        return interpreter.TensorHandle(total.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_error_is_within_the_bound(dtype, metric, tensor_cores, searched):
    queries, keys = nearest_keys_inputs(2, 30, 200, dtype, seed=1)
    # what lies on one side is cut the same way each time
    queries, keys = queries.abs(), keys.abs()
    _, indices = module.nearest_keys(queries, keys, 20, metric)
    assert torch.equal(indices, _chosen(queries, keys, 20, metric))
    # all keys are candidates of the only part
    names, scores = (searched[name][:, 0] for name in ("indices", "scores"))
    kept = names < len(keys)
    assert int(kept.sum()) == 2 * len(keys)
    exact = _scores(queries, keys, metric)
    off = (scores.double() - exact.gather(1, names.long().clamp(max=len(keys) - 1)))[kept].abs()
    assert 0 < float(off.max()) <= float(searched["slack"].min())
    # the bound is not so wide that it says nothing
    size = {"cosine": 1.0, "dot": float(exact.abs().max()), "l2": 4.0 * float(keys.double().square().sum(1).max())}
    assert float(searched["slack"].max()) < 4e-4 * size[metric]


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_nothing_is_searched_again_without_need(metric, searched):
    queries, keys = nearest_keys_inputs(3, 200, 24, torch.float32)
    _, indices = module.nearest_keys(queries, keys, 5, metric)
    assert torch.equal(indices, _chosen(queries, keys, 5, metric))
    assert not searched["again"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_what_the_bound_leaves_open_is_searched_again(metric, tensor_cores, searched):
    """More keys than candidates whose scores differ by less than the bound, copies of them, and some that overflow."""
    make = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 24, generator=make)
    keys = queries[0] + 1e-6 * torch.randn(60, 24, generator=make)
    keys[40:50] = keys[:10]
    _, indices = module.nearest_keys(queries, keys, 6, metric)
    assert searched["again"].all()
    assert torch.equal(indices, _chosen(queries, keys, 6, metric))
    queries, keys = nearest_keys_inputs(3, 70, 24, torch.float32)
    keys[33:36] *= 3e30
    keys[36, 2] = float("inf")
    _, indices = module.nearest_keys(queries, keys, 4, metric)
    assert torch.equal(indices, _chosen(queries, keys, 4, metric))


def _scores(queries, keys, metric):
    """Return scores in float64, larger is better."""
    queries, keys = queries.double(), keys.double()
    if metric == "l2":
        return -(queries[:, None] - keys).square().sum(2)
    if metric == "cosine":
        queries, keys = (
            one / one.norm(dim=1, keepdim=True).clamp(min=reference.SMALLEST_NORM) for one in (queries, keys)
        )
    return queries @ keys.T


def _chosen(queries, keys, k, metric):
    """Return the choice by exact scores rounded to float32: NaN last, equal ones by lower index."""
    scores = _scores(queries, keys, metric).float()
    # a sort has NaN before all numbers
    order = torch.where(scores.isnan(), 0.0, scores).argsort(dim=1, descending=True, stable=True)
    last = scores.isnan().gather(1, order).to(torch.uint8).argsort(dim=1, stable=True)
    return order.gather(1, last)[:, :k]
