"""Meta-training of networks that edit: the loss is that of the edited model, on many edits at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_tail
from fastedit.data import fingerprint
from fastedit.deltas import DeltaSpec, installed
from fastedit.methods.meta.hypernets import Acting, Factors, Gradients, edit_gradients, sketch
from fastedit.methods.meta.views import CHANGED, KEPT, MetaBatch, MetaViews, RowStore
from fastedit.objectives import ROLES, Losses, Objective, Role, TokenBatch
from fastedit.objectives.base import CE_ROLES, all_correct, losses_by_role
from fastedit.requests import EditRequest
from fastedit.training import Artifact, TrainerConfig, processes

#: Records whose gradients the statistics are taken from.
MEASURED = 256
SCORES = (*CHANGED, *KEPT[:-1])


@dataclass(frozen=True)
class MetaWeights:
    """Weights of the outer loss: NLL of the edit and of its rephrased views, KL of each kind of locality."""

    edit: float = 0.1
    text_rephrase: float = 0.1
    image_rephrase: float = 0.1
    locality: float = 1.0


class MetaObjective:
    """The outer loss of MEND, arXiv 2110.11309, equations (4a) and (4b), on the views of a multimodal edit.

    A weighted sum of the mean NLL of the edit, of its rephrased text and of its rephrased image, and of the mean
    KL(unedited || edited) on text and on image locality views. The multimodal ports train on the rephrased views alone;
    ours has the edit itself besides, because an image that is rendered anew need not stand for the one that is edited.
    """

    roles: tuple[Role, ...] = ROLES

    def __init__(self, weights: MetaWeights) -> None:
        self.weights = weights

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses; ``steps`` is not used."""
        table = losses_by_role(tokens)
        weights = self.weights
        factors = [weights.edit, weights.text_rephrase, weights.image_rephrase, weights.locality, weights.locality]
        total = (table * torch.tensor(factors).to(table)).sum(1)
        nll = table[:, int(Role.EDIT)].detach()
        return Losses(total, nll, all_correct(tokens), {"nll": nll, "kl": table[:, 3:].sum(1).detach()})


