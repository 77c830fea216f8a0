"""Muon for hidden matrices, AdamW for everything else, one schedule: warm-up, then cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.factory.muon import Muon
from fastedit.pocket.factory.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Optimiser:
    """Muon for hidden matrices, AdamW for everything else, one schedule: warm-up, then cosine to zero."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        steps: int,
        *,
        scale: float = 1.0,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        hidden: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in model.named_parameters():
            wanted = only is None or only(name)
            parameter.requires_grad_(wanted)
            if wanted:
                matrix = (
                    parameter.ndim == 2 and "embed" not in name and "lm_head" not in name and "query" not in name[:14]
                )
                (hidden if matrix else rest).append(parameter)
        self.parameters = hidden + rest
        self.parts = [
            Muon(hidden, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True),
        ]
        warm = min(recipe.warm_up, max(1, steps // 4))

        def factor(step: int) -> float:
            if step < warm:
                return scale * (step + 1) / warm
            return scale * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self.parts]

    def step(self, loss: Tensor) -> None:
        """Back-propagate, clip to norm 1, update."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)
