"""Definition of ``mmd2_kept``: ``mmd2`` of one group that keeps what the weights of its pairs are made of."""

import torch
from torch import Tensor

from fastedit.reference.arguments import check_mmd2_kept, check_mmd2_pairs, check_mmd2_upstream
from fastedit.reference.mmd2 import groups_of, kernel_of, mmd2, squared_distances


def mmd2_kept(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (1,), env_grad (1,) and pairs (n + m, n + m) of the rows of x above those of y.

    With D the squared distance of a pair, pairs hold kappa'(D) on and above the diagonal and D kappa''(D) below it:
    both are symmetric. They are 0 where a sample is empty.
    """
    check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths)
    value, env_grad = mmd2(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    rows = x.shape[0] + y.shape[0]
    if x.shape[0] == 0 or y.shape[0] == 0:
        return value, env_grad, value.new_zeros(rows, rows)
    (group,) = groups_of(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    stack = torch.cat([group.x, group.y])
    distance = squared_distances(stack, stack, same=True)
    _, first, second = kernel_of(distance, group.beta)
    return value, env_grad, first.triu() + (distance * second).tril(-1)


def mmd2_kept_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    bandwidths: Tensor,
    pairs: Tensor,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and y of ``<grad_value, value> + <grad_env, env_grad>``."""
    check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    check_mmd2_pairs(pairs, x, y)
    (group,) = groups_of(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    n, m = x.shape[0], y.shape[0]
    weight = pairs.new_full((n + m, n + m), 2.0 * group.weight_xy)
    weight[:n, :n] = 4.0 * group.weight_x
    weight[n:, n:] = 4.0 * group.weight_y
    # W of the pairs above the diagonal, psi' = 2 (kappa' + D kappa'')
    above = grad_value.to(pairs) * pairs + grad_env.to(pairs) * 2.0 * (pairs + pairs.T)
    W = weight * (above.triu(1) + above.triu(1).T)
    stack = torch.cat([group.x, group.y])
    grad = W.sum(1)[:, None] * stack - W @ stack
    return grad[:n].to(x.dtype), grad[n:].to(y.dtype)
