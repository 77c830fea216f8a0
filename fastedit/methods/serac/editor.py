"""SERAC: edits are cached as text; a scope classifier picks one, a counterfactual model reads it and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.encoding import row_size
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.deltas import DeltaSpec, split_point
from fastedit.deltas.install import PLACEHOLDER
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, ComputedDelta, Method, Resources, last_layers
from fastedit.methods.serac.config import SERACConfig, SeracObjective
from fastedit.methods.serac.task import SeracTask
from fastedit.objectives import Objective
from fastedit.requests import EditRequest, Query
from fastedit.routers.scope import ScopeHeads, ScopeShape, scope_features
from fastedit.training import Artifact, TrainerConfig

#: A decoder with at most so many layers is trained whole: it is no language model that reads what a prompt tells it.
SMALL = 8


@dataclass(frozen=True)
class _Shared:
    """What the edits of a run have in common."""

    artifact: Artifact
    heads: ScopeHeads


class SERAC(Method):
    """Edits as text before the question, for questions in their scope."""

    Config: ClassVar[type] = SERACConfig
    sequence: ClassVar[Accumulation] = "route"

    @staticmethod
    def spec(model: EditableModel, config: SERACConfig) -> DeltaSpec:
        """The counterfactual change beside the chosen modules, routed by scope.

        Raises:
            ValueError: layers or names that the model does not have, or sites before which no image can be seen.
        """
        layers = config.layers
        if layers is None:
            layers = model.n_layers if model.n_layers <= SMALL else 1
        names = tuple(model.adapter.text.site_paths) if config.names is None else config.names
        sites = model.sites(last_layers(layers, model.n_layers, "serac"), names)
        options: dict[str, Any] = {
            "router": "scope",
            "scope_size": _shape(model, config).total,
            "threshold": config.threshold,
            "rank": config.rank,
            "scale": config.alpha / config.rank if config.rank else 1.0,
        }
        spec = DeltaSpec("counterfactual", tuple(sites), options)
        if split_point(spec) == (model.n_layers - 1, "ffn"):
            raise ValueError(
                "serac: names include the attention of a layer, or an earlier layer; at the last feed-forward block "
                f"no question can be read any more (got layers={config.layers!r}, names={config.names!r})"
            )
        return spec

    @staticmethod
    def solver(model: EditableModel, config: SERACConfig) -> SolverConfig:
        """Nothing is fitted to an edit."""
        return SolverConfig(steps=0)

    #: What stands before a question, in words.
    context_is: ClassVar[str] = "the cached edit"

    @staticmethod
    def context(config: SERACConfig, request: EditRequest) -> str:
        """The cached edit."""
        return config.cached(request.prompt, request.target)

    @staticmethod
    def artifact(config: SERACConfig, name: str) -> str:
        """The trained heads and counterfactual change."""
        return name

    @staticmethod
    def trainer(config: SERACConfig) -> TrainerConfig:
        """A few hundred steps; 50,000 of single records in the port."""
        return TrainerConfig(steps=450, batch_size=48, lr=2e-3, warmup=20, schedule="cosine", valid_every=100)

    @staticmethod
    def task(
        model: EditableModel,
        config: SERACConfig,
        objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> SeracTask:
        """Train heads and change; the objective is that of the mixture of both models.

        Raises:
            ValueError: too few records.
        """
        chosen = SeracObjective(config) if objective is None else objective
        heads = ScopeHeads(_shape(model, config), trainer.seed).to(model.device)
        metadata = {"method": _trained_settings(model, config)}
        return SeracTask(model, SERAC.spec(model, config), config, chosen, heads, records, trainer, metadata)

    @staticmethod
    def setup(model: EditableModel, config: SERACConfig, resources: Resources) -> _Shared:
        """The trained parts.

        Raises:
            ValueError: none, or they were trained with other settings.
        """
        artifact = resources.artifact
        if artifact is None:
            raise ValueError("serac: needs a trained part, see fastedit.train(model, 'serac', records) (got none)")
        known = dict(artifact.config["method"])
        # One trained before there was a choice read what enters the first trained layer
        known.setdefault("scope_layer", 0)
        for name, mine in _trained_settings(model, config).items():
            if known.get(name) != mine:
                raise ValueError(
                    f"serac: an edit has the settings that its trained part was trained with (got {name}={mine!r}, "
                    f"trained with {known.get(name)!r})"
                )
        return _Shared(artifact, ScopeHeads.of(artifact, model.device))

    @staticmethod
    @torch.no_grad()
    def compute(
        model: EditableModel,
        config: SERACConfig,
        shared: _Shared,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[ComputedDelta]:
        """The text of every edit and its embedding.

        Raises:
            ValueError: an edit that the model has no positions for once its text stands before its own question.
        """
        templates = [config.cached(request.prompt, request.target) + PLACEHOLDER for request in requests]
        for request, template in zip(requests, templates, strict=True):
            _check_fits(model, request, template)
        encoded = model.encode([Query(request.prompt, request.image) for request in requests], answers=False)
        state = packed_prefix(model, packed_start(model, encoded), *split_point(SERAC.spec(model, config)))
        points = shared.heads(scope_features(model, state, shared.heads.shape))
        return [
            ComputedDelta({"scope": point}, {"template": template}, {"artifact": shared.artifact.id})
            for point, template in zip(points, templates, strict=True)
        ]


def _scope_layer(model: EditableModel, config: SERACConfig) -> int:
    """The layer whose input the scope reads.

    Raises:
        ValueError: the model has no such layer.
    """
    layer = model.n_layers // 2 if config.scope_layer is None else config.scope_layer
    if not 0 <= layer < model.n_layers:
        raise ValueError(
            f"serac: scope_layer is one of the model's layers, 0 to {model.n_layers - 1} (got scope_layer={layer!r})"
        )
    return layer


def _shape(model: EditableModel, config: SERACConfig) -> ScopeShape:
    return ScopeShape(
        layer=_scope_layer(model, config),
        width=model.hidden_size,
        size=config.scope_size,
        hidden=config.scope_hidden,
        segments=config.scope_segments,
        sees_image=not config.faithful,
        dropout=config.scope_dropout,
    )


def _trained_settings(model: EditableModel, config: SERACConfig) -> dict[str, Any]:
    """What an edit and its artifact must agree on, plain values."""
    spec = SERAC.spec(model, config)
    return {
        "sites": [f"{site.layer}.{site.name}" for site in spec.sites],
        "rank": config.rank,
        "scale": spec.options["scale"],
        "context": config.context,
        "faithful": config.faithful,
        "scope_layer": _scope_layer(model, config),
        "scope_size": config.scope_size,
        "scope_segments": config.scope_segments,
    }


def _check_fits(model: EditableModel, request: EditRequest, template: str) -> None:
    if PLACEHOLDER in template[: -len(PLACEHOLDER)]:
        raise ValueError(f"serac: an edit's text does not hold {PLACEHOLDER!r} (got prompt={request.prompt!r:.80})")
    try:
        row_size(model, Query(template.replace(PLACEHOLDER, request.prompt), request.image, request.target))
    except ValueError as error:
        raise ValueError(f"serac: the cached edit and its question fit into a prompt ({error})") from error
