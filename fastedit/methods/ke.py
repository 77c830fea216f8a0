"""KnowledgeEditor: a trained network that reads the edit and gates its gradient (arXiv 2104.08164)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from fastedit.backbone import EditableModel, Site
from fastedit.deltas import DeltaSpec
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, ComputedDelta, Method, Resources, check_positions
from fastedit.methods.meta.hypernets import (
    Factors,
    Gradients,
    changed_layers,
    computed,
    edit_gradients,
    planned_spec,
    restore,
)
from fastedit.methods.meta.task import MetaObjective, MetaTask, MetaWeights
from fastedit.objectives import Objective
from fastedit.requests import EditRequest
from fastedit.settings import check_fit, check_ranges
from fastedit.training import TrainerConfig, require_artifact


@dataclass(frozen=True)
class KEConfig:
    """Settings of ``ke``; those of the network must be the ones that it was trained with.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers; None is the last tenth of them: three of 32,
            as in the multimodal ports.
        names: linear modules of a layer that are changed.
        hidden: of each direction of the LSTM that reads the edit.
        condition: length of the vector that it makes of the edit; None is four hidden sizes of the model, at most 1024
            (the multimodal port's).
        inner: width of the network of every matrix.
        max_scale: largest gate.
        positions: "after_image": the change acts on the tokens behind the image only, and has as many ranks as there
            are; or "all".
        edit_weight, text_weight, image_weight, locality_weight: of the outer loss, see ``MetaObjective``. With the
            multimodal ports' 0.1, 0.1, 0.1 and 1 training is slow to edit at all.
        locality_views: kinds of image locality views of a record and training step.
        valid_records: of those given for training, kept for validation.
        row_cache_mib: memory for rows that are walked once for all steps of training.
        seed: of the network's first values.
    """

    layers: int | tuple[int, ...] | None = None
    names: tuple[str, ...] = ("up", "down")
    hidden: int = 128
    condition: int | None = None
    inner: int = 128
    max_scale: float = 1.0
    positions: str = "after_image"
    edit_weight: float = 1.0
    text_weight: float = 1.0
    image_weight: float = 1.0
    locality_weight: float = 1.0
    locality_views: int = 2
    valid_records: int = 64
    row_cache_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_positions("ke", self.positions)
        check_fit("ke", self)
        check_ranges(
            "ke",
            self,
            at_least={"hidden": 1, "condition": 1, "inner": 1, "valid_records": 1, "locality_views": 0},
            positive=("max_scale",),
            not_negative=("edit_weight", "text_weight", "image_weight", "locality_weight", "row_cache_mib"),
        )


class KENetwork(nn.Module):
    """An LSTM reads the edit; for every matrix a network makes of that a gate and two rank-one masks.

    Section 3.3: ``ΔW = σ(η)·(A ⊙ ∇W + B)`` with ``A = softmax(a)·cᵀ``, ``B = softmax(b)·eᵀ`` over outputs and inputs.
    As ``∇W = Σ_t g_t x_tᵀ``, the masked gradient is ``Σ_t (softmax(a) ⊙ g_t)(c ⊙ x_t)ᵀ``: for N tokens the change has
    rank N + 1 and is never formed. Ours: the softmax is multiplied by its length, so that A starts near c, of size one
    and not one over the width; gradients are in units of their size in training; the LSTM reads the three texts with
    learned marks between them, so that no tokenizer needs a sign for ">>".

    Args:
        sites: target linear maps.
        reader: gives the texts of an edit; no part of the network.
        config: sizes and first values.
    """

    size: Tensor

    def __init__(self, sites: Sequence[Site], reader: EditReader, config: KEConfig) -> None:
        super().__init__()
        self.sites, self.max_scale = tuple(sites), config.max_scale
        self._reader = [reader]
        width = reader.width
        length = min(1024, 4 * width) if config.condition is None else config.condition
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            self.marks = nn.Parameter(torch.randn(3, width) * reader.deviation)
            self.lstm = nn.LSTM(width, config.hidden, batch_first=True, bidirectional=True)
            self.condition = nn.Linear(2 * config.hidden, length)
            self.heads = nn.ModuleList(
                nn.Sequential(
                    weight_norm(nn.Linear(length, config.inner)),
                    nn.Tanh(),
                    weight_norm(nn.Linear(config.inner, 2 * (site.d_in + site.d_out) + 1)),
                )
                for site in sites
            )
        self.register_buffer("size", torch.ones(len(sites)))

    def measure(self, gradients: Sequence[Gradients]) -> None:
        """Take the size of the weights' gradients: the root of the mean squared norm over edits."""
        for index in range(len(self.sites)):
            squares = [_squared_norm(g.x[index], g.grad[index]) for g in gradients]
            mean = torch.cat(squares).double().mean().sqrt()
            self.size[index] = float(mean) or 1.0

    def forward(self, gradients: Gradients, requests: Sequence[EditRequest]) -> list[Factors]:
        """Factors (B, d_in, N + 1), (B, N + 1, d_out) by site; the first rank is B's."""
        condition = self._read(requests)
        made = []
        for index, site in enumerate(self.sites):
            x, grad = gradients.x[index], gradients.grad[index] / self.size[index]
            rows_a, rows_b, columns_a, columns_b, gate = self.heads[index](condition).split(
                [site.d_out, site.d_out, site.d_in, site.d_in, 1], -1
            )
            gate = self.max_scale * torch.sigmoid(gate)[:, None]
            masked = grad * (site.d_out * rows_a.softmax(-1))[:, None]
            bias = site.d_out * rows_b.softmax(-1)[:, None]
            # B's first: what is filled up comes last
            up = torch.cat([bias, masked], 1) * gate
            down = torch.cat([columns_b[:, None], x * columns_a[:, None]], 1)
            made.append((down.transpose(1, 2), up))
        return made

    def _read(self, requests: Sequence[EditRequest]) -> Tensor:
        """(B, length) from what the model said, what it shall say and what it was asked."""
        reader = self._reader[0]
        sequences = []
        for request in requests:
            parts = [part for mark, text in zip(self.marks, reader.texts(request), strict=True)
                     for part in (mark[None], text)]  # fmt: skip
            sequences.append(torch.cat(parts))
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        padded = pad_sequence(sequences, batch_first=True)
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return torch.tanh(self.condition(hidden.transpose(0, 1).flatten(1)))


def _squared_norm(x: Tensor, grad: Tensor) -> Tensor:
    """(B,) squared Frobenius norm of ``Σ_t g_t x_tᵀ``, without forming it."""
    return ((x @ x.transpose(1, 2)) * (grad @ grad.transpose(1, 2))).sum((1, 2))


class EditReader:
    """The texts of an edit as the model's own word embeddings.

    Args:
        model: frozen.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        some = torch.arange(min(256, model.vocab_size), device=model.device)
        sample = model.adapter.text.embed(some[None])[0].float()
        self.width, self.deviation = int(sample.shape[1]), float(sample.std())

    def texts(self, request: EditRequest) -> list[Tensor]:
        """(n, width) of the prediction (empty if it is not known), the target and the question."""
        return [self._embedded(text) for text in (request.prediction or "", request.target, request.prompt)]

    def _embedded(self, text: str) -> Tensor:
        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        with torch.no_grad():
            tokens = torch.tensor(ids, dtype=torch.long, device=self.model.device)
            return self.model.adapter.text.embed(tokens[None])[0].float()


class KE(Method):
    """A low-rank delta made by a trained network, always on."""

    Config: ClassVar[type] = KEConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: KEConfig) -> DeltaSpec:
        """Low-rank factors beside the chosen modules, one rank more than an edit has tokens."""
        sites = model.sites(changed_layers(config.layers, model, "ke"), config.names)
        return planned_spec(sites, config.positions)

    @staticmethod
    def solver(model: EditableModel, config: KEConfig) -> SolverConfig:
        """Nothing is fitted."""
        return SolverConfig(steps=0)

    @staticmethod
    def artifact(config: KEConfig, name: str) -> str:
        """A trained network, of the method as spelled."""
        return name

    @staticmethod
    def setup(model: EditableModel, config: KEConfig, resources: Resources) -> KENetwork:
        """The trained network on the model's device."""
        kind = f"{resources.prefix}+ke" if resources.prefix else "ke"
        artifact = require_artifact(resources.artifact, kind, model)
        network = KENetwork(KE.spec(model, config).sites, EditReader(model), config)
        restore(network, artifact, "ke")
        return network.to(model.device).eval().requires_grad_(False)

    @staticmethod
    def compute(
        model: EditableModel,
        config: KEConfig,
        shared: KENetwork,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[ComputedDelta]:
        """One pass of the edits' gradients through the network."""
        spec = KE.spec(model, config)
        gradients = edit_gradients(model, spec.sites, rows)
        with torch.no_grad():
            return computed(spec, shared(gradients, requests))

    @staticmethod
    def trainer(config: KEConfig) -> TrainerConfig:
        """Two thousand steps."""
        return TrainerConfig(
            steps=2000, batch_size=16, lr=3e-3, schedule="cosine", valid_every=250, patience=4, checkpoint_every=250
        )

    @staticmethod
    def task(
        model: EditableModel,
        config: KEConfig,
        objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> MetaTask:
        """Meta-training; without an objective under the same loss as MEND's.

        The paper constrains the KL on unrelated inputs by a multiplier, the multimodal port the norm of the change;
        here the KL on locality views has the weight of MEND's, so that the two networks are compared like with like.
        """
        spec = KE.spec(model, config)
        weights = MetaWeights(config.edit_weight, config.text_weight, config.image_weight, config.locality_weight)
        return MetaTask(
            "ke",
            model,
            spec,
            KENetwork(spec.sites, EditReader(model), config).to(model.device),
            MetaObjective(weights) if objective is None else objective,
            records,
            trainer,
            factors={},
            locality=config.locality_views,
            held=config.valid_records,
            room=config.row_cache_mib << 20,
            config=asdict(config),
        )
