"""Definition of ``low_rank``: every token times the low-rank product of its own edit."""

from itertools import pairwise

from torch import Tensor

from fastedit.reference._checks import check_tensor, offsets_of
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_low_rank


def low_rank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    """Return y (T, o) in the dtype of x; row t of edit b is x[t] @ down[b] @ up[b]."""
    check_low_rank(x, down, up, offsets)
    dtype = accumulation_dtype(x.dtype)
    out = x.new_zeros((x.shape[0], up.shape[2]))
    for edit, rows in enumerate(_rows(x, offsets)):
        out[rows] = (x[rows].to(dtype) @ down[edit].to(dtype) @ up[edit].to(dtype)).to(x.dtype)
    return out


def low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, down and up; one that is not needed is an empty tensor."""
    check_low_rank(x, down, up, offsets)
    check_tensor("low_rank", "grad", grad, x.dtype, (x.shape[0], up.shape[2]), x.device)
    dtype = accumulation_dtype(x.dtype)
    grad_x = x.new_zeros(x.shape if needs[0] else 0)
    grad_down = down.new_zeros(down.shape if needs[1] else 0)
    grad_up = up.new_zeros(up.shape if needs[2] else 0)
    for edit, rows in enumerate(_rows(x, offsets)):
        x_edit, grad_edit = x[rows].to(dtype), grad[rows].to(dtype)
        down_edit, up_edit = down[edit].to(dtype), up[edit].to(dtype)
        # (n, r): gradient of the hidden code
        code_grad = grad_edit @ up_edit.T
        if needs[0]:
            grad_x[rows] = (code_grad @ down_edit.T).to(x.dtype)
        if needs[1]:
            grad_down[edit] = (x_edit.T @ code_grad).to(down.dtype)
        if needs[2]:
            grad_up[edit] = ((x_edit @ down_edit).T @ grad_edit).to(up.dtype)
    return grad_x, grad_down, grad_up


def _rows(x: Tensor, offsets: Tensor) -> list[slice]:
    starts = offsets_of("low_rank", offsets, x.shape[0], what="the number of tokens", rows_name="T")
    return [slice(start, stop) for start, stop in pairwise(starts)]
