"""Settings of training."""

from __future__ import annotations

from dataclasses import dataclass

from fastedit.settings import check_ranges

SCHEDULES = ("constant", "cosine")
#: From so many records on a trained part can learn from their variety; fewer need settings of their own.
MANY_RECORDS = 300


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of the loop.

    Args:
        steps: most optimiser steps.
        batch_size: records of a step, for tasks that take records.
        lr: of AdamW, times the task's factor by group.
        warmup: steps over which the rate rises from 0.
        schedule: "constant", or "cosine" down to a hundredth at the last step.
        clip: largest Euclidean norm of the whole gradient; None is off.
        weight_decay: decoupled.
        betas, eps: of AdamW.
        valid_every: steps between validations, the last step is always followed by one; None never validates and keeps
            the last parameters.
        patience: validations without a better score before training stops; None never stops early.
        checkpoint_every: steps between checkpoints.
        seed: of everything that is drawn.
    Raises:
        ValueError: a number outside of its range.
    """

    steps: int = 500
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 20
    schedule: str = "constant"
    clip: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    valid_every: int | None = 100
    patience: int | None = 3
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            "train",
            self,
            at_least=dict.fromkeys(("batch_size", "valid_every", "patience", "checkpoint_every"), 1),
            positive=("lr", "clip", "eps"),
            not_negative=("steps", "warmup", "weight_decay"),
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train: betas lie in 0 to 1, without 1 (got betas={self.betas!r})")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train: schedule is one of {list(SCHEDULES)} (got schedule={self.schedule!r})")
