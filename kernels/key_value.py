"""key_value in Triton, on low_rank's tiles: one program per block of one edit's tokens."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels.low_rank import (
    BLOCK_K,
    BLOCK_T,
    _bounds,
    _checked,
    _code,
    _expand,
    _product,
    _settings,
    _tile,
    _tiles,
    _weight_gradient_kernel,
)
from fastedit.reference.arguments import check_key_value, check_key_value_needs, check_key_value_upstream

_ACTIVATIONS = {"relu": 0, "gelu": 1, "silu": 2}


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
def _forward_kernel(
    x, keys, bias, values, offsets, gate_keys, gate_bias, y, entering, edits, T, d, n, o, m,
    x_t, x_k, keys_b, keys_k, keys_r, values_b, values_r, values_k, gate_b, gate_k, gate_r,
    bias_b, bias_r, gate_bias_b, gate_bias_r,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    edit, first, last = _tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    neuron = tl.arange(0, BLOCK_R)
    neurons_live = neuron < n
    own = _code(
        x, x_t, x_k, keys + edit * keys_b, keys_k, keys_r, rows, live, d, neuron, neurons_live,
        BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
    )  # fmt: skip
    if HAS_BIAS:
        own += tl.load(bias + edit * bias_b + neuron * bias_r, mask=neurons_live, other=0.0).to(ACC)[None, :]
    place = entering + rows[:, None] * m + neuron[None, :]
    written = live[:, None] & neurons_live[None, :]
    tl.store(place, own, mask=written)
    if GATED:
        gate = _code(
            x, x_t, x_k, gate_keys + edit * gate_b, gate_k, gate_r, rows, live, d, neuron, neurons_live,
            BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
        )  # fmt: skip
        if HAS_GATE_BIAS:
            start = gate_bias + edit * gate_bias_b
            gate += tl.load(start + neuron * gate_bias_r, mask=neurons_live, other=0.0).to(ACC)[None, :]
        tl.store(place + n, gate, mask=written)
        code = _active(gate, KIND) * own
    else:
        code = _active(own, KIND)
    _expand(
        code, values + edit * values_b, values_r, values_k, y, o, rows, live, o, neuron, neurons_live,
        BLOCK_T, BLOCK_K, ACC, USE_DOT,
    )  # fmt: skip


@triton.jit
def _token_gradient_kernel(
    grad, keys, values, offsets, gate_keys, entering, grad_x, code, inner, gate_inner, edits, T, d, n, o, m,
    grad_t, grad_k, keys_b, keys_k, keys_r, values_b, values_r, values_k, gate_b, gate_k, gate_r,
    GATED: tl.constexpr, KIND: tl.constexpr, NEED_X: tl.constexpr, NEED_VALUES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # inner and gate_inner (T, n): gradients of what enters the neurons; code (T, n): what they put out
    edit, first, last = _tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    neuron = tl.arange(0, BLOCK_R)
    neurons_live = neuron < n
    written = live[:, None] & neurons_live[None, :]
    place = rows[:, None] * n + neuron[None, :]
    on_code = _code(
        grad, grad_t, grad_k, values + edit * values_b, values_k, values_r, rows, live, o, neuron, neurons_live,
        BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
    )  # fmt: skip
    own = tl.load(entering + rows[:, None] * m + neuron[None, :], mask=written, other=0.0)
    if GATED:
        gate = tl.load(entering + rows[:, None] * m + n + neuron[None, :], mask=written, other=0.0)
        active = _active(gate, KIND)
        on_own = on_code * active
        on_gate = on_code * own * _slope(gate, KIND)
        put_out = active * own
        tl.store(gate_inner + place, on_gate, mask=written)
    else:
        on_own = on_code * _slope(own, KIND)
        on_gate = on_own
        put_out = _active(own, KIND)
    tl.store(inner + place, on_own, mask=written)
    if NEED_VALUES:
        tl.store(code + place, put_out, mask=written)
    if NEED_X:
        for k in range(0, d, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < d
            taken = neurons_live[:, None] & inside[None, :]
            w = tl.load(
                keys + edit * keys_b + neuron[:, None] * keys_r + columns[None, :] * keys_k, mask=taken, other=0.0
            )
            token = _product(on_own, w.to(ACC), tl.zeros((BLOCK_T, BLOCK_K), dtype=ACC), USE_DOT)
            if GATED:
                start = gate_keys + edit * gate_b
                w = tl.load(start + neuron[:, None] * gate_r + columns[None, :] * gate_k, mask=taken, other=0.0)
                token = _product(on_gate, w.to(ACC), token, USE_DOT)
            place_x = grad_x + rows[:, None] * d + columns[None, :]
            tl.store(place_x, token.to(grad_x.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _bias_gradient_kernel(
    inner, offsets, out, T, n, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    # out (B, n): inner (T, n) summed over the edit's own tokens in order
    edit = tl.program_id(0).to(tl.int64)
    neuron = tl.arange(0, BLOCK_R)
    start, stop = _bounds(offsets, edit, edit >= 0, T)
    acc = tl.zeros((BLOCK_R,), dtype=ACC)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        inside = (rows < stop)[:, None] & (neuron < n)[None, :]
        acc += tl.sum(tl.load(inner + rows[:, None] * n + neuron[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + edit * n + neuron, acc.to(out.dtype.element_ty), mask=neuron < n)


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return tensor.stride() if tensor is not None else (0,) * dims


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
    offsets = _checked("key_value", offsets, x.shape[0])
    edits, d, n = keys.shape
    o, m = values.shape[2], n if gate_keys is None else 2 * n
    y = x.new_empty((x.shape[0], o))
    entering = x.new_empty((x.shape[0], m), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.shape[0] == 0:
        return y, entering
    settings = _settings(x, keys, edits, n)
    # a part that is absent is neither read nor written: keys stand in for its pointer
    _forward_kernel[(_tiles(x.shape[0], edits, settings["BLOCK_T"]),)](
        x, keys, keys if bias is None else bias, values, offsets, keys if gate_keys is None else gate_keys,
        keys if gate_bias is None else gate_bias, y, entering, edits, x.shape[0], d, n, o, m,
        *x.stride(), *keys.stride(), *values.stride(), *_strides(gate_keys, 3), *_strides(bias, 2),
        *_strides(gate_bias, 2), bias is not None, gate_keys is not None, gate_bias is not None,
        _ACTIVATIONS[activation], **settings,
    )  # fmt: skip
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
    offsets = _checked("key_value", offsets, x.shape[0])
    check_key_value_needs(gate_keys is not None, needs)
    tokens, (edits, d, n), o = x.shape[0], keys.shape, values.shape[2]
    gated = gate_keys is not None
    settings = _settings(x, keys, edits, n)
    like = (x, keys, keys, values, keys, keys)
    shapes = (x.shape, keys.shape, (edits, n), values.shape, keys.shape, (edits, n))
    made = [t.new_empty(shape if need else 0) for t, shape, need in zip(like, shapes, needs, strict=True)]
    grad_x, grad_keys, grad_bias, grad_values, grad_gate_keys, grad_gate_bias = made
    code, inner, gate_inner = (
        entering.new_empty((tokens if need else 0, n)) for need in (needs[3], True, gated)
    )  # fmt: skip
    if tokens and any(needs):
        _token_gradient_kernel[(_tiles(tokens, edits, settings["BLOCK_T"]),)](
            grad, keys, values, offsets, gate_keys if gated else keys, entering.contiguous(), grad_x, code, inner,
            gate_inner, edits, tokens, d, n, o, entering.shape[1], *grad.stride(), *keys.stride(), *values.stride(),
            *_strides(gate_keys, 3), gated, _ACTIVATIONS[activation], needs[0], needs[3], **settings,
        )  # fmt: skip
    per_weight = {name: settings[name] for name in ("BLOCK_T", "BLOCK_K", "BLOCK_R", "ACC", "USE_DOT")}
    for out, source in ((grad_keys, inner), (grad_gate_keys, gate_inner)):
        if out.numel():
            grid = (edits, triton.cdiv(d, settings["BLOCK_K"]))
            _weight_gradient_kernel[grid](
                x, source, offsets, out, tokens, d, n, *x.stride(), *out.stride(), **per_weight
            )
    if grad_values.numel():
        # grad_values is (B, n, o): neurons and columns change places
        by_edit, by_neuron, by_column = grad_values.stride()
        grid = (edits, triton.cdiv(o, settings["BLOCK_K"]))
        _weight_gradient_kernel[grid](
            grad, code, offsets, grad_values, tokens, o, n, *grad.stride(), by_edit, by_column, by_neuron, **per_weight
        )
    per_bias = {name: settings[name] for name in ("BLOCK_T", "BLOCK_R", "ACC")}
    for out, source in ((grad_bias, inner), (grad_gate_bias, gate_inner)):
        if out.numel():
            _bias_gradient_kernel[(edits,)](source, offsets, out, tokens, n, **per_bias)
    return grad_x, grad_keys, grad_bias, grad_values, grad_gate_keys, grad_gate_bias


def ahead_of_time(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return (kernel, signature, constants) for compiling every kernel without a GPU; dtype is Triton's name for it."""
    acc = tl.float64 if dtype == "fp64" else tl.float32
    wide = "fp64" if dtype == "fp64" else "fp32"
    operand = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(dtype, acc)
    block = 16 if dtype == "fp64" else 0
    bias = {"BLOCK_T": block or BLOCK_T, "BLOCK_R": 16, "ACC": acc}
    base = {**bias, "BLOCK_K": block or BLOCK_K, "USE_DOT": not block}
    full = {**base, "BLOCK_B": 32, "OPERAND": operand, "GATED": True, "KIND": _ACTIVATIONS["gelu"]}
    stored = ("x", "keys", "bias", "values", "gate_keys", "gate_bias", "y", "grad", "grad_x", "a", "out")
    pointers = dict.fromkeys(stored, f"*{dtype}") | dict.fromkeys(("entering", "inner", "gate_inner"), f"*{wide}")
    pointers |= {"offsets": "*i64", "code": f"*{wide}"}
    found = []
    for kernel, constants in (
        (_forward_kernel, {**full, "HAS_BIAS": True, "HAS_GATE_BIAS": True}),
        (_token_gradient_kernel, {**full, "NEED_X": True, "NEED_VALUES": True}),
        (_bias_gradient_kernel, bias),
        (_weight_gradient_kernel, base),
    ):
        signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        found.append((kernel, signature, constants))
    return found
