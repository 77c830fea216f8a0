"""Muon for hidden matrices, AdamW for everything else, one schedule: warm-up, then cosine towards zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


_NEWTON_SCHULZ = "torch.optim._muon._zeropower_via_newtonschulz"
#: Whether products in bf16 are faster than in float32 on this machine.
FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def orthogonal(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return what torch's Muon makes of a gradient (n, m), in its own dtype: Newton-Schulz steps of its coefficients.

    torch does them in bfloat16, which takes twenty times as long as float32 where no instruction multiplies it.
    """
    a, b, c = coefficients
    wide = grad.shape[0] <= grad.shape[1]
    x = grad if wide else grad.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Optimiser:
    """Steps the parameters that it is given.

    Args:
        named: names and parameters; matrices that are no embedding and no adapter go to Muon.
        steps: of the schedule. matrix_lr: of Muon. rest_lr: of AdamW. warm_up: steps.
        floor: share of the learning rate at the last step.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        steps: int,
        *,
        matrix_lr: float,
        rest_lr: float,
        warm_up: int = 60,
        floor: float = 0.02,
        weight_decay: float = 0.02,
    ) -> None:
        hidden: list[Parameter] = []
        rest: list[Parameter] = []
        for name, parameter in named:
            matrix = parameter.ndim == 2 and "embed" not in name and "adapter" not in name
            (hidden if matrix else rest).append(parameter)
        self.parameters, self._hidden = hidden + rest, hidden
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(torch.optim.Muon(hidden, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay))
        if rest:
            adam = torch.optim.AdamW(rest, lr=rest_lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
            self._parts.append(adam)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            share = min(1.0, (step - warm_up) / max(1, steps - warm_up))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self._parts]

    def step(self, loss: Tensor, rank: int = 0, processes: int = 1) -> float:
        """Back-propagate, clip to norm 1, update; returns the norm before clipping.

        Args:
            loss: of this process. rank, processes: of a group that shares a batch: gradients are averaged, and each
                process updates every so manieth of the hidden matrices, which takes a fifth of a step.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        if processes > 1:
            _reduce([parameter.grad for parameter in self.parameters if parameter.grad is not None], 1 / processes)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        for number, parameter in enumerate(self._hidden):
            if number % processes != rank:
                parameter.grad = None
        for part, schedule in zip(self._parts, self._schedules, strict=True):
            if math.isfinite(norm):
                with nullcontext() if FAST_BF16 else patch(_NEWTON_SCHULZ, orthogonal):
                    part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)
        if processes > 1:
            with torch.no_grad():
                for number, parameter in enumerate(self._hidden):
                    parameter.mul_(number % processes == rank)
                _reduce([parameter.data for parameter in self._hidden], 1.0)
        return norm


def _reduce(tensors: Sequence[Tensor], factor: float) -> None:
    """Put in place of each tensor the sum over processes, times a factor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor) * factor)
