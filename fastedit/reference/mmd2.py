"""Definition of ``mmd2``: squared maximum mean discrepancy per group and its derivative by a scale on the features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.reference._checks import offsets_of
from fastedit.reference._precision import accumulation_dtype, widen
from fastedit.reference.arguments import check_mmd2, check_mmd2_upstream


class _Group(NamedTuple):
    """One group's centred features, bandwidth coefficients beta = 1 / (2 sigma^2) and pair weights."""

    rows_x: slice
    rows_y: slice
    x: Tensor
    y: Tensor
    beta: Tensor
    weight_x: float
    weight_y: float
    weight_xy: float


def mmd2(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Return value (G,) and env_grad (G,) in the accumulation dtype."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    value = x.new_zeros(x_offsets.shape[0] - 1, dtype=accumulation_dtype(x.dtype))
    env_grad = torch.zeros_like(value)
    for index, group in enumerate(groups_of(x, y, x_offsets, y_offsets, bandwidths, unbiased)):
        pairs = (
            (group.weight_x, squared_distances(group.x, group.x, same=True), unbiased),
            (group.weight_y, squared_distances(group.y, group.y, same=True), unbiased),
            (group.weight_xy, squared_distances(group.x, group.y, same=False), False),
        )
        for weight, distance, drop_diagonal in pairs:
            kernel, first, _ = kernel_of(distance, group.beta)
            if drop_diagonal:
                kernel.fill_diagonal_(0.0)
            value[index] += weight * kernel.sum()
            # psi(D) = d/dw kappa(w^2 D) at w = 1; zero on the diagonal by itself
            env_grad[index] += weight * (2.0 * distance * first).sum()
    return value, env_grad


def mmd2_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    bandwidths: Tensor,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and y of ``<grad_value, value> + <grad_env, env_grad>``."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    grad_x, grad_y = x.new_zeros(x.shape), y.new_zeros(y.shape)
    for index, group in enumerate(groups_of(x, y, x_offsets, y_offsets, bandwidths, unbiased)):
        upstream = (grad_value[index], grad_env[index])
        w_x = 4.0 * group.weight_x * _slope(squared_distances(group.x, group.x, same=True), group.beta, *upstream)
        w_y = 4.0 * group.weight_y * _slope(squared_distances(group.y, group.y, same=True), group.beta, *upstream)
        w_xy = 2.0 * group.weight_xy * _slope(squared_distances(group.x, group.y, same=False), group.beta, *upstream)
        on_x = (w_x.sum(1) + w_xy.sum(1))[:, None] * group.x - w_x @ group.x - w_xy @ group.y
        on_y = (w_y.sum(1) + w_xy.sum(0))[:, None] * group.y - w_y @ group.y - w_xy.T @ group.x
        grad_x[group.rows_x] = on_x.to(x.dtype)
        grad_y[group.rows_y] = on_y.to(y.dtype)
    return grad_x, grad_y


def groups_of(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> Iterator[_Group]:
    """Yield the groups in order."""
    starts_x, starts_y = mmd2_offsets(x, y, x_offsets, y_offsets)
    beta = 0.5 / widen(bandwidths).to(accumulation_dtype(x.dtype)).square()
    for index in range(len(starts_x) - 1):
        rows_x = slice(starts_x[index], starts_x[index + 1])
        rows_y = slice(starts_y[index], starts_y[index + 1])
        n, m = rows_x.stop - rows_x.start, rows_y.stop - rows_y.start
        own_beta = beta if beta.dim() == 1 else beta[index]
        if n == 0 or m == 0:
            # nothing to compare: value and gradients stay 0
            yield _Group(rows_x, rows_y, widen(x[rows_x]), widen(y[rows_y]), own_beta, 0.0, 0.0, 0.0)
            continue
        group_x, group_y = widen(x[rows_x]), widen(y[rows_y])
        # distances do not feel a shift; without it their matrix-product form cancels when features share a large mean
        centre = torch.cat([group_x, group_y]).mean(0)
        weight_x = _within_weight(n, unbiased)
        weight_y = _within_weight(m, unbiased)
        yield _Group(rows_x, rows_y, group_x - centre, group_y - centre, own_beta, weight_x, weight_y, -2.0 / (n * m))


def mmd2_offsets(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor) -> tuple[list[int], list[int]]:
    """Return both offsets as numbers; raise unless they rise from 0 to the rows."""
    starts_x = offsets_of("mmd2", x_offsets, x.shape[0], name="x_offsets", what="the rows of x", rows_name="rows")
    starts_y = offsets_of("mmd2", y_offsets, y.shape[0], name="y_offsets", what="the rows of y", rows_name="rows")
    return starts_x, starts_y


def _within_weight(count: int, unbiased: bool) -> float:
    """Weight of one ordered pair within a sample; an unbiased sample of one has no pairs and drops the term."""
    if not unbiased:
        return 1.0 / (count * count)
    return 1.0 / (count * (count - 1)) if count > 1 else 0.0


def squared_distances(a: Tensor, b: Tensor, *, same: bool) -> Tensor:
    """Return squared distances (n, m)."""
    distance = (a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2.0 * a @ b.T).clamp(min=0.0)
    if same:
        distance.fill_diagonal_(0.0)
    return distance


def kernel_of(distance: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return kappa(D) = sum_q exp(-beta_q D) and its first two derivatives by D, each (n, m)."""
    terms = torch.exp(-distance[..., None] * beta)
    return terms.sum(-1), -(terms * beta).sum(-1), (terms * beta.square()).sum(-1)


def _slope(distance: Tensor, beta: Tensor, on_value: Tensor, on_env: Tensor) -> Tensor:
    """Return W = on_value kappa' + on_env psi', psi' = 2 (kappa' + D kappa''), (n, m)."""
    _, first, second = kernel_of(distance, beta)
    return on_value * first + on_env * 2.0 * (first + distance * second)
