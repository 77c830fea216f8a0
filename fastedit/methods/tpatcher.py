"""T-Patcher (arXiv 2301.09785): one extra feed-forward neuron for every token that the model gets wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.data.images import image_key
from fastedit.deltas import DeltaSpec
from fastedit.deltas.key_value import part_prefix
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method, Resources, last_layers, positions_option
from fastedit.methods.captured import answer_inputs, wanted_inputs
from fastedit.objectives import Role
from fastedit.ops.key_value import ACTIVATIONS
from fastedit.requests import EditRequest, Query
from fastedit.settings import check_fit, check_ranges

#: Names of feed-forward activations in model configurations, as `key_value` calls them.
KNOWN = {"silu": "silu", "swish": "silu", "relu": "relu"}
KNOWN |= dict.fromkeys(("gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu")
PLACES = ("all", "after_image", "answer")
#: Records that are asked together.
RECORDS = 32


@dataclass(frozen=True)
class TPatcherConfig:
    """Settings of ``tpatcher``: the paper's, but steps, rate and the weight of the memory loss (there 5), which were
    found on a train split of the embedded model.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers.
        neurons: most neurons of an edit and layer, for its first wrong tokens.
        steps: optimiser steps.
        lr: of AdamW; None is 3.8 / hidden size (3e-2 at 128).
        activation: of the neurons: "relu", "gelu", "silu"; None is the model's own.
        activation_weight, memory_weight: of the two losses beside the NLL; margin: of the second.
        most: how many of the largest terms the memory loss takes.
        memory: inputs that are remembered of other questions; 0 is no memory loss.
        clip: largest gradient norm of an edit; None is off.
        weight_decay: on the neurons.
        positions: "all", "after_image" or "answer" (from the last token of the prompt on): where the neurons act.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
    """

    layers: int | tuple[int, ...] = 1
    neurons: int = 5
    steps: int = 100
    lr: float | None = None
    activation: str | None = None
    activation_weight: float = 1.0
    memory_weight: float = 1.0
    margin: float = 3.0
    most: int = 1000
    memory: int = 2048
    clip: float | None = 1.0
    weight_decay: float = 0.0
    positions: str = "all"
    stop_loss: float | None = None
    check_every: int = 1
    capture: bool = False

    def __post_init__(self) -> None:
        check_fit("tpatcher", self)
        weights = ("activation_weight", "memory_weight", "memory", "margin")
        check_ranges("tpatcher", self, at_least={"neurons": 1, "most": 1}, not_negative=weights)
        check_activation("tpatcher", self.activation)
        check_places("tpatcher", self.positions)


@dataclass(frozen=True)
class Remembered:
    """Inputs that no neuron is for.

    Args:
        inputs: by layer (M, d). record: (M,) int64, number of the record that each is of.
        questions: prompt and image of the records.
    """

    inputs: dict[int, Tensor]
    record: Tensor
    questions: tuple[tuple[str, str], ...]

    def foreign(self, request: EditRequest) -> Tensor:
        """(M,) bool: those that are not of the edit's own question."""
        asked = (request.prompt, _image(request)) if any(p == request.prompt for p, _ in self.questions) else None
        keep = torch.tensor([question != asked for question in self.questions], dtype=torch.bool)
        return keep.to(self.record.device)[self.record]


