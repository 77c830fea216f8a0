"""What an accumulating sequence does so that a new edit leaves the earlier ones alone: their keys, or their replay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import PackedState
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import EditDelta, Rows, installed
from fastedit.deltas.full import FullDelta
from fastedit.deltas.low_rank import LowRankDelta
from fastedit.deltas.nullspace import Keys, project_delta
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.run_state import EditJob
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import TrainingView
from fastedit.methods.captured import wanted_inputs
from fastedit.objectives import Objective, RetainingObjective, Role
from fastedit.objectives.roles import KL_ROLES
from fastedit.requests import Query

#: As what an earlier edit is replayed: its answer is not to move.
REPLAYED = Role.TEXT_LOCALITY


class Retention:
    """Keeps earlier edits of a sequence while the next one is fitted (setting ``retain`` of a method).

    "nullspace": the new change sees no input that an earlier edit's answer is read from (``deltas.nullspace``): what
    enters the edited maps where its answer's tokens are predicted, with the edit in. Where the last layer alone is
    edited, its answer depends on nothing else; below, other tokens of the prompt may move.

    "replay": some earlier edits, drawn anew for each, are rows of the new edit's fit, whose answers' distributions are
    to stay what they were before it: KL(before || after).

    Args:
        job: of the run; its method's config has the settings that ``check_retain`` names. timer: of the run.
    """

    def __init__(self, job: EditJob, timer: PhaseTimer) -> None:
        self.job, self.timer = job, timer
        config = job.plan.config
        self.kind: str = config.retain
        self.numbers: list[int] = []
        self._replayed, self._weight = int(config.retain_replayed), float(config.retain_weight)
        self._keys = {
            site: Keys(site.d_in, int(config.retain_share * site.d_in), job.model.device) for site in job.spec.sites
        }

    @staticmethod
    def of(job: EditJob, timer: PhaseTimer) -> Retention | None:
        """That of a job; None where its method has none, or none is wanted."""
        return None if getattr(job.plan.config, "retain", "none") == "none" else Retention(job, timer)

    @property
    def bases(self) -> dict[Any, Tensor]:
        """(d_in, m) by site, of the inputs that a new change is not to see; empty at the start and without keys."""
        if self.kind != "nullspace" or not self.numbers:
            return {}
        return {site: keys.basis for site, keys in self._keys.items()}

    def restrict(self, stacked: FullDelta | LowRankDelta) -> None:
        """Let a stack that is to be fitted see nothing of the earlier edits' inputs."""
        bases = self.bases
        stacked.kept_inputs = [bases[site].to(stacked.flat) for site in stacked.spec.sites] if bases else ()

    def finished(self, delta: EditDelta) -> EditDelta:
        """A fitted delta as one that needs no projection of what enters it."""
        return project_delta(delta, self.bases)

    def objective(self, objective: Objective) -> Objective:
        """The objective with a term for what is replayed; one that has a KL term counts it there."""
        if self.kind != "replay" or any(role in KL_ROLES for role in objective.roles):
            return objective
        return RetainingObjective(objective, self._weight)

    def with_earlier(self, number: int, rows: EditRows, beneath: Sequence[Any]) -> EditRows:
        """The rows of an edit, and of the earlier ones that are replayed with it. No delta may act.

        Args:
            number: of the edit. rows: its own. beneath: stacks of the deltas that act while it is fitted.
        """
        if self.kind != "replay" or not self.numbers:
            return rows
        rng = random.Random(f"{self.job.seed}|{number}|replay")
        chosen = rng.sample(self.numbers, min(self._replayed, len(self.numbers)))
        queries = [self.job.edits[earlier] for earlier in chosen]
        views = [TrainingView(REPLAYED, Query(each.prompt, each.image, each.target)) for each in queries]
        (replayed,) = prepare(self.job.model, self.job.spec, [views], self.timer)
        reference = self._logits(replayed.state, beneath)
        references = [reference] if rows.reference is None else [rows.reference, reference]
        return EditRows(
            PackedState.cat([rows.state, replayed.state]),
            torch.cat([rows.labels, replayed.labels]),
            torch.cat([rows.role, replayed.role]),
            torch.cat(references),
            (*rows.row_roles, *replayed.row_roles),
        )

    @torch.no_grad()
    def _logits(self, state: PackedState, beneath: Sequence[Any]) -> Tensor:
        """(T, V) of the model with the sequence so far."""
        with ExitStack() as entered:
            for stacked in beneath:
                entered.enter_context(installed(self.job.model, stacked, Rows(), route=False))
            return self.job.model.head(packed_tail(self.job.model, state))

    @torch.no_grad()
    def take_up(self, number: int, acting: Sequence[Any]) -> None:
        """One more edit of the run has been made; ``acting`` are stacks of all that acts now, the edit included."""
        self.numbers.append(number)
        if self.kind != "nullspace":
            return
        model, request = self.job.model, self.job.edits[number]
        views = [TrainingView(Role.EDIT, Query(request.prompt, request.image, request.target))]
        (rows,) = prepare(model, self.job.spec, [views], self.timer)
        with ExitStack() as entered:
            for stacked in acting:
                entered.enter_context(installed(model, stacked, Rows(), route=False))
            inputs, _ = wanted_inputs(model, rows.state, self.job.spec.sites)
        for site, keys in self._keys.items():
            keys.add(inputs[site])
