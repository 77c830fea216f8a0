"""UniKE (arXiv 2409.19872): extra feed-forward neurons and a memory that attention reads, held together by truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.attention_memory import without_memory
from fastedit.deltas.key_value import part_prefix
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method, Resources, last_layers, positions_option
from fastedit.methods.captured import wanted_inputs
from fastedit.methods.ike import IKE, IKEConfig
from fastedit.methods.retrieval import TextIndex
from fastedit.methods.tpatcher import Remembered, is_gated, neuron_options, patches, remember
from fastedit.methods.unike.config import UniKEConfig
from fastedit.methods.unike.memory import KnowledgeTask, triplets, unit_rms
from fastedit.objectives import Objective, Role
from fastedit.requests import EditRequest
from fastedit.training import Task, TrainerConfig

#: Size of what tells neurons of one token apart, of that of freshly drawn keys.
APART = 0.1


@dataclass(frozen=True)
class Knowledge:
    """What all edits of a run share.

    Args:
        directions: by layer (d,), what is added to values. remembered: inputs that no neuron is for. texts:
            demonstrations.
    """

    directions: dict[int, Tensor]
    remembered: Remembered | None = None
    texts: TextIndex | None = None


class UniKE(Method):
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
        options: dict[str, Any] = dict(positions_option(config.positions))
        names: list[str] = []
        if config.extrinsic == "latent":
            names.append("o")
            # The artifact's id comes with the run
            options |= {"artifact": "", "top_k": config.top_k, "reading": config.reading, "search": config.search}
            options |= {"alpha": config.alpha, "rescale": config.rescale, "own": config.own, "gain": config.gain}
        if config.intrinsic:
            names.append("down")
            options |= {"n": config.n, **neuron_options(model, config.activation), "seed": config.seed}
            if config.steers:
                options["steering"] = config.beta
            if config.keys == "tokens" or config.memory_weight:
                options |= {"memory_weight": config.memory_weight, "margin": config.margin, "most": config.most}
            if config.keys == "tokens":
                options["activation_weight"] = config.activation_weight
        kind = "attention_memory" if config.extrinsic == "latent" else "key_value"
        return DeltaSpec(kind, tuple(model.sites(layers_of(model, config), names)), options)

    @staticmethod
    def solver(model: EditableModel, config: UniKEConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=2.6 / model.hidden_size if config.lr is None else config.lr,
            clip=config.clip,
            weight_decay=config.weight_decay,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
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
            triplets(records, config.truth, config.triplets, trainer.seed),
            trainer,
            held=config.valid_records,
            width=config.width,
            temperature=config.temperature,
        )

    @staticmethod
    def setup(model: EditableModel, config: UniKEConfig, resources: Resources) -> Knowledge:
        """Directions from the artifact; inputs of other questions, and demonstrations, from the pool.

        Raises:
            ValueError: the artifact has no direction of a layer.
        """
        layers = layers_of(model, config)
        directions: dict[int, Tensor] = {}
        for layer in layers if config.steers else ():
            directions[layer] = _direction(model, config, resources, layer).to(model.device)
        remembered = None
        if config.intrinsic and (config.memory_weight or config.keys == "tokens"):
            most = config.memory if config.memory_weight else 0
            remembered = remember(model, model.sites(layers, ["up"]), resources, most)
        texts = None
        if config.extrinsic == "prompt":
            texts = IKE.setup(model, _told(config, resources.pool), resources)
        return Knowledge(directions, remembered, texts)

    @staticmethod
    def start(
        model: EditableModel,
        config: UniKEConfig,
        shared: Knowledge,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[dict[str, Tensor]]:
        """Keys and entries from the edits' own tokens, and what is constant of every edit."""
        layers = layers_of(model, config)
        feeding = model.sites(layers, ["down"]) if config.intrinsic else []
        reading = model.sites(layers, ["o"]) if config.extrinsic == "latent" and config.own else []
        gated = is_gated(model)
        found: list[dict[str, Tensor]] = []
        for request, tokens in zip(requests, _edit_tokens(model, layers, rows), strict=True):
            values: dict[str, Tensor] = {}
            for site in reading:
                values |= entries(tokens[site.layer, "q"], config.own, part_prefix(site))
            for site in feeding:
                prefix = part_prefix(site)
                if config.keys == "tokens":
                    values |= own_keys(tokens[site.layer, "up"], config.n, prefix, gated=gated, seed=config.seed)
                if config.steers:
                    values[f"{prefix}direction"] = shared.directions[site.layer]
                if shared.remembered is not None:
                    values[f"{prefix}memory"] = shared.remembered.inputs[site.layer]
                    values[f"{prefix}foreign"] = shared.remembered.foreign(request)
            found.append(values)
        return found

    @staticmethod
    def active_while_fitting(
        config: UniKEConfig, committed: Sequence[EditDelta], question: str = ""
    ) -> list[EditDelta]:
        """Neurons of earlier edits, without their entries: what the next edit's questions find will be its own."""
        newest = list(committed[-1:])
        if config.extrinsic != "latent" or not config.own:
            return newest
        return [without_memory(delta) for delta in newest] if config.intrinsic else []

    @staticmethod
    def context(config: UniKEConfig, request: EditRequest) -> str:
        """With in-context text, the edit."""
        return IKE.context(_told(config, None), request) if config.extrinsic == "prompt" else ""

    @staticmethod
    def finish(
        model: EditableModel,
        config: UniKEConfig,
        shared: Knowledge,
        requests: Sequence[EditRequest],
        deltas: Sequence[EditDelta],
    ) -> list[EditDelta]:
        """With in-context text, the edit and its demonstrations before every question."""
        if config.extrinsic != "prompt":
            return list(deltas)
        computed = IKE.compute(model, _told(config, shared.texts), shared.texts, requests, [])
        return [replace(delta, texts=one.texts) for delta, one in zip(deltas, computed, strict=True)]


