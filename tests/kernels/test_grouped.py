"""The products behind low_rank and key_value: their error where tensor cores round float32 operands to 11 bits."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastedit.kernels import _grouped
from fastedit.reference import low_rank as reference
from fastedit.testing import TF32, TOLERANCE, assert_close, low_rank_inputs, providers

INTERPRETED = [p for p in providers("low_rank") if p.id == "triton:interpreted"]


def _cut(operand):
    return (operand.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch, available):
    """Let the interpreter multiply float32 tiles as tensor cores do; gives the precisions that were asked for."""
    available(INTERPRETED[0])
    asked = set()
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        asked.add(str(input_precision))
        if a.data.dtype != np.float32 or "IEEE" in str(input_precision):
            return plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        left, right = _cut(np.ascontiguousarray(a.data)), _cut(np.ascontiguousarray(b.data))
        total = left @ right
        if "x3" in str(input_precision):
            total = total + _cut(a.data - left) @ right + left @ _cut(b.data - right)
        return interpreter.TensorHandle((total + d.data).astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_of_tensor_cores(dtype, tensor_cores):
    """float32 keeps its own bound; of 16-bit tokens the gradients of float32 factors have that of 11 bits."""
    x, down, up, starts = low_rank_inputs((40, 17), 130, 8, 65, dtype, weight_dtype=torch.float32)
    wide = (x.double(), down.double(), up.double(), starts)
    y = INTERPRETED[0].function()(x, down, up, starts)
    assert_close(y, reference.low_rank(*wide), length=130 * 8, name="y")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    got = INTERPRETED[0].function("low_rank_backward")(grad, x, down, up, starts, [True] * 3)
    goal = reference.low_rank_backward(grad.double(), *wide, [True] * 3)
    assert_close(got[0], goal[0], length=65 * 8, name="gradient of x")
    for one, other in zip(got[1:], goal[1:], strict=True):
        if dtype == torch.float32:
            assert_close(one, other, length=57 * 65, name="gradient")
        else:
            error = float((one.double() - other).abs().max() / other.abs().max())
            assert torch.finfo(torch.float32).eps < error <= TOLERANCE * TF32
    assert len(tensor_cores) == 1
    assert ("x3" in next(iter(tensor_cores))) == (dtype == torch.float32)


def test_settings_change_no_bit(monkeypatch, available):
    """Where every product adds column after column, as tensor cores do, all settings give the same numbers."""
    available(INTERPRETED[0])

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data
        for k in range(a.data.shape[1]):
            total = total + a.data[:, k : k + 1] * b.data[k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    x, down, up, starts = low_rank_inputs((20, 9), 70, 8, 65, torch.float32)
    grad = torch.randn(x.shape[0], 65, generator=torch.Generator().manual_seed(1))

    def step():
        y = INTERPRETED[0].function()(x, down, up, starts)
        return y, *INTERPRETED[0].function("low_rank_backward")(grad, x, down, up, starts, [True] * 3)

    first = step()
    for kernel in (_grouped._code_kernel, _grouped._expand_kernel, _grouped._weight_kernel):
        assert len(kernel.configs) > 1
        for config in kernel.configs[1:]:
            with monkeypatch.context() as patched:
                patched.setattr(kernel, "config", config)
                for one, other in zip(first, step(), strict=True):
                    assert torch.equal(one, other)