class TPatcher(Method):
    """Neurons beside the last feed-forward blocks, always on.

    A neuron starts from the edit's own input q at its token, as the paper's: key ``q / ||q||^2`` and bias 0, so that 1
    enters it there. Its value starts at 0 and not from a normal distribution, so that a fit starts from the base model.
    In a gated block the gate has this key, and the factor beside it starts at 1.
    """

    Config: ClassVar[type] = TPatcherConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: TPatcherConfig) -> DeltaSpec:
        """Neurons beside the modules that end the blocks."""
        layers = last_layers(config.layers, model.n_layers, "tpatcher")
        options = {
            "n": config.neurons,
            **neuron_options(model, config.activation),
            "switches": True,
            "activation_weight": config.activation_weight,
            "memory_weight": config.memory_weight,
            "margin": config.margin,
            "most": config.most,
        }
        return DeltaSpec(
            "key_value", tuple(model.sites(layers, ["down"])), options | positions_option(config.positions)
        )

    @staticmethod
    def solver(model: EditableModel, config: TPatcherConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=3.8 / model.hidden_size if config.lr is None else config.lr,
            clip=config.clip,
            weight_decay=config.weight_decay,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
        )

    @staticmethod
    def setup(model: EditableModel, config: TPatcherConfig, resources: Resources) -> Remembered:
        """Inputs of the blocks at the answers of other questions, of texts and images alike."""
        sites = model.sites(last_layers(config.layers, model.n_layers, "tpatcher"), ["up"])
        return remember(model, sites, resources, config.memory if config.memory_weight else 0)

    @staticmethod
    def start(
        model: EditableModel,
        config: TPatcherConfig,
        shared: Remembered,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[dict[str, Tensor]]:
        """Keys from the inputs at the tokens that the model gets wrong; one neuron each, the others off."""
        layers = last_layers(config.layers, model.n_layers, "tpatcher")
        readers, downs = model.sites(layers, ["up"]), model.sites(layers, ["down"])
        inputs, hidden = wanted_inputs(model, PackedState.cat([edit_rows.state for edit_rows in rows]), readers)
        predicted = torch.split(model.head(hidden).argmax(-1), [len(edit_rows.labels) for edit_rows in rows])
        found = []
        first = 0
        for request, edit_rows, guess in zip(requests, rows, predicted, strict=True):
            missed = (guess != edit_rows.labels) & (edit_rows.role == int(Role.EDIT))
            wrong = missed.nonzero().flatten()[: config.neurons] + first
            first += len(guess)
            values: dict[str, Tensor] = {}
            for reader, down in zip(readers, downs, strict=True):
                prefix = part_prefix(down)
                values |= patches(inputs[reader][wrong], config.neurons, prefix, gated=is_gated(model))
                values |= {f"{prefix}memory": shared.inputs[down.layer], f"{prefix}foreign": shared.foreign(request)}
            found.append(values)
        return found


def remember(model: EditableModel, sites: Sequence[Site], resources: Resources, most: int) -> Remembered:
    """At most so many inputs of some sites at the answers of a run's pool, its records in random order."""
    records = list(resources.pool) if most else []
    random.Random(resources.seed).shuffle(records)
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    owners: list[int] = []
    for first in range(0, len(records), RECORDS):
        asked = [(n, q) for n, r in enumerate(records[first : first + RECORDS], first) for q in other_questions(r)]
        done = 0
        for inputs, counts in answer_inputs(model, [query for _, query in asked], sites):
            owners += [asked[done + row][0] for row, count in enumerate(counts) for _ in range(count)]
            done += len(counts)
            for site in sites:
                parts[site].append(inputs[site])
        if len(owners) >= most:
            break
    empty = torch.empty(0, model.hidden_size, device=model.device)
    kept = {site.layer: torch.cat(parts[site] or [empty])[:most] for site in sites}
    record = torch.tensor(owners[:most], dtype=torch.long, device=model.device)
    return Remembered(kept, record, tuple((each.prompt, _image(each)) for each in records))


def patches(tokens: Tensor, n: int, prefix: str, *, gated: bool) -> dict[str, Tensor]:
    """What neurons for some tokens start from (T-Patcher, arXiv 2301.09785, section 3.3).

    Args:
        tokens: (m, d), m <= n, what enters the block at the tokens. n: neurons; those behind the first m are off.
        prefix: what the names of the parts begin with.
        gated: whether the neurons are gated; the key is the gate's then.
    """
    m, d = tokens.shape
    directions = tokens.new_zeros(n, d)
    directions[:m] = tokens
    keys = (directions / directions.square().sum(1, keepdim=True).clamp(min=1e-12)).T
    off = tokens.new_ones(n)
    off[:m] = 0.0
    made = {f"{prefix}tokens": directions, f"{prefix}off": off}
    if not gated:
        return {**made, f"{prefix}keys": keys, f"{prefix}bias": torch.zeros_like(off)}
    # The gate alone decides: what it is multiplied with is 1
    plain = {f"{prefix}keys": torch.zeros_like(keys), f"{prefix}bias": torch.ones_like(off)}
    return {**made, **plain, f"{prefix}gate_keys": keys, f"{prefix}gate_bias": torch.zeros_like(off)}


def is_gated(model: EditableModel) -> bool:
    """Whether the feed-forward blocks of a model are gated."""
    return "gate" in model.adapter.text.site_paths


def neuron_options(model: EditableModel, activation: str | None) -> dict[str, Any]:
    """Activation and gate of neurons like a model's own, with another activation if one is given.

    Raises:
        ValueError: the model's own is not known, and none is given.
    """
    config = model.adapter.text.config
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation_name = next((str(known) for known in (getattr(config, name, None) for name in names) if known), "")
    if activation is None and activation_name not in KNOWN:
        known = f"{list(ACTIVATIONS)} (got activation=None on a model with {activation_name!r})"
        raise ValueError(f"neurons: name an activation out of {known}")
    return {"activation": activation or KNOWN[activation_name], "gate": is_gated(model)}


def check_activation(owner: str, activation: str | None) -> None:
    """Refuse an activation that no kernel has.

    Raises:
        ValueError: it is neither one of ``ACTIVATIONS`` nor None.
    """
    if activation is not None and activation not in ACTIVATIONS:
        detail = f"got activation={activation!r}"
        raise ValueError(f"{owner}: activation is one of {list(ACTIVATIONS)} or None ({detail})")


def check_places(owner: str, positions: str) -> None:
    """Refuse what is not one of ``PLACES``.

    Raises:
        ValueError: it is not.
    """
    if positions not in PLACES:
        raise ValueError(f"{owner}: positions is one of {list(PLACES)} (got positions={positions!r})")


def other_questions(record: EditRequest) -> Iterator[Query]:
    """The questions of a record with the answers that hold without its edit; one that is not known is left out."""
    asked = [
        (record.prompt, record.image, record.prediction),
        (record.rephrase, record.image, record.prediction),
        (record.locality_prompt, None, record.locality_answer),
        (record.image_locality_prompt, record.image_locality_image, record.image_locality_answer),
    ]
    for prompt, image, answer in asked:
        if prompt and answer and answer.strip():
            yield Query(prompt, image, answer)


def _image(request: EditRequest) -> str:
    return "" if request.image is None else image_key(request.image)
