"""key_value in Triton, on the products of low_rank: what enters the neurons, the neurons, and what they put out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._grouped import checked_offsets, code_of, expand, new_code, sum_of, weight_gradient
from fastedit.kernels._products import bounds, tile, tiles_of
from fastedit.reference.arguments import check_key_value, check_key_value_needs, check_key_value_upstream

_ACTIVATIONS = {"relu": 0, "gelu": 1, "silu": 2}
BLOCK_T = 16  # tokens of an edit at a time
BLOCK_N = 64  # neurons of a program


@triton.jit
def _active(s, KIND: tl.constexpr):
    if KIND == 0:
        # a NaN stays one
        return tl.where(s <= 0, 0.0, s).to(s.dtype)
    elif KIND == 1:
        return s * 0.5 * (1.0 + tl.erf(s * 0.7071067811865476))
    else:
        return s / (1.0 + tl.exp(-s))


@triton.jit
def _slope(s, KIND: tl.constexpr):
    if KIND == 0:
        return tl.where(s > 0, 1.0, 0.0).to(s.dtype)
    elif KIND == 1:
        return 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * 0.3989422804014327 * tl.exp(-0.5 * s * s)
    else:
        gate = 1.0 / (1.0 + tl.exp(-s))
        return gate * (1.0 + s * (1.0 - gate))


@triton.jit
def _neuron_kernel(
    own, gate, bias, gate_bias, offsets, entering, code, edits, T, n, m, c, splits,
    bias_b, bias_r, gate_bias_b, gate_bias_r,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # entering (T, m): keys in the first n columns, gates in the others; code (T, n): what the neurons put out
    edit, first, last = tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = (first + tl.arange(0, BLOCK_T))[:, None]
    neuron = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    neurons_live = neuron < n
    neuron = neuron[None, :]
    inside = (rows < last) & neurons_live[None, :]
    value = sum_of(own, splits, T, c, rows, neuron, inside)
    if HAS_BIAS:
        start = bias + edit * bias_b
        value += tl.load(start + neuron * bias_r, mask=neurons_live[None, :], other=0.0).to(ACC)
    tl.store(entering + rows * m + neuron, value, mask=inside)
    if GATED:
        opening = sum_of(gate, splits, T, c, rows, neuron, inside)
        if HAS_GATE_BIAS:
            start = gate_bias + edit * gate_bias_b
            opening += tl.load(start + neuron * gate_bias_r, mask=neurons_live[None, :], other=0.0).to(ACC)
        tl.store(entering + rows * m + n + neuron, opening, mask=inside)
        value = _active(opening, KIND) * value
    else:
        value = _active(value, KIND)
    tl.store(code + rows * c + neuron, value, mask=inside)


@triton.jit
def _slope_kernel(
    on_code, entering, code, inner, gate_inner, T, n, c, splits, entering_t, entering_k,
    GATED: tl.constexpr, KIND: tl.constexpr, NEED_CODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # gradients of what enters the neurons, inner and gate_inner, and what they put out, code; all (T, n) in rows of c
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    neuron = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < T) & (neuron < n)
    upstream = sum_of(on_code, splits, T, c, rows, neuron, inside)
    place = rows * c + neuron
    read = entering + rows * entering_t
    value = tl.load(read + neuron * entering_k, mask=inside, other=0.0)
    if GATED:
        opening = tl.load(read + (n + neuron) * entering_k, mask=inside, other=0.0)
        active = _active(opening, KIND)
        tl.store(gate_inner + place, upstream * value * _slope(opening, KIND), mask=inside)
        tl.store(inner + place, upstream * active, mask=inside)
        put_out = active * value
    else:
        tl.store(inner + place, upstream * _slope(value, KIND), mask=inside)
        put_out = _active(value, KIND)
    if NEED_CODE:
        tl.store(code + place, put_out, mask=inside)


@triton.jit
def _bias_kernel(
    inner, offsets, out, T, n, c, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    # out (B, n): inner (T, n) summed over the edit's own tokens in order
    edit = tl.program_id(0).to(tl.int64)
    neuron = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = bounds(offsets, edit, edit >= 0, T)
    acc = tl.zeros((BLOCK_N,), dtype=ACC)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        inside = (rows < stop)[:, None] & (neuron < n)[None, :]
        acc += tl.sum(tl.load(inner + rows[:, None] * c + neuron[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + edit * n + neuron, acc.to(out.dtype.element_ty), mask=neuron < n)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return tensor.stride() if tensor is not None else (0, 0)


def key_value(
    x: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    activation: str,
    gate_keys: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and what enters the neurons; arguments as the op's, offsets as in low_rank."""
    check_key_value(x, keys, bias, values, offsets, activation, gate_keys, gate_bias)
    offsets = checked_offsets("key_value", offsets, x.shape[0])
    tokens, (edits, _, n) = x.shape[0], keys.shape
    m = n if gate_keys is None else 2 * n
    y = x.new_empty((tokens, values.shape[2]))
    entering = x.new_empty((tokens, m), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if tokens == 0:
        return y, entering
    passed = code_of(x, keys, offsets)
    gate = passed if gate_keys is None else code_of(x, gate_keys, offsets)
    code = new_code(x, 1, n)
    # where there is no bias, a tensor that is not read stands in for its pointer
    _neuron_kernel[(tiles_of(tokens, edits, BLOCK_T), triton.cdiv(n, BLOCK_N))](
        passed, gate, keys if bias is None else bias, keys if gate_bias is None else gate_bias, offsets, entering, code,
        edits, tokens, n, m, code.stride(1), passed.shape[0], *_strides(bias), *_strides(gate_bias),
        bias is not None, gate_keys is not None, gate_bias is not None, _ACTIVATIONS[activation],
        triton.next_power_of_2(edits), BLOCK_T, BLOCK_N, tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    if y.numel():
        expand(code, values, offsets, y)
    return y, entering


def key_value_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    entering: Tensor,
    activation: str,
    gate_keys: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by x, keys, bias, values, gate keys and gate bias; one that is not needed is empty."""
    check_key_value(x, keys, None, values, offsets, activation, gate_keys, None)
    check_key_value_upstream(grad, x, keys, values, entering, gate_keys is not None)
    offsets = checked_offsets("key_value", offsets, x.shape[0])
    check_key_value_needs(gate_keys is not None, needs)
    tokens, (edits, _, n) = x.shape[0], keys.shape
    gated = gate_keys is not None
    like = (x, keys, keys, values, keys, keys)
    shapes = (x.shape, keys.shape, (edits, n), values.shape, keys.shape, (edits, n))
    grads = [t.new_empty(shape if need else 0) for t, shape, need in zip(like, shapes, needs, strict=True)]
    grad_x, grad_keys, grad_bias, grad_values, grad_gate_keys, grad_gate_bias = grads
    # of those not needed nothing is written
    code, inner, gate_inner = (new_code(x if need else x[:0], 1, n) for need in (needs[3], True, gated))
    if tokens and any(needs):
        on_code = code_of(grad, values.transpose(1, 2), offsets)
        _slope_kernel[(triton.cdiv(tokens, BLOCK_T), triton.cdiv(n, BLOCK_N))](
            on_code, entering, code, inner, gate_inner, tokens, n, inner.stride(1), on_code.shape[0],
            *entering.stride(), gated, _ACTIVATIONS[activation], needs[3], BLOCK_T, BLOCK_N,
        )  # fmt: skip
    if grad_x.numel():
        more = (gate_inner, gate_keys.transpose(1, 2)) if gate_keys is not None else None
        expand(inner, keys.transpose(1, 2), offsets, grad_x, more)
    for out, source in ((grad_keys, inner), (grad_gate_keys, gate_inner)):
        if out.numel():
            weight_gradient(x, source, offsets, out)
    if grad_values.numel():
        # the gradient of values (B, n, o), seen as (B, o, n)
        weight_gradient(grad, code, offsets, grad_values.transpose(1, 2))
    for out, source in ((grad_bias, inner), (grad_gate_bias, gate_inner)):
        if out.numel():
            acc = tl.float64 if x.dtype == torch.float64 else tl.float32
            _bias_kernel[(edits, triton.cdiv(n, BLOCK_N))](
                source, offsets, out, tokens, n, source.stride(1), BLOCK_T, BLOCK_N, acc
            )
    return grad_x, grad_keys, grad_bias, grad_values, grad_gate_keys, grad_gate_bias
