"""``consolidate``: one change of weights that is fitted on all edits of a ledger together, for a release."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.context import on_frozen_model, with_gradients
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import EditDelta, Rows, StackedDelta, installed
from fastedit.deltas.kinds import new_stack
from fastedit.engine.acting import applied
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.score import ModelScores, score
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.solver import FitOutcome, fit
from fastedit.fitting.views import ViewSource
from fastedit.ledger.database import LedgerError
from fastedit.ledger.ledger import Ledger
from fastedit.methods import EditPlan, resolve
from fastedit.methods.base import is_computed
from fastedit.objectives import Losses, Objective, TokenBatch
from fastedit.requests import EditRequest

#: Changes of weights; and objectives whose loss of an edit needs no delta of its own.
KINDS, OBJECTIVES = ("full", "low_rank"), ("", "kl")


@dataclass(frozen=True)
class Consolidated:
    """One change for all edits of a ledger.

    Args:
        delta: of the base model, on which it acts alone: ``fastedit.applied``, ``fastedit.apply_delta``, any export.
        outcome: of the fit. edits: their numbers in the ledger.
        scores: of the model with the change, what must stay compared with the base model.
        lost: numbers of the edits that do not hold with it. event: of the ledger's history.
    """

    delta: EditDelta
    outcome: FitOutcome
    edits: tuple[int, ...]
    scores: ModelScores
    lost: tuple[int, ...]
    event: int

    def __str__(self) -> str:
        return f"{len(self.edits)} edits in one change, {len(self.lost)} of which do not hold"


def consolidate(
    model: EditableModel,
    ledger: Ledger,
    method: str = "kl+lora",
    *,
    pool: Sequence[EditRequest] | None = None,
    views: str = "record",
    batch_size: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Consolidated:
    """Fit one change of weights on all edits that act in a ledger, ask all of them again, and note it in the history.

    The mean over edits of the method's loss is minimised, on all of them at every step or on a few. What acts in the
    ledger stays what it was, and so do the model's weights: ``fastedit.apply_delta(model, consolidated.delta)`` puts
    the change in.

    Args:
        model: that the ledger was opened with.
        method: "ft" or "lora", plain or with a KL term on what must stay: "kl+ft", "kl+lora".
        pool: records to draw locality views and paraphrases from, with ``views="heldout"``.
        views: "record" fits on the records' own rephrases and locality questions; "heldout" on those of the pool.
        batch_size: edits of a step, drawn anew from all when all had their turn; None is all. The memory of a step
            grows with it, and only what an edit is fitted on with their number. Steps stop early when all edits hold,
            each as it was last seen.
        seed: of the views, of the change's first values and of which edits share a step.
        overrides: fields of the method's config, such as ``steps``.
    Returns:
        Consolidated.
    Raises:
        LedgerError: no edit acts, or the ledger is of another model.
        ValueError: a method that makes no single change of weights, or a setting that cannot be.
    """
    if ledger.needs_model("consolidate") is not model:
        raise LedgerError("ledger: what is consolidated is of the model that it was opened with (got another object)")
    ledger.check_model()
    plan = resolve(method, overrides, seed=seed)
    objective = method.rpartition("+")[0]
    spec = plan.method.spec(model, plan.config)
    if spec.kind not in KINDS or objective not in OBJECTIVES or is_computed(plan.method):
        raise ValueError(
            "consolidate: method makes one change of weights by steps, plain or with a KL term: 'ft', 'lora', 'kl+ft', "
            f"'kl+lora' (got method={method!r})"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"consolidate: batch_size counts the edits of a step, from 1 up (got batch_size={batch_size})")
    state = ledger.state()
    requests, numbers = state.requests(), tuple(state.edit_ids)
    if not requests:
        raise LedgerError("ledger: there is something to consolidate where edits act (got none)")
    source = ViewSource(requests, pool, source=views, near=pool is not None, seed=seed)
    with ledger.on_base():
        before = score(model, None, requests)
        delta, outcome = _fitted(model, plan, source, len(requests), batch_size, seed)
        delta = replace(delta, model_fingerprint=model.fingerprint, request_id=f"consolidated-{len(requests)}")
        with applied(model, delta):
            scores = score(model, None, requests, reference=before)
    lost = tuple(number for number, holds in zip(numbers, scores.holds, strict=True) if not holds)
    with ledger.contents.writing(), ledger.contents.transaction() as transaction:
        event = transaction.event("consolidate", edits=list(numbers), method=method, delta=delta.id, lost=list(lost))
    return Consolidated(delta, outcome, numbers, scores, lost, event)


@on_frozen_model
@with_gradients
def _fitted(
    model: EditableModel, plan: EditPlan, source: ViewSource, count: int, batch_size: int | None, seed: int
) -> tuple[EditDelta, FitOutcome]:
    """One change, fitted on all edits."""
    spec, solver = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    objective, timer = plan.build_objective(solver.steps), PhaseTimer(model.device)
    source.check(objective.roles)
    views, size = [source.views(number, objective.roles) for number in range(count)], min(batch_size or count, count)
    rows = [row for at in range(0, count, size) for row in prepare(model, spec, views[at : at + size], timer)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stacked: StackedDelta = new_stack(spec, 1, device=model.device)
    problem = _Joint(model, stacked, rows, objective, timer, size, seed)
    with installed(model, stacked, Rows(), route=False):
        fit(problem, stacked, solver)
    assert problem.fitted is not None
    return problem.fitted


@dataclass(frozen=True)
class _Packed:
    """The rows of some edits side by side: what a step needs of them.

    Args:
        numbers: of the edits. state: their rows. labels, role, edit: (T,) int64, ``edit`` is the place in numbers.
        reference: (T', V), or None.
    """

    numbers: list[int]
    state: PackedState
    labels: torch.Tensor
    role: torch.Tensor
    edit: torch.Tensor
    reference: torch.Tensor | None

    @staticmethod
    def of(rows: Sequence[EditRows], numbers: list[int]) -> _Packed:
        """Those with these numbers."""
        chosen = [rows[number] for number in numbers]
        labels, role = (torch.cat([getattr(each, name) for each in chosen]) for name in ("labels", "role"))
        sizes = torch.tensor([len(each.labels) for each in chosen], device=labels.device)
        edit = torch.arange(len(chosen), device=labels.device).repeat_interleave(sizes)
        references = [each.reference for each in chosen if each.reference is not None]
        reference = torch.cat(references) if references else None
        return _Packed(numbers, PackedState.cat([each.state for each in chosen]), labels, role, edit, reference)


class _Joint:
    """The mean loss of all edits under one delta (``fastedit.fitting.solver.Problem`` of one slot)."""

    def __init__(
        self,
        model: EditableModel,
        stacked: StackedDelta,
        rows: Sequence[EditRows],
        objective: Objective,
        timer: PhaseTimer,
        size: int,
        seed: int,
    ) -> None:
        self.model, self.stacked, self.objective, self.timer = model, stacked, objective, timer
        self.fitted: tuple[EditDelta, FitOutcome] | None = None
        self._rows, self._size, self._steps, self._entered = list(rows), size, 0, False
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []
        self._packed: _Packed | None = None
        #: Of every edit as it was last seen; NaN and False before.
        self._nll = torch.full((len(rows),), torch.nan, device=stacked.flat.device)
        self._correct = torch.zeros(len(rows), dtype=torch.bool, device=stacked.flat.device)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the loop."""
        return self.timer.phase(name)

    def next_step(self) -> tuple[Hashable, Hashable]:
        """Which edits the step is of: all, or those whose turn it is."""
        if self._packed is None or self._size < len(self._rows):
            self._packed = _Packed.of(self._rows, self._drawn())
        return 0 if self._size == len(self._rows) else self._steps, None

    def _drawn(self) -> list[int]:
        """Numbers of as many edits as a step has; an epoch's last step may have fewer."""
        if self._size == len(self._rows):
            return list(range(self._size))
        if not self._waiting:
            self._waiting = torch.randperm(len(self._rows), generator=self._generator).tolist()
        drawn, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return sorted(drawn)

    def losses(self, steps: torch.Tensor) -> Losses:
        """The mean over the edits of the step, as that of one; what was said of each edit last is kept."""
        packed = self._packed
        assert packed is not None
        hidden = packed_tail(self.model, packed.state)
        tokens = TokenBatch(
            hidden=hidden, logits=self.model.head(hidden), labels=packed.labels, edit=packed.edit, role=packed.role,
            n_edits=len(packed.numbers), reference=packed.reference,
        )  # fmt: skip
        each = self.objective(tokens, self._steps)
        self._steps += 1
        self._nll[packed.numbers], self._correct[packed.numbers] = each.nll.detach().to(self._nll.dtype), each.correct
        total = each.total.mean()[None]
        extra = self.stacked.extra_loss()
        return Losses(total if extra is None else total + extra, self._nll.nanmean()[None], self._correct.all()[None])

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        """All enter at once, and once."""
        if self._entered:
            return []
        self._entered = True
        return [0]

    def started(self, slots: Sequence[int]) -> None:
        """The kind's own first values."""

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        """Keep the change."""
        self.fitted = self.stacked.unstack(0), outcomes[0]