class MetaTask:
    """A network that edits, as a training ``Task``.

    Every step takes a batch of records, asks the frozen model for the gradients of their edits, lets the factors that
    the network makes of them act, and scores the edited model on all views; the gradient flows back through the
    factors alone. Nothing couples two edits but the network.

    Args:
        name: of the method.
        model: frozen.
        spec: sites of the change.
        network: a ``HyperNetwork`` with a method ``measure(gradients: list)`` for its statistics.
        factors: on the learning rate, by the beginning of parameter names.
        objective: of the edited model.
        records: to learn from; the last ``held`` are kept for validation.
        trainer: settings of the loop.
        locality: kinds of image locality views of a record and step.
        held: records for validation.
        room: bytes for rows that are kept.
        config: what the artifact says of itself.
    Raises:
        ValueError: too few records.
    """

    def __init__(
        self,
        name: str,
        model: EditableModel,
        spec: DeltaSpec,
        network: nn.Module,
        objective: Objective,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
        *,
        factors: Mapping[str, float],
        locality: int,
        held: int,
        room: int,
        config: Mapping[str, Any],
    ) -> None:
        self.n_train = len(records) - held
        if self.n_train < max(2, trainer.batch_size):
            raise ValueError(
                f"{name}: training needs at least a batch of records besides those held for validation "
                f"(got records={len(records)}, valid_records={held}, batch_size={trainer.batch_size})"
            )
        self.name, self.model, self.spec = name, model, spec
        self.network, self.objective, self.records, self.trainer = network, objective, records, trainer
        self.factors, self.locality, self.config = factors, locality, dict(config)
        self.views = MetaViews(records, trainer.seed)
        self.store = RowStore(model, spec, self.views, room)
        # Settings of the objective, not what it has come to
        plain = {k: v for k, v in vars(objective).items() if is_dataclass(v) or isinstance(v, (int, float, str, tuple))}
        described = repr((self.config, spec, type(objective).__name__, plain))
        digest = hashlib.sha256(described.encode())
        self.fingerprint = f"{model.fingerprint[:16]}/{fingerprint(records)[:16]}/{digest.hexdigest()[:16]}"
        measure: Any = network.measure
        measure(list(self._gradients(range(min(MEASURED, self.n_train)))))

    def parameters(self) -> dict[str, Tensor]:
        """The network's."""
        return dict(self.network.named_parameters())

    def groups(self) -> dict[str, float]:
        """Factors on the learning rate."""
        found = {}
        for name, _ in self.network.named_parameters():
            for start, factor in self.factors.items():
                if name.startswith(start):
                    found[name] = factor
        return found

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a batch of records."""
        chosen = processes.own(self._records(step))
        views = [self.views.chosen(index, epoch, self.locality) for index, epoch in chosen]
        batch = self._batch([index for index, _ in chosen], views)
        # An edit is new in its batch: an objective that changes with the steps takes it as one that has just got to
        # where the objective is complete
        steps = min(step, int(getattr(self.objective, "start", step)))
        losses = self.objective(self._edited(batch, [index for index, _ in chosen]), steps)
        return losses.total.mean(), {"correct": float(losses.correct.float().mean())}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Shares of held-out views that are as they should be, teacher-forced, and their mean as "score".

        Right is: every target token is the largest logit, for what must change; every token's largest logit is the
        unedited model's, for what must stay.
        """
        means = {kind: sum(values) / len(values) for kind, values in sorted(self.held_out().items())}
        scored = [means[kind] for kind in SCORES if kind in means]
        return {**means, "score": sum(scored) / len(scored)}

    @torch.no_grad()
    def held_out(self) -> dict[str, list[float]]:
        """By kind of view, 1 for each held-out one that is as it should be, in the order of the records."""
        found: dict[str, list[float]] = {}
        size = processes.at_once(self.trainer.batch_size)
        for start in range(self.n_train, len(self.records), size):
            chosen = list(range(start, min(start + size, len(self.records))))
            batch = self._batch(chosen, [list(range(len(self.views.of(index)))) for index in chosen])
            for kind, right in zip(batch.kinds, self._right(batch, chosen), strict=True):
                found.setdefault(kind, []).append(right)
        return found

    def result(self) -> Artifact:
        """The network."""
        return Artifact(self.name, self.model.fingerprint, self.config, self.network.state_dict())

    def _right(self, batch: MetaBatch, chosen: Sequence[int]) -> list[float]:
        """By row, 1 where it is as it should be."""
        tokens = self._edited(batch, chosen)
        wanted = tokens.labels.clone()
        if tokens.reference is not None:
            wanted[~tokens.is_role(*CE_ROLES)] = tokens.reference.argmax(-1)
        wrong = (tokens.logits.argmax(-1) != wanted).long()
        count = torch.zeros(len(batch.kinds), dtype=torch.long, device=wrong.device).index_add_(0, batch.row, wrong)
        return (count == 0).float().tolist()

    def _edited(self, batch: MetaBatch, chosen: Sequence[int]) -> TokenBatch:
        """Tokens of a batch as the edited model sees them."""
        (gradients,) = self._gradients(chosen, len(chosen))
        factors: list[Factors] = self.network(gradients, [self.records[index] for index in chosen])
        acting: Any = Acting(self.spec, factors)
        with installed(self.model, acting, batch.rows, route=False):
            hidden = packed_tail(self.model, batch.state)
        return TokenBatch(
            hidden=hidden,
            logits=self.model.head(hidden),
            labels=batch.labels,
            edit=batch.edit,
            role=batch.role,
            n_edits=len(chosen),
            reference=batch.reference,
            flat=sketch(factors),
        )

    def _gradients(self, chosen: Sequence[int], size: int | None = None) -> list[Gradients]:
        """Of the edits themselves, so many at a time."""
        size = size or processes.at_once(self.trainer.batch_size)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [
            edit_gradients(self.model, self.spec.sites, self.store.get([(index, 0) for index in part]))
            for part in parts
        ]

    def _batch(self, chosen: Sequence[int], views: Sequence[Sequence[int]]) -> MetaBatch:
        wanted = [(index, number) for index, numbers in zip(chosen, views, strict=True) for number in numbers]
        kinds = [self.views.of(index)[number].kind for index, number in wanted]
        return MetaBatch.of(self.store.get(wanted), [len(numbers) for numbers in views], kinds)

    def _records(self, step: int) -> list[tuple[int, int]]:
        """(record, epoch) of a step: the records in a new order every epoch."""
        first = step * self.trainer.batch_size
        made: list[tuple[int, int]] = []
        orders: dict[int, list[int]] = {}
        for index in range(first, first + self.trainer.batch_size):
            epoch, within = divmod(index, self.n_train)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.trainer.seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(self.n_train, generator=generator).tolist()
            made.append((orders[epoch][within], epoch))
        return made
