"""How SERAC's scope and counterfactual model are trained."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.data import fingerprint
from fastedit.deltas import DeltaSpec, Rows, installed, split_point
from fastedit.deltas.counterfactual import PREFIX, shared_shapes
from fastedit.deltas.kinds import new_stack
from fastedit.fitting.views import TrainingView
from fastedit.fitting.wordings import reworded
from fastedit.methods.meta.views import CHANGED, KEPT, MetaViews
from fastedit.methods.serac.config import SERACConfig, SeracObjective, mixed, targets_of
from fastedit.methods.serac.scope import CHUNK, REWORDED, FeatureStore
from fastedit.methods.serac.targets import Targets
from fastedit.objectives import Objective, Role, TokenBatch
from fastedit.objectives.base import CE_ROLES
from fastedit.requests import EditRequest, Query
from fastedit.routers.scope import ScopeFeatures, ScopeHeads, squared_distances
from fastedit.training import Artifact, TrainerConfig, processes

#: Similarity below which the counterfactual model cannot be heard in the mixture, and is not asked.
UNHEARD = 1e-4
#: Of the objective: above the norm that gradients are clipped to, batches count alike, and copying is learned sooner.
SCALE = 10.0
#: One record in so many of a step has views that must stay, where no views are compared.
KEPT_EVERY = 4
#: Length of the summary of the trained weights that an objective may read.
SKETCH = 4096


class SeracTask:
    """Scope heads and counterfactual change, as a training ``Task``.

    A step's loss is the objective of the mixture ``(1 - s) p_base + s p_counterfactual`` of some records' views, s the
    similarity of the scope, plus the binary cross-entropy of the scope on more records. For views that must change s is
    taken as 1 (the paper trains the two parts apart, section 3.3), with ``faithful`` it is what the scope says (the
    port trains them through the mixture).

    Args:
        model: frozen. spec: of the deltas. settings: of the loss. objective: of the mixture.
        heads: trained in place. records: to learn from. trainer: of the loop.
        config: what the artifact says of itself.
    Raises:
        ValueError: too few records.
    """

    name = "serac"

    def __init__(
        self,
        model: EditableModel,
        spec: DeltaSpec,
        settings: SERACConfig,
        objective: Objective,
        heads: ScopeHeads,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
        config: Mapping[str, Any],
    ) -> None:
        self.n_train = len(records) - settings.valid_records
        if self.n_train < max(2, trainer.batch_size):
            raise ValueError(
                f"serac: training needs at least a batch of records besides those held for validation (got "
                f"records={len(records)}, valid_records={settings.valid_records}, batch_size={trainer.batch_size})"
            )
        self.model, self.spec, self.settings, self.objective = model, spec, settings, objective
        #: Whether the objective compares views of the same edit.
        self.compares = not isinstance(objective, SeracObjective)
        self.heads, self.records, self.trainer, self.config = heads, records, trainer, dict(config)
        self.views = MetaViews(records, trainer.seed)
        self.swap, invented = targets_of(settings, len(records))
        self.targets = Targets(model, [record.target for record in records[: self.n_train]], invented)
        words = 0 if settings.faithful else settings.scope_wordings
        self.features = FeatureStore(model, spec, self.views, heads.shape, words, settings.memory_mib << 20)
        self.stack: Any = new_stack(spec, 1, device=model.device, trainable=False)
        self.stack.weights = self._first_weights()
        heads.standardise(self.features.edits(range(min(self.n_train, CHUNK))))
        described = repr((self.config, settings, type(objective).__name__, vars(objective)))
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        self.fingerprint = f"{model.fingerprint[:16]}/{fingerprint(records)[:16]}/{digest}"

    def parameters(self) -> dict[str, Tensor]:
        """Of the change and of the heads."""
        weights = {PREFIX + name: weight for name, weight in self.stack.weights.items()}
        return weights | {f"scope/{name}": weight for name, weight in self.heads.named_parameters()}

    def groups(self) -> dict[str, float]:
        """Heads are trained more slowly."""
        return {name: 0.5 for name in self.parameters() if name.startswith("scope/")}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Of the mixture and of the scope."""
        rng = random.Random(f"{self.trainer.seed}|{step}")
        chosen = rng.sample(range(self.n_train), self.trainer.batch_size)
        self.heads.train()
        processes.draw_apart()
        tokens = self._mixture(chosen, step, rng)
        # Records change from step to step: an objective that changes with the steps is taken where it is complete
        losses = self.objective(tokens, min(step, int(getattr(self.objective, "start", step))))
        # By tokens: long targets are what copying is learned from, short ones can be guessed
        length = torch.bincount(tokens.edit[tokens.is_role(*CE_ROLES)], minlength=tokens.n_edits)
        total = SCALE * (losses.total * length).sum() / processes.mean(float(length.sum()))
        parts: dict[str, float] = {}
        if self.settings.scope_weight and not self.settings.faithful:
            size = min(self.n_train, self.settings.scope_batch)
            scope = self.features.loss(self.heads, rng.sample(range(self.n_train), size), self.settings.scope_recall)
            total = total + self.settings.scope_weight * scope
            parts["scope"] = float(scope.detach())
        return total, parts

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Shares of held-out views that are as they should be, and their mean as "score".

        What must change: in scope, and every target token is the counterfactual model's largest logit. What must stay:
        out of scope.
        """
        found: dict[str, list[float]] = {}
        held = range(self.n_train, len(self.records))
        self.heads.eval()
        for index, features in zip(held, self.features.get(held), strict=True):
            points = self.heads(features)
            acts = (torch.exp(-squared_distances(points, points[:1])[:, 0]) >= 0.5).tolist()
            for (kind, _), inside in zip(self.features.questions(index), acts, strict=True):
                wanted = kind in (*CHANGED, REWORDED)
                found.setdefault(f"{kind}_scope" if wanted else kind, []).append(float(inside == wanted))
        copied = self._copied(held)
        scores = {kind: sum(values) / len(values) for kind, values in sorted(found.items())}
        for kind, values in copied.items():
            scores[kind] = sum(values) / len(values) * scores[f"{kind}_scope"]
        scored = [value for kind, value in scores.items() if kind in (*CHANGED, *KEPT)]
        return {**scores, "score": sum(scored) / len(scored)}

    def result(self) -> Artifact:
        """Heads and change."""
        tensors = {PREFIX + name: weight for name, weight in self.stack.weights.items()} | self.heads.tensors()
        config = {**self.config, "scope": self.heads.settings()}
        return Artifact(self.name, self.model.fingerprint, config, tensors)

    def _first_weights(self) -> dict[str, Tensor]:
        """A change that changes nothing."""
        generator = torch.Generator().manual_seed(self.trainer.seed)
        weights = {}
        for name, shape in shared_shapes(self.spec).items():
            value = torch.zeros(shape)
            if name.endswith(":down"):
                value = (torch.rand(shape, generator=generator) * 2 - 1) / shape[0] ** 0.5
            weights[name] = value.to(self.model.device).requires_grad_(True)
        return weights

    def _mixture(self, chosen: Sequence[int], step: int, rng: random.Random) -> TokenBatch:
        """Label tokens of the records' views, as the mixture of both models predicts them."""
        views, counts, contexts = self._asked(chosen, step, rng)
        chosen = processes.own(chosen)
        queries = [each.view.query for each in views]
        device = self.model.device
        roles = torch.tensor([int(each.view.role) for each in views], device=device)
        inside = roles < int(Role.TEXT_LOCALITY)
        share = self._similarity(chosen, views, counts, inside)
        # Which rows each model reads; where the share is 1 the frozen one cannot be heard
        read = ((share < 1) | ~inside).tolist()
        heard = (inside | (share.detach() > UNHEARD)).tolist()
        frozen, unedited = self._unedited([query for query, wanted in zip(queries, read, strict=True) if wanted], read)
        asked = [replace(q, prompt=c + q.prompt) for q, c, h in zip(queries, contexts, heard, strict=True) if h]
        state, labels = self._walked(asked)
        with installed(self.model, self.stack, Rows(), route=False):
            hidden = packed_tail(self.model, state)
        after = _rows(self.model.head(hidden), state.wanted_counts, heard)
        if not self.settings.faithful:
            # What must stay is the scope's business: here it would only teach not to copy
            after = {n: logits if inside[n] else logits.detach() for n, logits in after.items()}
        states = _rows(hidden, state.wanted_counts, heard)
        labels_by_row = {**unedited, **_rows(labels, state.wanted_counts, heard)}
        logits = [mixed(frozen.get(row), after.get(row), share[row]) for row in range(len(views))]
        row = token_rows([len(labels_by_row[n]) for n in range(len(views))], device)
        # Objectives compare states of what must change only
        blank = hidden.new_zeros(1, hidden.shape[1])
        kept = [frozen[number] for number, change in enumerate(inside.tolist()) if not change]
        return TokenBatch(
            hidden=torch.cat([states.get(n, blank.expand(len(logits[n]), -1)) for n in range(len(views))]),
            logits=torch.cat(logits),
            labels=torch.cat([labels_by_row[n] for n in range(len(views))]),
            edit=token_rows(counts, device)[row],
            role=roles[row],
            n_edits=len(chosen),
            reference=torch.cat(kept) if kept else None,
            flat=self._summary().expand(len(chosen), -1),
        )

    @torch.no_grad()
    def _unedited(self, queries: Sequence[Query], read: Sequence[bool]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The frozen model's logits and the labels of the rows that it reads, by row."""
        if not queries:
            return {}, {}
        state, labels = self._walked(queries)
        logits = self.model.head(packed_tail(self.model, state))
        return _rows(logits, state.wanted_counts, read), _rows(labels, state.wanted_counts, read)

    def _asked(
        self, chosen: Sequence[int], step: int, rng: random.Random
    ) -> tuple[list[_Numbered], list[int], list[str]]:
        """The views of some records, how many of each, and by view the cached edit that stands before it.

        Many records with few views each, as copying is learned from many targets at a time. Objectives that compare the
        views of an edit get two that must change.
        """
        views: list[_Numbered] = []
        counts, contexts = [], []
        for order, index in enumerate(chosen):
            record, of_record = self.records[index], self.views.of(index)
            numbers = self.views.chosen(index, step, 1)
            changed = [n for n in numbers if of_record[n].kind in CHANGED]
            kept = [n for n in numbers if n not in changed]
            if self.compares:
                changed = changed[:1] + rng.sample(changed[1:], min(1, len(changed) - 1))
            else:
                changed = [rng.choice(changed)]
                kept = kept if order % KEPT_EVERY == 0 else []
            numbered = [_Numbered(number, of_record[number].view) for number in [*changed, *kept]]
            if self.settings.faithful:
                numbered = [each for each in numbered if each.view.role is not Role.IMAGE_LOCALITY]
            target = record.target
            if rng.random() < self.swap:
                target = self.targets.other(rng)
                numbered = [each.answered(target) for each in numbered]
            if not self.settings.faithful:
                numbered = [
                    each.reworded(rng) if rng.random() < self.settings.answer_wordings else each for each in numbered
                ]
            views += numbered
            counts.append(len(numbered))
            contexts += [self.settings.cached(record.prompt, target)] * len(numbered)
        # Drawn for all records, asked by each of several processes for its own
        start, end = processes.bounds(len(counts))
        rows = slice(sum(counts[:start]), sum(counts[:end]))
        return views[rows], counts[start:end], contexts[rows]

    def _similarity(
        self, chosen: Sequence[int], views: Sequence[_Numbered], counts: Sequence[int], inside: Tensor
    ) -> Tensor:
        """(R,) of every view with its record's edit; 1 for what must change, unless ``faithful``."""
        features, start = self.features.get(chosen), 0
        asked = []
        for part, count in zip(features, counts, strict=True):
            asked.append(part.select([each.number for each in views[start : start + count]]))
            start += count
        # The edit itself is the first view of its record
        edits = self.heads(ScopeFeatures.cat([part.select([0]) for part in features]))
        edit_of_token = edits[token_rows(counts, edits.device)]
        found = torch.exp(-(self.heads(ScopeFeatures.cat(asked)) - edit_of_token).square().sum(1))
        if self.settings.faithful:
            return found
        # What is scaled up is the objective of the counterfactual model, not that of the scope
        found = found.detach() + (found - found.detach()) / SCALE
        return torch.where(inside, 1.0, found)

    def _copied(self, held: Sequence[int]) -> dict[str, list[float]]:
        """By kind of what must change: whether the counterfactual model gives every token of the target."""
        found: dict[str, list[float]] = {}
        size = processes.at_once(self.trainer.batch_size)
        for start in range(0, len(held), size):
            part = held[start : start + size]
            pairs = [(self.records[i], each) for i in part for each in self.views.of(i) if each.kind in CHANGED]
            asked = [
                replace(each.view.query, prompt=self.settings.cached(r.prompt, r.target) + each.view.query.prompt)
                for r, each in pairs
            ]
            state, labels = self._walked(asked)
            with installed(self.model, self.stack, Rows(), route=False):
                wrong = self.model.head(packed_tail(self.model, state)).argmax(-1) != labels
            row = token_rows(state.wanted_counts, labels.device)
            count = torch.zeros(len(pairs), device=labels.device).index_add_(0, row, wrong.float())
            for (_, each), right in zip(pairs, (count == 0).tolist(), strict=True):
                found.setdefault(each.kind, []).append(float(right))
        return found

    def _walked(self, queries: Sequence[Query]) -> tuple[Any, Tensor]:
        """Answered questions walked to where the change begins, and their labels (T,)."""
        encoded = self.model.encode(queries, answers=True)
        state = packed_prefix(self.model, packed_start(self.model, encoded), *split_point(self.spec))
        return state, encoded.labels[encoded.label_mask]

    def _summary(self) -> Tensor:
        """(1, SKETCH) differentiable count-sketch of the trained change: the same signs at every step."""
        total = torch.zeros(SKETCH, device=self.model.device)
        generator = torch.Generator().manual_seed(0)
        for weight in self.stack.weights.values():
            signs = (torch.randint(0, 2, (weight.numel(),), generator=generator) * 2 - 1).to(weight)
            signed = torch.nn.functional.pad(weight.flatten() * signs, (0, -weight.numel() % SKETCH))
            total = total + signed.view(-1, SKETCH).sum(0)
        return total[None]


@dataclass(frozen=True)
class _Numbered:
    """A view and its number among those of its record."""

    number: int
    view: TrainingView

    def answered(self, target: str) -> _Numbered:
        """The same with another target, where it is one that must change."""
        if self.view.role not in CE_ROLES:
            return self
        return replace(self, view=replace(self.view, query=replace(self.view.query, answer=target)))

    def reworded(self, rng: random.Random) -> _Numbered:
        """The same in other words, where it is one that must change."""
        if self.view.role not in CE_ROLES:
            return self
        query = replace(self.view.query, prompt=reworded(self.view.query.prompt, rng))
        return replace(self, view=replace(self.view, query=query))


def _rows(values: Tensor, counts: Sequence[int], chosen: Sequence[bool]) -> dict[int, Tensor]:
    """Values (T, ...) of the chosen rows by their number, ``counts`` tokens each."""
    numbers = [number for number, wanted in enumerate(chosen) if wanted]
    return dict(zip(numbers, torch.split(values, list(counts)), strict=True))
