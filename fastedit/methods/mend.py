"""MEND: a trained network that turns the gradient of an edit into a low-rank change (arXiv 2110.11309)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastedit.backbone import EditableModel, Site
from fastedit.deltas import DeltaSpec
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, ComputedDelta, Method, Resources, check_positions
from fastedit.methods.meta.hypernets import (
    Factors,
    Gradients,
    Scale,
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
class MENDConfig:
    """Settings of ``mend``; those of the network must be the ones that it was trained with.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers; None is the last tenth of them: three of 32,
            as in the multimodal ports.
        names: linear modules of a layer whose gradients are edited.
        rank: of a block's two factors; None is a quarter of d_in + d_out, at most 1920 (the paper's).
        apart: let no token of an edit see the change that is meant for another (ours, see ``MendNetwork``).
        blocks: residual blocks of a network.
        directions: of inputs and gradients that are brought to size one before the network, see ``Scale``; 0 divides
            dimensions by their deviations, as the paper does.
        edit_lr: first value of the learned step size of every matrix, over the width of its input.
        edit_lr_factor: on the trainer's rate, for what is learned as a logarithm: step sizes, the ridge of ``apart``.
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
    rank: int | None = None
    apart: bool = True
    blocks: int = 2
    directions: int = 512
    edit_lr: float = 0.3
    edit_lr_factor: float = 10.0
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
        check_positions("mend", self.positions)
        check_fit("mend", self)
        check_ranges(
            "mend",
            self,
            at_least={"rank": 1, "blocks": 1, "valid_records": 1, "locality_views": 0, "directions": 0},
            positive=("edit_lr", "edit_lr_factor"),
            not_negative=("edit_weight", "text_weight", "image_weight", "locality_weight", "row_cache_mib"),
        )


class MendNetwork(nn.Module):
    """One network per distinct shape, shared by the sites that have it, which are told apart by scales and shifts.

    Section 3.2: input and output gradient of a token, normalised, pass residual blocks ``h + relu(s·(U V h + b) + o)``
    that are the identity at first (U, b and o are zero), with s and o of the site; the change of a weight is *minus*
    the learned step size times the sum of the outer products of what comes out. So at first it is plain gradient
    descent on normalised factors.

    Ours: the last block has no relu, so that what goes out may be smaller than what came in; inputs and gradients are
    scaled by directions (``Scale``); and an edit's tokens are set apart (``set_apart``): the tokens of a target have
    much alike inputs, and each one's change is made at the others too.

    Args:
        sites: target linear maps.
        config: sizes and first values.
    """

    def __init__(self, sites: Sequence[Site], config: MENDConfig) -> None:
        super().__init__()
        self.sites = tuple(sites)
        generator = torch.Generator().manual_seed(config.seed)
        members: dict[str, list[int]] = {}
        for index, site in enumerate(sites):
            members.setdefault(f"{site.d_in}x{site.d_out}", []).append(index)
        self._place = {
            index: (shape, n) for shape, sites_of_shape in members.items() for n, index in enumerate(sites_of_shape)
        }
        self.nets = nn.ModuleDict()
        for shape, sites_of_shape in members.items():
            width = sites[sites_of_shape[0]].d_in + sites[sites_of_shape[0]].d_out
            rank = min(1920, max(1, width // 4)) if config.rank is None else config.rank
            self.nets[shape] = nn.ModuleList(
                _Block(width, rank, len(sites_of_shape), generator, signed=block == config.blocks - 1)
                for block in range(config.blocks)
            )
        #: Factors on the learning rate: the wider a network, the smaller the steps of its weights.
        self.rates = {f"nets.{shape}.": min(1.0, 512 / sum(map(int, shape.split("x")))) for shape in members}
        self.x_scale = nn.ModuleList(Scale(site.d_in, config.directions) for site in sites)
        self.grad_scale = nn.ModuleList(Scale(site.d_out, config.directions) for site in sites)
        self.apart = config.apart
        self.log_ridge = nn.Parameter(torch.full((len(sites),), math.log(0.1)), requires_grad=config.apart)
        self.log_lr = nn.Parameter(torch.full((len(sites),), math.log(config.edit_lr)))

    def measure(self, gradients: Sequence[Gradients]) -> None:
        """Take the statistics of many edits."""
        for index in range(len(self.sites)):
            masks = [each.mask[index] for each in gradients]
            inputs, outputs = [each.x[index] for each in gradients], [each.grad[index] for each in gradients]
            for scale, parts in ((self.x_scale[index], inputs), (self.grad_scale[index], outputs)):
                assert isinstance(scale, Scale)
                scale.measure(torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)]))

    def forward(self, gradients: Gradients, _requests: Sequence[EditRequest]) -> list[Factors]:
        """Factors (B, d_in, N), (B, N, d_out) by site."""
        made = []
        for index, site in enumerate(self.sites):
            mask = gradients.mask[index][..., None]
            both = [self.x_scale[index](gradients.x[index]), self.grad_scale[index](gradients.grad[index])]
            hidden = torch.cat(both, -1)
            shape, number = self._place[index]
            for block in self.nets[shape]:  # type: ignore[attr-defined]
                hidden = block(hidden, number)
            x, grad = torch.split(hidden * mask, [site.d_in, site.d_out], -1)
            if self.apart:
                x = self.x_scale[index](set_apart(x, both[0], self.log_ridge[index].exp()))
            made.append((x.transpose(1, 2) / site.d_in, -self.log_lr[index].exp() * grad))
        return made


