"""An LDKE-style editor: find the layers of an edit, fit a low-rank change there, let a classifier decide when it acts.

LDKE (arXiv 2605.29826) names two steps, Fast Localization and a Disentanglement Classifier. Only the paper's abstract
was to be had, so that layer scores, the change, the classifier, its training and every number here are our design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.data.report import target_key
from fastedit.deltas import DeltaSpec, EditDelta, split_point
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.solver import SolverConfig
from fastedit.fitting.views import ViewSource
from fastedit.methods.base import Accumulation, Method, Resources, positions_option
from fastedit.methods.ldke.config import (
    LDKEConfig,
    candidate_layers,
    named_positions,
    slots_of,
    trained_settings,
    wordings_of,
)
from fastedit.methods.ldke.localize import best_layers, layer_scores, random_layers, voted_layers
from fastedit.methods.ldke.task import ClassifierTask
from fastedit.methods.ldke.views import Untimed, walked
from fastedit.objectives import ROLES, KLObjective, Objective
from fastedit.requests import EditRequest, Query
from fastedit.routers.classifier import ANSWER, ClassifierShape, Disentangler
from fastedit.training import Artifact, TrainerConfig, require_artifact

#: Edits whose layers are looked for together.
TOGETHER = 16


@dataclass(frozen=True)
class _Shared:
    """What the edits of a run have in common; positions of layers among the candidates, None where each has its own."""

    positions: tuple[int, ...] | None
    artifact: Artifact | None = None
    classifier: Disentangler | None = None


class LDKE(Method):
    """Low-rank changes of the layers that an edit is found in, acting where a classifier says so."""

    Config: ClassVar[type] = LDKEConfig
    sequence: ClassVar[Accumulation] = "route"

    @staticmethod
    def spec(model: EditableModel, config: LDKEConfig) -> DeltaSpec:
        """Pairs of factors beside the candidates' feed-forward outputs.

        Raises:
            ValueError: layers that there are not, or candidates before which no prompt can be read.
        """
        layers = candidate_layers(config, model.n_layers)
        options: dict[str, Any] = {
            "slots": slots_of(config, layers),
            "rank": config.rank,
            "scale": config.alpha / config.rank,
            "seed": config.seed,
            **positions_option(config.positions),
        }
        if config.route:
            options |= {"router": "classifier", "entity": config.size, "relation": config.size}
            options |= {"image": model.hidden_size}
        return DeltaSpec("localized", tuple(model.sites(layers, ["down"])), options)

    @staticmethod
    def solver(model: EditableModel, config: LDKEConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=1.2 / model.hidden_size if config.lr is None else config.lr,
            clip=config.clip,
            weight_decay=config.weight_decay,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
        )

    @staticmethod
    def objective(config: LDKEConfig) -> Objective:
        """NLL of the edit and, weighed, of its rephrased views; KL(edited || unedited) on locality views."""
        return KLObjective(
            config.kl_weight, rephrases=True, rephrase_weight=config.rephrase_weight, n_views=config.n_views
        )

    @staticmethod
    def notes(model: EditableModel, config: LDKEConfig) -> dict[str, Any]:
        """How layers are chosen: off where an edit has all candidates, or the settings name its layers."""
        return {"localization": config.layers if _is_choice(config, model.n_layers) else "off"}

    @staticmethod
    def artifact(config: LDKEConfig, name: str) -> str | None:
        """The classifier, the same under every objective."""
        return "ldke" if config.route else None

    @staticmethod
    def trainer(config: LDKEConfig) -> TrainerConfig:
        """Some hundred steps; the loss is flat from the first hundred on."""
        return TrainerConfig(
            steps=150, batch_size=64, lr=2e-3, warmup=20, schedule="cosine", weight_decay=0.01, valid_every=50
        )

    @staticmethod
    def task(
        model: EditableModel,
        config: LDKEConfig,
        objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> ClassifierTask:
        """Train the classifier; no edit is fitted, so the objective is of no account.

        Raises:
            ValueError: too few records.
        """
        shape = ClassifierShape(model.hidden_size, config.size, config.queries, config.key)
        return ClassifierTask(
            model,
            split_point(LDKE.spec(model, config)),
            Disentangler(shape, trainer.seed).to(model.device),
            records,
            trainer,
            held=config.valid_records,
            stored=config.stored,
            false_rate=config.false_rate,
            contrast=config.contrast,
            decorrelation=config.decorrelation,
            wordings=wordings_of(config, len(records)),
            room=config.row_cache_mib << 20,
            config={"method": trained_settings(model, config)},
            finish=partial(_voted, model, config, records),
        )

    @staticmethod
    def setup(model: EditableModel, config: LDKEConfig, resources: Resources) -> _Shared:
        """The classifier, and the layers where all edits have the same.

        Raises:
            ValueError: no classifier, or one with other settings; nothing to vote with.
        """
        artifact = require_artifact(resources.artifact, "ldke", model) if config.route else None
        if artifact is not None:
            known = dict(artifact.config["method"])
            for name, mine in trained_settings(model, config).items():
                if known.get(name) != mine:
                    raise ValueError(
                        f"ldke: an edit has the settings that its classifier was trained with (got {name}={mine!r}, "
                        f"trained with {known.get(name)!r})"
                    )
        positions = _common_positions(model, config, resources, artifact)
        classifier = None if artifact is None else Disentangler.of(artifact, model.device)
        return _Shared(positions, artifact, classifier)

    @staticmethod
    def start(
        model: EditableModel,
        config: LDKEConfig,
        shared: _Shared,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[dict[str, Tensor]]:
        """The layers of every edit, and what the classifier keeps of its question."""
        sites = LDKE.spec(model, config).sites
        slots = slots_of(config, [site.layer for site in sites])
        if shared.positions is not None:
            positions = [shared.positions] * len(rows)
        elif config.layers == "random":
            positions = [random_layers(len(sites), slots, f"{config.seed}|{_told(request)}") for request in requests]
        else:
            positions = best_layers(_scores(model, config, rows), slots, window=config.window)
        found = [{"layers": torch.tensor(chosen_layers, dtype=torch.float32) + 1} for chosen_layers in positions]
        if shared.classifier is not None:
            point = split_point(LDKE.spec(model, config))
            # Walked anew, as rows may be without their images. One by one: the same to the bit whatever the batch, as
            # the classifier rounds to float32, which would show what another batch changes
            for values, request in zip(found, requests, strict=True):
                tokens = walked(model, point, [Query(request.prompt, request.image)])
                with torch.no_grad():
                    entity, relation = shared.classifier(tokens)
                values |= {"entity": entity[0], "relation": relation[0], "image": tokens.centre()[0]}
        return found

    @staticmethod
    def finish(
        model: EditableModel,
        config: LDKEConfig,
        shared: _Shared,
        requests: Sequence[EditRequest],
        deltas: Sequence[EditDelta],
    ) -> list[EditDelta]:
        """Say which classifier decides for them, and what they answer."""
        if shared.artifact is None:
            return list(deltas)
        options: dict[str, Any] = {"artifact": shared.artifact.id}
        if config.threshold is not None:
            options["threshold"] = config.threshold
        made = [_with_options(delta, options) for delta in deltas]
        texts = [{ANSWER: target_key(request.target)} for request in requests]
        return [replace(each, texts={**each.texts, **text}) for each, text in zip(made, texts, strict=True)]


def _scores(model: EditableModel, config: LDKEConfig, rows: Sequence[EditRows]) -> Tensor:
    """(B, candidates) of edits whose rows are ready."""
    sites = LDKE.spec(model, config).sites
    return layer_scores(model, sites, rows, score=config.score, groups=config.groups, probes=config.probes)


def _vote(model: EditableModel, config: LDKEConfig, records: Sequence[EditRequest]) -> tuple[int, ...]:
    """Places among the candidates that the first records vote for."""
    spec = LDKE.spec(model, config)
    chosen = list(records[: config.calibration])
    source = ViewSource(chosen, None if len(chosen) > 1 else records, source="record", seed=config.seed)
    found = []
    for start in range(0, len(chosen), TOGETHER):
        views = [source.views(number, ROLES) for number in range(start, min(start + TOGETHER, len(chosen)))]
        found.append(_scores(model, config, prepare(model, spec, views, Untimed())))
    slots = slots_of(config, [site.layer for site in spec.sites])
    return voted_layers(torch.cat(found), slots, window=config.window)


def _voted(model: EditableModel, config: LDKEConfig, records: Sequence[EditRequest]) -> dict[str, list[int]]:
    """What an artifact says of the vote: numbers of the layers; nothing where there is none to vote on."""
    if not _is_choice(config, model.n_layers):
        return {}
    candidates = candidate_layers(config, model.n_layers)
    return {"voted": [candidates[position] for position in _vote(model, config, records)]}


def _common_positions(
    model: EditableModel, config: LDKEConfig, resources: Resources, artifact: Artifact | None
) -> tuple[int, ...] | None:
    """Places among the candidates that all edits have; None where each has its own."""
    candidates = candidate_layers(config, model.n_layers)
    if isinstance(config.layers, str) and not _is_choice(config, model.n_layers):
        return tuple(range(len(candidates)))
    if config.layers != "voted":
        return named_positions(config, model.n_layers)
    known = [] if artifact is None else list(artifact.config.get("voted", []))
    if len(known) == slots_of(config, candidates):
        return tuple(candidates.index(layer) for layer in known)
    if not resources.pool:
        raise ValueError("ldke: records vote for layers='voted'; give pool=... (got pool=None)")
    return _vote(model, config, resources.pool)


def _is_choice(config: LDKEConfig, n_layers: int) -> bool:
    """Whether layers are looked for: the settings name none, and there are more candidates than an edit has."""
    candidates = candidate_layers(config, n_layers)
    return isinstance(config.layers, str) and slots_of(config, candidates) < len(candidates)


def _told(request: EditRequest) -> str:
    return f"{request.id}|{request.prompt}|{request.target}"


def _with_options(delta: EditDelta, options: dict[str, Any]) -> EditDelta:
    return replace(delta, spec=replace(delta.spec, options={**delta.spec.options, **options}))