def layers_of(model: EditableModel, config: UniKEConfig) -> tuple[int, ...]:
    """Numbers of the layers that are edited."""
    wanted = min(4, max(1, model.n_layers // 2)) if config.layers is None else config.layers
    return last_layers(wanted, model.n_layers, "unike")


def own_keys(tokens: Tensor, n: int, prefix: str, *, gated: bool, seed: int) -> dict[str, Tensor]:
    """What n neurons for the tokens (T, d), in turn, start from: as T-Patcher's, all on, and a little apart.

    Neurons of one token that were alike would be chosen between by rounding where a loss takes the largest terms. A
    gate has the key; what it is multiplied with keeps the drawn keys.
    """
    made = patches(tokens.repeat(-(-n // len(tokens)), 1)[:n], n, prefix, gated=gated)
    name = f"{prefix}gate_keys" if gated else f"{prefix}keys"
    draw = torch.rand(made[name].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    made[name] = made[name] + APART * (draw * tokens.shape[1] ** -0.5).to(made[name])
    dropped = {f"{prefix}off"} | ({f"{prefix}keys"} if gated else set())
    return {key: value for key, value in made.items() if key not in dropped}


def entries(tokens: Tensor, m: int, prefix: str) -> dict[str, Tensor]:
    """An edit's entries in the memory of a layer: from a token of the target on, the state behind the target.

    Args:
        tokens: (T, d), what enters the attention block from the last token of the question to the last of the target.
        m: entries; those behind the first T are off. prefix: what the names of the tensors begin with.
    """
    count = min(m, len(tokens))
    keys = tokens.new_zeros(m, tokens.shape[1])
    keys[:count] = tokens[:count]
    on = tokens.new_zeros(m)
    on[:count] = 1.0
    return {f"{prefix}keys": keys, f"{prefix}from": tokens[-1].expand(m, -1), f"{prefix}on": on}


def _edit_tokens(
    model: EditableModel, layers: Sequence[int], rows: Sequence[EditRows]
) -> list[dict[tuple[int, str], Tensor]]:
    """By edit, what enters the blocks of some layers at the tokens that predict its target, (T, d) by (layer, reader).

    A block that lies before the rows' state, because no delta reaches it, is left out.
    """
    state = PackedState.cat([edit_rows.state for edit_rows in rows])
    begins = state.layer + (state.stage == "ffn")
    sites = [s for s in model.sites(layers, ["q", "up"]) if s.name == "up" or s.layer >= begins]
    inputs, _ = wanted_inputs(model, state, sites)
    found = []
    first = 0
    for edit_rows in rows:
        chosen = (edit_rows.role == int(Role.EDIT)).nonzero().flatten() + first
        first += len(edit_rows.labels)
        found.append({_reader(site): inputs[site][chosen] for site in sites})
    return found


def _reader(site: Site) -> tuple[int, str]:
    return site.layer, site.name


def _direction(model: EditableModel, config: UniKEConfig, resources: Resources, layer: int) -> Tensor:
    if config.zeta == "random":
        generator = torch.Generator().manual_seed(1000 * config.seed + layer)
        return unit_rms(torch.randn(model.hidden_size, generator=generator))
    tensors = {} if resources.artifact is None else resources.artifact.tensors
    name = f"{layer}:direction.{config.zeta}"
    if name not in tensors:
        raise ValueError(f"unike: the artifact was trained with layer {layer} (got none of it)")
    return tensors[name]


def _told(config: UniKEConfig, demonstrated: object) -> IKEConfig:
    """How an edit is told in context: without anything to demonstrate by itself."""
    return IKEConfig(k=config.demonstrations if demonstrated else 0)
