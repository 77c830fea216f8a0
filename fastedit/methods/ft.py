"""Fine-tuning of the last layers' FFN weights, or of what joins the vision tower to the decoder, on a delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastedit.backbone import EditableModel
from fastedit.backbone.vision import vision_sites
from fastedit.deltas import DeltaSpec
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method, check_positions, last_layers, layer_sites, positions_option
from fastedit.settings import check_fit, check_retain


@dataclass(frozen=True)
class FTConfig:
    """Settings of ``ft``; the defaults follow the FT baseline of VLKEB (arXiv 2403.07350): last layer, up and down.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers.
        names: linear modules of a layer: "up", "gate", "down", "q", "k", "v", "o", or what else the model has; None is
            "up" and "down" where they are there, else "gate_up" and "down", or "block", all experts as one. What was
            taken is in a run's provenance ("sites").
        steps: most optimiser steps.
        lr: of AdamW; None is 0.4 / hidden size, which is VLKEB's 1e-4 at 4096 and 3e-3 at 128.
        clip: largest gradient norm of an edit; None is off.
        weight_decay: on the delta.
        radius: FT-L's l-infinity ball around the original weights (arXiv 2012.00363); None is off.
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
    """

    layers: int | tuple[int, ...] = 1
    names: tuple[str, ...] | None = None
    steps: int = 50
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    radius: float | None = None
    positions: str = "all"
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False
    retain: str = "none"
    retain_share: float = 0.5
    retain_replayed: int = 16
    retain_weight: float = 10.0

    def __post_init__(self) -> None:
        check_fit("ft", self)
        check_positions("ft", self.positions)
        check_retain("ft", self)


class FT(Method):
    """Full delta, always on."""

    Config: ClassVar[type] = FTConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: FTConfig) -> DeltaSpec:
        """Full matrices beside the chosen modules."""
        sites = layer_sites(model, last_layers(config.layers, model.n_layers, "ft"), config.names, "ft")
        return DeltaSpec("full", tuple(sites), positions_option(config.positions))

    @staticmethod
    def solver(model: EditableModel, config: FTConfig) -> SolverConfig:
        """AdamW per edit."""
        return _adamw(model, config)


@dataclass(frozen=True)
class FTVisionConfig:
    """Settings of ``ft-vision``, VLKEB's fine-tuning of the vision side (arXiv 2403.07350).

    There it is the projector of LLaVA, and the Q-Former of BLIP-2 and MiniGPT-4 without the projection behind it; for
    Qwen-VL the tower's last block, where ours is the merger. Biases and norms stay as they are.

    Args:
        names: linear maps between vision tower and decoder, as the model's family calls them
            (``fastedit.backbone.vision.vision_sites``); None is all.
        steps: most optimiser steps.
        lr: of AdamW; None is 0.4 / hidden size, which is VLKEB's 1e-4 at 4096 and 3e-3 at 128.
        clip: largest gradient norm of an edit; None is off.
        weight_decay: on the delta.
        radius: largest absolute value of an entry of the delta; None is off.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
    """

    names: tuple[str, ...] | None = None
    steps: int = 100
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    radius: float | None = None
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False

    def __post_init__(self) -> None:
        check_fit("ft-vision", self)


class FTVision(Method):
    """Full delta behind the vision tower, always on; questions without an image never meet it."""

    Config: ClassVar[type] = FTVisionConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: FTVisionConfig) -> DeltaSpec:
        """Full matrices beside the maps between tower and decoder."""
        return DeltaSpec("full", tuple(vision_sites(model, config.names)))

    @staticmethod
    def solver(model: EditableModel, config: FTVisionConfig) -> SolverConfig:
        """AdamW per edit."""
        return _adamw(model, config)


def _adamw(model: EditableModel, config: FTConfig | FTVisionConfig) -> SolverConfig:
    return SolverConfig(
        steps=config.steps,
        lr=0.4 / model.hidden_size if config.lr is None else config.lr,
        clip=config.clip,
        weight_decay=config.weight_decay,
        radius=config.radius,
        stop_loss=config.stop_loss,
        check_every=config.check_every,
        capture=config.capture,
    )
