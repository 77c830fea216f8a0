"""Definition of ``adam_step_outer_``: ``adam_step_`` of gradients that are given as sums of outer products."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastedit.reference._checks import check_dense, fail, offsets_of
from fastedit.reference.adam_step import adam_step_
from fastedit.reference.arguments import check_adam_settings

_OP = "adam_step_outer_"


def adam_step_outer_(
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> Tensor:
    """Update the matrices (B, o, i) of every part, their moments and step (B,) in place; return the norms (B,)."""
    state = (exp_avg, exp_avg_sq)
    check_adam_step_outer(
        params, inputs, grads, offsets, *state, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius
    )
    _check_memory([*params, *exp_avg, *exp_avg_sq], params[0])
    dense = [
        outer_products(y, x, each.shape[0], ends)
        for each, x, y, ends in zip(params, inputs, grads, offsets, strict=True)
    ]
    rows = [torch.cat([part.flatten(1) for part in parts], 1) for parts in (params, *state)]
    gradient = torch.cat([part.flatten(1) for part in dense], 1)
    norm = torch.where(active, torch.linalg.vector_norm(gradient, dim=1), 0.0)
    # an edit whose norm is not finite keeps every bit
    adam_step_(
        rows[0],
        gradient,
        rows[1],
        rows[2],
        step,
        lr,
        active & norm.isfinite(),
        beta1,
        beta2,
        eps,
        weight_decay,
        clip,
        radius,
    )
    for parts, row in zip((params, *state), rows, strict=True):
        widths = [part[0].numel() if len(part) else 0 for part in parts]
        for part, values in zip(parts, torch.split(row, widths, 1) if len(row) else (), strict=False):
            part.copy_(values.view_as(part))
    return norm


def outer_products(grads: Tensor, inputs: Tensor, edits: int, offsets: Tensor) -> Tensor:
    """Return the sums over every edit's tokens of grads (T, o) times inputs (T, i) transposed: (B, o, i)."""
    starts = offsets_of(_OP, offsets, inputs.shape[0], what="the number of tokens", rows_name="T")
    out = grads.new_zeros(edits, grads.shape[1], inputs.shape[1])
    for edit, (start, end) in enumerate(pairwise(starts)):
        out[edit] = grads[start:end].T @ inputs[start:end]
    return out


def check_adam_step_outer(
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> None:
    """Check the arguments of ``adam_step_outer_``."""
    lists = {
        "params": params,
        "inputs": inputs,
        "grads": grads,
        "offsets": offsets,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }
    lengths = {name: len(given) for name, given in lists.items()}
    if not params or len(set(lengths.values())) > 1:
        fail(_OP, "there is at least one part, and every list has one entry per part", **lengths)
    if params[0].dim() != 3:
        fail(_OP, "params are (B, o, i)", params=tuple(params[0].shape))
    for part in zip(*lists.values(), strict=True):
        _check_part(dict(zip(lists, part, strict=True)), params[0])
    check_adam_settings(_OP, params[0], step, lr, active, beta1, beta2, eps, weight_decay, clip, radius)


def _check_part(given: dict[str, Tensor], first: Tensor) -> None:
    """Check the tensors of one part by name; ``first`` are the matrices of the first part."""
    check_dense(_OP, **given)
    params, inputs, grads, offsets, exp_avg, exp_avg_sq = given.values()
    fits = params.dim() == 3 and inputs.dim() == 2 and grads.dim() == 2
    fits = fits and len(params) == len(first) and offsets.shape == (len(first) + 1,)
    fits = fits and inputs.shape[1] == params.shape[2] and grads.shape == (inputs.shape[0], params.shape[1])
    if not fits or exp_avg.shape != params.shape or exp_avg_sq.shape != params.shape:
        rule = "params, exp_avg and exp_avg_sq are (B, o, i), inputs (T, i), grads (T, o), offsets (B + 1,)"
        fail(_OP, rule, **{name: tuple(tensor.shape) for name, tensor in given.items()}, B=len(first))
    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    single = {dtype for name, dtype in dtypes.items() if name != "offsets"} == {first.dtype}
    if not single or first.dtype not in (torch.float32, torch.float64) or offsets.dtype != torch.int64:
        fail(_OP, "all are float32 or all are float64, offsets int64", **dtypes)
    if any(tensor.device != first.device for tensor in given.values()):
        fail(_OP, "all are on one device", **{name: tensor.device for name, tensor in given.items()})
    o, i = params.shape[1:]
    for name in ("params", "exp_avg", "exp_avg_sq"):
        between, along, unit = given[name].stride()
        dense = (i <= 1 or unit == 1) and (o <= 1 or along == i)
        if not dense or (len(first) > 1 and between < o * i):
            fail(_OP, f"matrices of {name} are contiguous and do not share memory", **{name: (between, along, unit)})


def _check_memory(tensors: Sequence[Tensor], first: Tensor) -> None:
    begins = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len(set(begins)) < len(begins):
        fail(_OP, "params, exp_avg and exp_avg_sq do not share memory", params=tuple(first.shape))
