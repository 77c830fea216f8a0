"""Definition of ``key_value``: every token through the extra feed-forward neurons of its own edit."""

from itertools import pairwise

import torch
from torch import Tensor

from fastedit.reference._checks import offsets_of
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_key_value, check_key_value_needs, check_key_value_upstream


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
    """Return y (T, o) in the dtype of x, and what enters the neurons: (T, n), with a gate (T, 2n), its half last."""
    check_key_value(x, keys, bias, values, offsets, activation, gate_keys, gate_bias)
    dtype = accumulation_dtype(x.dtype)
    n = keys.shape[2]
    entering = x.new_zeros((x.shape[0], n if gate_keys is None else 2 * n), dtype=dtype)
    out = x.new_zeros((x.shape[0], values.shape[2]))
    for edit, rows in enumerate(_rows(x, offsets)):
        entering[rows, :n] = _affine(x[rows], keys[edit], None if bias is None else bias[edit])
        if gate_keys is not None:
            entering[rows, n:] = _affine(x[rows], gate_keys[edit], None if gate_bias is None else gate_bias[edit])
        out[rows] = (_neurons(entering[rows], n, activation) @ values[edit].to(dtype)).to(x.dtype)
    return out, entering


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
    edits = _rows(x, offsets)
    check_key_value_needs(gate_keys is not None, needs)
    dtype = accumulation_dtype(x.dtype)
    n = keys.shape[2]
    vectors = (keys.shape[0], n)
    grad_x = x.new_zeros(x.shape if needs[0] else 0)
    grad_keys = keys.new_zeros(keys.shape if needs[1] else 0)
    grad_bias = keys.new_zeros(vectors if needs[2] else 0)
    grad_values = values.new_zeros(values.shape if needs[3] else 0)
    grad_gate_keys = keys.new_zeros(keys.shape if needs[4] else 0)
    grad_gate_bias = keys.new_zeros(vectors if needs[5] else 0)
    for edit, rows in enumerate(edits):
        x_edit, grad_edit = x[rows].to(dtype), grad[rows].to(dtype)
        # (n', m): gradient of what enters the neurons
        inner = _neurons_backward(grad_edit @ values[edit].to(dtype).T, entering[rows], n, activation)
        on_keys, on_gate = inner[:, :n], inner[:, n:]
        if needs[0]:
            token = on_keys @ keys[edit].to(dtype).T
            if gate_keys is not None:
                token = token + on_gate @ gate_keys[edit].to(dtype).T
            grad_x[rows] = token.to(x.dtype)
        if needs[1]:
            grad_keys[edit] = (x_edit.T @ on_keys).to(keys.dtype)
        if needs[2]:
            grad_bias[edit] = on_keys.sum(0).to(keys.dtype)
        if needs[3]:
            grad_values[edit] = (_neurons(entering[rows], n, activation).T @ grad_edit).to(values.dtype)
        if needs[4]:
            grad_gate_keys[edit] = (x_edit.T @ on_gate).to(keys.dtype)
        if needs[5]:
            grad_gate_bias[edit] = on_gate.sum(0).to(keys.dtype)
    return grad_x, grad_keys, grad_bias, grad_values, grad_gate_keys, grad_gate_bias


def _affine(x: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    out = x.to(dtype) @ keys.to(dtype)
    return out if bias is None else out + bias.to(dtype)


def _activate(s: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation and its derivative, that of relu being 0 at 0."""
    if activation == "relu":
        return s.clamp(min=0.0), (s > 0).to(s.dtype)
    if activation == "silu":
        gate = torch.sigmoid(s)
        return s * gate, gate * (1.0 + s * (1.0 - gate))
    # gelu by the error function
    share = 0.5 * (1.0 + torch.erf(s * 0.5**0.5))
    density = torch.exp(-0.5 * s.square()) * (2.0 * torch.pi) ** -0.5
    return s * share, share + s * density


def _neurons(entering: Tensor, n: int, activation: str) -> Tensor:
    """Return what the neurons put out, (T', n)."""
    if entering.shape[1] == n:
        return _activate(entering, activation)[0]
    return _activate(entering[:, n:], activation)[0] * entering[:, :n]


def _neurons_backward(grad: Tensor, entering: Tensor, n: int, activation: str) -> Tensor:
    """Return the gradient by ``entering`` from that by the neurons' output."""
    if entering.shape[1] == n:
        return grad * _activate(entering, activation)[1]
    active, slope = _activate(entering[:, n:], activation)
    return torch.cat([grad * active, grad * entering[:, :n] * slope], 1)


def _rows(x: Tensor, offsets: Tensor) -> list[slice]:
    starts = offsets_of("key_value", offsets, x.shape[0], what="the number of tokens", rows_name="T")
    return [slice(start, stop) for start, stop in pairwise(starts)]
