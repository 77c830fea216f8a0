"""Muon for hidden matrices, AdamW for everything else, one schedule: warm-up, then cosine towards zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


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
        self.parameters = hidden + rest
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

    def step(self, loss: Tensor, average: Callable[[], None] | None = None) -> float:
        """Back-propagate, clip to norm 1, update; returns the norm before clipping.

        Args:
            loss: of this process. average: takes the mean of the gradients over processes.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        if average is not None:
            average()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        for part, schedule in zip(self._parts, self._schedules, strict=True):
            if math.isfinite(norm):
                part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)
        return norm
