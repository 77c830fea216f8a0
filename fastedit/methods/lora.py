"""Low-rank adapters fitted to one edit each (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method, check_positions, last_layers, layer_sites, positions_option
from fastedit.settings import check_fit, check_ranges, check_retain

#: What the factors lose at a step by default, as a share.
FADING = 0.02


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of ``lora``.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers.
        names: linear modules of a layer: "up", "gate", "down", "q", "k", "v", "o", or what else the model has; None is
            "up" and "down" where they are there, else "gate_up" and "down", or "block", all experts as one. What was
            taken is in a run's provenance ("sites").
        rank: r.
        alpha: the change is scaled by alpha / rank.
        steps: most optimiser steps.
        lr: of AdamW; None is 0.6 / hidden size (1.5e-4 at 4096, 5e-3 at 128).
        clip: largest gradient norm of an edit; None is off.
        weight_decay: on the factors, decoupled; None is 0.02 / lr, two per cent a step. The first factor is drawn, and
            what of it no gradient asks for fades: measured, it holds what must stay (docs/methods.md). 0 is none.
        positions: "all", or "after_image": the delta acts on the tokens behind the image only, in edits and answers
            alike. Another delta than "all", and a faster fit: the image's tokens become constants of the layers above.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
        retain: how a sequence keeps earlier edits while the next one is fitted: "none", "nullspace" (its change sees
            none of their inputs, AlphaEdit, arXiv 2410.02355) or "replay" (some of them are held by a KL term).
        retain_share: "nullspace": most directions of a map's input that are kept from change, as a share.
        retain_replayed, retain_weight: "replay": earlier edits in a fit, and their KL term's weight where the objective
            has none.
        seed: of the first factor, the same for every edit.
    """

    layers: int | tuple[int, ...] = 2
    names: tuple[str, ...] | None = None
    rank: int = 8
    alpha: float = 16.0
    steps: int = 100
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float | None = None
    positions: str = "all"
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False
    retain: str = "none"
    retain_share: float = 0.5
    retain_replayed: int = 16
    retain_weight: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fit("lora", self)
        check_ranges("lora", self, at_least={"rank": 1}, positive=("alpha",))
        check_positions("lora", self.positions)
        check_retain("lora", self)


class LoRA(Method):
    """Low-rank delta, always on."""

    Config: ClassVar[type] = LoRAConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: LoRAConfig) -> DeltaSpec:
        """Low-rank factors beside the chosen modules."""
        sites = layer_sites(model, last_layers(config.layers, model.n_layers, "lora"), config.names, "lora")
        options: dict[str, float | str] = {
            "rank": config.rank,
            "scale": config.alpha / config.rank,
            "seed": config.seed,
        }
        options |= positions_option(config.positions)
        return DeltaSpec("low_rank", tuple(sites), options)

    @staticmethod
    def solver(model: EditableModel, config: LoRAConfig) -> SolverConfig:
        """AdamW per edit."""
        lr = 0.6 / model.hidden_size if config.lr is None else config.lr
        return SolverConfig(
            steps=config.steps,
            lr=lr,
            clip=config.clip,
            weight_decay=FADING / lr if config.weight_decay is None else config.weight_decay,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
        )
