"""Steps and learning rates of the embedded models' training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps and learning rates; the defaults are those of the shipped models."""

    align_steps: int = 2400
    align_rows: int = 64
    first_steps: int = 60
    cycle_steps: tuple[int, ...] = (500, 450, 400, 400, 300, 300)
    cycle_lr: tuple[float, ...] = (1.0, 0.8, 0.5, 0.4, 0.3, 0.3)
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    weight_decay: float = 0.02
    warm_up: int = 60
    criterion: float = 0.97
    caption_criterion: float = 0.93
    samples: int = 200

    def wanted(self, kind: str) -> float:
        """Return the held-out accuracy at which a kind counts as learned; a caption is ten answers in one."""
        return self.caption_criterion if kind == "caption" else self.criterion


# The Q-Former takes longer to find its words; Qwen's vision side costs three times as much a step.
RECIPES = {
    "pocket-llava": Recipe(),
    "pocket-blip2": Recipe(align_steps=3000),
    "pocket-qwen2vl": Recipe(align_steps=1400),
}
