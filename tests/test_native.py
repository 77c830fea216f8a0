"""Memory that the compiled kernels keep between large results."""

import subprocess
import sys

import pytest
import torch

from fastedit import _native, ops
from fastedit.testing import risk_inputs

pytestmark = pytest.mark.skipif(_native.LIBRARY is None, reason="no compiled library")
PLANE = 64 * 40_000 * 4  # bytes of the gradients made here


@pytest.fixture(autouse=True)
def _nothing_kept():
    _native.release_kept_memory()
    yield
    _native.release_kept_memory()


def _gradient(seed: int = 0) -> torch.Tensor:
    logits, *rest = risk_inputs(64, 40_000, 3, "ce", torch.float32, seed=seed)
    logits.requires_grad_()
    value, _ = ops.risk(logits, *rest)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return grad


def test_memory_of_a_dropped_result_serves_the_next():
    first = _gradient()
    place, saved = first.data_ptr(), first.clone()
    del first
    second = _gradient()
    assert second.data_ptr() == place
    assert torch.equal(second, saved)


def test_living_results_do_not_share_memory():
    first = _gradient(seed=0)
    view, saved = first[3:5], first[3:5].clone()
    del first
    # the view keeps the memory
    second = _gradient(seed=1)
    assert not torch.equal(second[3:5], saved)
    assert torch.equal(view, saved)


def test_release_gives_all_of_it_back_once():
    grads = [_gradient(), _gradient()]
    # what others freed before; those that are alive stay
    _native.release_kept_memory()
    assert _native.release_kept_memory() == 0
    del grads
    assert _native.release_kept_memory() >= 2 * PLANE
    assert _native.release_kept_memory() == 0


def test_what_is_kept_is_bounded():
    # all alive, and more than is kept once they go; untouched memory costs nothing
    like = torch.zeros(0, dtype=torch.int8)
    buffers = [ops.workspace(like, (100 << 20,)) for _ in range(12)]
    del buffers
    assert 900 << 20 < _native.release_kept_memory() <= 1 << 30


def test_a_much_larger_block_is_not_spent_on_a_small_result():
    grad = _gradient()
    place = grad.data_ptr()
    del grad
    logits, *rest = risk_inputs(64, 17_000, 3, "ce", torch.float32)
    (small,) = torch.autograd.grad(ops.risk(logits.requires_grad_(), *rest)[0].sum(), logits)
    assert small.nbytes * 2 < PLANE
    assert small.data_ptr() != place


def test_a_result_may_outlive_the_interpreter():
    script = (
        "import torch\nfrom tests.test_native import _gradient\nkept = _gradient()\n"
        "torch.utils._keep_for_this_test = kept\nprint(float(kept.sum().abs() < 1e-2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