def set_apart(read: Tensor, x: Tensor, ridge: Tensor) -> Tensor:
    """Reading directions of the tokens of an edit that see their own input as before, and the others' inputs less.

    With r_s the direction of token s and x_t the input of token t, the change of the output at t is ``Σ_s (r_s·x_t)
    v_s``. The directions returned lie in the span of the r_s and have ``r_s·x_t = 0`` for t ≠ s, up to a ridge: for one
    edit what the normal equations of MALMEN (arXiv 2311.04661, section 3.3) do for many.

    Args:
        read: (B, N, d) directions. x: (B, N, d) inputs; zero where there is no token.
        ridge: scalar, relative to the mean of r_t·x_t.
    """
    seen = read @ x.transpose(1, 2)
    diagonal = seen.diagonal(dim1=1, dim2=2)
    size = diagonal.abs().sum(1) / (diagonal != 0).sum(1).clamp(min=1)
    # Where there is no token the ridge alone keeps the matrix regular
    damped = seen + torch.diag_embed((ridge * size).clamp(min=1e-12)[:, None].expand_as(diagonal))
    solved: Tensor = torch.linalg.solve(damped, read)
    return (1 + ridge) * diagonal[..., None] * solved


class _Block(nn.Module):
    """A residual low-rank block with a scale and a shift for every site."""

    def __init__(self, width: int, rank: int, n_sites: int, generator: torch.Generator, *, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        # Of variance 1/width, not 1 as in the paper's code: the hidden code is then of the size of the input
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_sites, width))
        self.shift = nn.Parameter(torch.zeros(n_sites, width))

    def forward(self, hidden: Tensor, site: int) -> Tensor:
        """(..., width) of site number ``site`` among those of this shape."""
        inner = nn.functional.linear(nn.functional.linear(hidden, self.v), self.u, self.bias)
        change = self.scale[site] * inner + self.shift[site]
        # Not relu, whose gradient at 0 is 0: all of it starts there
        return hidden + (change if self.signed else change.clamp(min=0))


class MEND(Method):
    """A low-rank delta made by a trained network, always on."""

    Config: ClassVar[type] = MENDConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: MENDConfig) -> DeltaSpec:
        """Low-rank factors beside the chosen modules, with as many ranks as an edit has tokens."""
        sites = model.sites(changed_layers(config.layers, model, "mend"), config.names)
        return planned_spec(sites, config.positions)

    @staticmethod
    def solver(model: EditableModel, config: MENDConfig) -> SolverConfig:
        """Nothing is fitted."""
        return SolverConfig(steps=0)

    @staticmethod
    def artifact(config: MENDConfig, name: str) -> str:
        """A trained network, of the method as spelled."""
        return name

    @staticmethod
    def setup(model: EditableModel, config: MENDConfig, resources: Resources) -> MendNetwork:
        """The trained network on the model's device."""
        kind = f"{resources.prefix}+mend" if resources.prefix else "mend"
        network = MendNetwork(MEND.spec(model, config).sites, config)
        restore(network, require_artifact(resources.artifact, kind, model), "mend")
        return network.to(model.device).eval().requires_grad_(False)

    @staticmethod
    def compute(
        model: EditableModel,
        config: MENDConfig,
        shared: MendNetwork,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[ComputedDelta]:
        """One pass of the edits' gradients through the network."""
        spec = MEND.spec(model, config)
        gradients = edit_gradients(model, spec.sites, rows)
        with torch.no_grad():
            return computed(spec, shared(gradients, requests))

    @staticmethod
    def trainer(config: MENDConfig) -> TrainerConfig:
        """Two thousand steps."""
        return TrainerConfig(
            steps=2000, batch_size=16, lr=2e-3, schedule="cosine", valid_every=250, patience=4, checkpoint_every=250
        )

    @staticmethod
    def task(
        model: EditableModel,
        config: MENDConfig,
        objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> MetaTask:
        """Meta-training; without an objective under the paper's own loss."""
        spec = MEND.spec(model, config)
        weights = MetaWeights(config.edit_weight, config.text_weight, config.image_weight, config.locality_weight)
        network = MendNetwork(spec.sites, config).to(model.device)
        return MetaTask(
            "mend",
            model,
            spec,
            network,
            MetaObjective(weights) if objective is None else objective,
            records,
            trainer,
            factors={"log_": config.edit_lr_factor, **network.rates},
            locality=config.locality_views,
            held=config.valid_records,
            room=config.row_cache_mib << 20,
            config=asdict(config),
        )
