"""UniKE (arXiv 2409.19872): extra feed-forward neurons and a memory that attention reads, held together by truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.attention_memory import MODES
from fastedit.deltas.key_value import place_of
from fastedit.methods.base import Accumulation, Resources, last_layers, positions_option
from fastedit.methods.tpatcher import Remembered, check_places, neuron_options, remember
from fastedit.methods.unike_memory import TRUTHS, KnowledgeTask, unit_rms
from fastedit.objectives import Objective
from fastedit.prepared import EditRows
from fastedit.requests import EditRequest
from fastedit.solver import SolverConfig
from fastedit.training import Task, TrainerConfig

EXTRINSIC = ("latent", "prompt", "none")
ZETAS = ("truthfulness", "semantic", "random", "none")


@dataclass(frozen=True)
class UniKEConfig:
    """Settings of ``unike``. Every row of the paper's ablation is one: see below.

    Intrinsic only: ``extrinsic="none", zeta="none"``. Latent-IKE only: ``intrinsic=False``. Intrinsic with in-context
    text: ``extrinsic="prompt", zeta="none"``. Both without collaboration: ``zeta="none"`` and a number for ``alpha``.

    Args:
        layers: an int n for the last n decoder layers, all where there are fewer; or layer numbers.
        intrinsic: extra neurons. n: how many in every layer.
        extrinsic: "latent", what attention finds in the memory; "prompt", the edit as text before a question; "none".
        top_k: states that a query finds. mode: "attn" through the block's own maps, "raw" on hidden states.
        alpha: inclusion of knowledge: "dynamic", or a number. rescale: knowledge is made as long as what it replaces.
        gain: of the shares of knowledge, which move by the learning rate like everything else.
        zeta: direction that is added to the values: "truthfulness", "semantic", "random" or "none". beta: its factor.
        memory_weight, margin, most, memory: of T-Patcher's memory loss on the neurons; see ``TPatcherConfig``. The
            paper's code has it and leaves it off.
        steps: most optimiser steps. lr: of AdamW; None is 0.6 / hidden size. clip: largest gradient norm of an edit.
        weight_decay: on the neurons and shares.
        positions: "all", "after_image" or "answer" (from the last token of the prompt on): where the delta acts.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        seed: of the first keys, the same for every edit, and of a random direction.
        truth: which answer of a record is right: "prediction" where edits are counterfactual, "target" where they
            correct the model. width: of encoded states. temperature: of the encoders' losses.
        valid_records: triplets that are kept from training the encoders.
    """

    layers: int | tuple[int, ...] = 4
    intrinsic: bool = True
    n: int = 10
    extrinsic: str = "latent"
    top_k: int = 40
    mode: str = "attn"
    alpha: str | float = "dynamic"
    rescale: bool = True
    gain: float = 10.0
    zeta: str = "truthfulness"
    beta: float = 0.1
    memory_weight: float = 0.0
    margin: float = 3.0
    most: int = 1000
    memory: int = 2048
    steps: int = 30
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    positions: str = "answer"
    stop_loss: float | None = 0.02
    seed: int = 0
    truth: str = "prediction"
    width: int = 256
    temperature: float = 0.07
    valid_records: int = 200

    def __post_init__(self) -> None:
        for name, known in (("extrinsic", EXTRINSIC), ("mode", MODES), ("zeta", ZETAS), ("truth", TRUTHS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unike: {name} is one of {list(known)} (got {name}={getattr(self, name)!r})")
        for name in ("n", "top_k", "most", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"unike: {name} is at least 1 (got {name}={getattr(self, name)!r})")
        if isinstance(self.alpha, str) and self.alpha != "dynamic":
            raise ValueError(f"unike: alpha is 'dynamic' or a number (got alpha={self.alpha!r})")
        if not self.intrinsic and self.extrinsic != "latent":
            raise ValueError(f"unike: intrinsic=False leaves extrinsic='latent' (got extrinsic={self.extrinsic!r})")
        check_places("unike", self.positions)

    @property
    def steers(self) -> bool:
        """Whether a direction is added to the values."""
        return self.intrinsic and self.zeta != "none"

    @property
    def learns(self) -> bool:
        """Whether anything of the trained part is used."""
        return self.extrinsic == "latent" or (self.intrinsic and self.zeta in ("truthfulness", "semantic"))


@dataclass(frozen=True)
class Knowledge:
    """What all edits of a run share.

    Args:
        directions: by layer (d,), what is added to values. remembered: inputs of the memory loss.
    """

    directions: dict[int, Tensor]
    remembered: Remembered | None


class UniKE:
    """Neurons beside the last feed-forward blocks and a memory beside the last attention blocks, always on.

    The paper's zeta' is a trained map of zeta, the direction from wrong to right answers in the truthful space. A map
    of one vector is one vector, and a free one would not know zeta any more: ours is w times zeta's image under a fixed
    map back to hidden states, with one w per layer that starts at 0, so that a fit starts from the base model. So does
    the share of knowledge (see ``AttentionMemoryDelta``).
    """

    Config: ClassVar[type] = UniKEConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: UniKEConfig) -> DeltaSpec:
        """Neurons beside the modules that end the feed-forward blocks, the memory beside those that end attention."""
        options: dict[str, Any] = positions_option(config.positions)
        names: list[str] = []
        if config.extrinsic == "latent":
            names.append("o")
            options |= {"artifact": "", "top_k": config.top_k, "mode": config.mode, "alpha": config.alpha}
            options |= {"rescale": config.rescale, "gain": config.gain}
        if config.intrinsic:
            names.append("down")
            options |= {"n": config.n, **neuron_options(model, None), "seed": config.seed}
            if config.steers:
                options["steering"] = config.beta
            if config.memory_weight:
                options |= {"memory_weight": config.memory_weight, "margin": config.margin, "most": config.most}
        kind = "attention_memory" if config.extrinsic == "latent" else "key_value"
        return DeltaSpec(kind, tuple(model.sites(layers_of(model, config), names)), options)

    @staticmethod
    def solver(model: EditableModel, config: UniKEConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=0.6 / model.hidden_size if config.lr is None else config.lr,
            clip=config.clip,
            weight_decay=config.weight_decay,
            stop_loss=config.stop_loss,
        )

    @staticmethod
    def artifact(config: UniKEConfig, _name: str) -> str | None:
        """Memory and encoders are of one kind, whatever objective edits are fitted with."""
        return "unike" if config.learns else None

    @staticmethod
    def trainer(_config: UniKEConfig) -> TrainerConfig:
        """The paper's rate of 1e-4 is for encoders of width 4096."""
        return TrainerConfig(steps=400, batch_size=256, lr=1e-3, schedule="cosine", valid_every=50, patience=4)

    @staticmethod
    def task(
        model: EditableModel,
        config: UniKEConfig,
        _objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> Task:
        """The encoders on states of right and wrong answers."""
        return KnowledgeTask(
            model,
            model.sites(layers_of(model, config), ["q"]),
            records,
            trainer,
            width=config.width,
            temperature=config.temperature,
            truth=config.truth,
            held=config.valid_records,
        )

    @staticmethod
    def setup(model: EditableModel, config: UniKEConfig, resources: Resources) -> Knowledge:
        """Directions from the artifact, inputs of other questions from the pool."""
        directions: dict[int, Tensor] = {}
        for layer in layers_of(model, config) if config.steers else ():
            if config.zeta == "random":
                generator = torch.Generator().manual_seed(config.seed * 1000 + layer)
                found = unit_rms(torch.randn(model.hidden_size, generator=generator))
            else:
                assert resources.artifact is not None
                found = resources.artifact.tensors[f"{layer}:direction.{config.zeta}"]
            directions[layer] = found.to(model.device)
        remembered = None
        if config.intrinsic and config.memory_weight:
            readers = model.sites(layers_of(model, config), ["up"])
            remembered = remember(model, readers, resources, config.memory)
        return Knowledge(directions, remembered)

    @staticmethod
    def start(
        model: EditableModel,
        config: UniKEConfig,
        shared: Knowledge,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[dict[str, Tensor]]:
        """What is constant of every edit."""
        downs = model.sites(layers_of(model, config), ["down"]) if config.intrinsic else []
        found: list[dict[str, Tensor]] = []
        for request in requests:
            values: dict[str, Tensor] = {}
            for down in downs:
                place = place_of(down)
                if config.steers:
                    values[f"{place}direction"] = shared.directions[down.layer]
                if shared.remembered is not None:
                    values[f"{place}memory"] = shared.remembered.inputs[down.layer]
                    values[f"{place}foreign"] = shared.remembered.foreign(request)
            found.append(values)
        return found

    @staticmethod
    def finish(
        _model: EditableModel,
        config: UniKEConfig,
        _shared: Knowledge,
        requests: Sequence[EditRequest],
        deltas: Sequence[EditDelta],
    ) -> list[EditDelta]:
        """With in-context text, the edit before every question."""
        if config.extrinsic != "prompt":
            return list(deltas)
        told = [f"{request.prompt} {request.target}\n{{prompt}}" for request in requests]
        return [replace(delta, texts={"template": text}) for delta, text in zip(deltas, told, strict=True)]


def layers_of(model: EditableModel, config: UniKEConfig) -> tuple[int, ...]:
    """Numbers of the layers that are edited."""
    wanted = min(config.layers, model.n_layers) if isinstance(config.layers, int) else config.layers
    return last_layers(wanted, model.n_layers, "unike")
