"""low_rank in Triton: two products of its own kernels for tokens, one for the gradient of each factor."""

from torch import Tensor

from fastedit.kernels._grouped import checked_offsets, code_of, expand, weight_gradient
from fastedit.reference._checks import check_tensor
from fastedit.reference.arguments import check_low_rank


def low_rank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    """Return y (T, o); arguments as the op's; on a GPU offsets are only kept within the tokens."""
    check_low_rank(x, down, up, offsets)
    offsets = checked_offsets("low_rank", offsets, x.shape[0])
    y = x.new_empty((x.shape[0], up.shape[2]))
    if y.numel():
        expand(code_of(x, down, offsets), up, offsets, y)
    return y


def low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, down and up; one that is not needed is empty."""
    check_low_rank(x, down, up, offsets)
    check_tensor("low_rank", "grad", grad, x.dtype, (x.shape[0], up.shape[2]), x.device)
    offsets = checked_offsets("low_rank", offsets, x.shape[0])
    grads = (t.new_empty(t.shape if need else 0) for t, need in zip((x, down, up), needs, strict=True))
    grad_x, grad_down, grad_up = grads
    if grad_x.numel() or grad_down.numel():
        on_code = code_of(grad, up.transpose(1, 2), offsets)
        if grad_x.numel():
            expand(on_code, down.transpose(1, 2), offsets, grad_x)
        if grad_down.numel():
            weight_gradient(x, on_code, offsets, grad_down)
    if grad_up.numel():
        # the gradient of up (B, r, o), seen as (B, o, r)
        weight_gradient(grad, code_of(x, down, offsets), offsets, grad_up.transpose(1, 2))
    return grad_x, grad_down, grad_up
