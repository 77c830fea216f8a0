"""Training of the disentanglement classifier, and the threshold at which it lets an edit act."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.backbone import EditableModel
from fastedit.data import fingerprint
from fastedit.data.report import target_key
from fastedit.methods.ldke.views import RELATED, UNRELATED, Pairs, Questions, TokenStore
from fastedit.methods.meta.siblings import siblings_of
from fastedit.requests import EditRequest
from fastedit.routers.agreement import Agreement
from fastedit.routers.classifier import Disentangler, answer_numbers, settled
from fastedit.training import Artifact, TrainerConfig, processes

#: Temperature of the contrastive terms.
TEMPERATURE = 0.07
#: Of the pairs of an anchor with other records, so many of the worst count.
HARDEST = 64
#: Probabilities that are tried as the threshold.
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)

#: Share of the held-out questions about another picture that no agreement takes from their edit.
KEPT = 0.95
#: Scores that differ by less are equal: one question in a few hundred.
PLATEAU = 1e-3

Keys = list[tuple[int, int]]


class ClassifierTask:
    """The classifier as a training ``Task``: pairs of questions, those of a batch against all others of it.

    The loss is the cross-entropy of the product of both heads' probabilities (related pairs, unrelated ones of the same
    record, and the worst ones of other records, weighed alike), plus a contrastive term for each head (another image of
    the same thing, other words for the same question, against the rest of the batch), plus the squared correlation of
    the two vectors. The threshold is set on records that were held out, for ``stored`` edits that all have a say.

    Args:
        model: frozen. point: where the deltas begin. classifier: what is trained.
        records: to learn from; the last ``held`` are kept for validation.
        trainer: settings of the loop.
        held, stored: see there. false_rate: see ``Agreement``; None is without.
        contrast, decorrelation: weights of the last two terms. wordings: see ``Questions``; 0 is without
            siblings as well.
        room: bytes for states that are kept.
        config: what the artifact says of itself. finish: what it says besides, once training has ended.
    Raises:
        ValueError: too few records.
    """

    name = "ldke"

    def __init__(
        self,
        model: EditableModel,
        point: tuple[int, str],
        classifier: Disentangler,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
        *,
        held: int,
        stored: int,
        false_rate: float | None,
        contrast: float,
        decorrelation: float,
        wordings: int,
        room: int,
        config: Mapping[str, Any],
        finish: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.n_train = len(records) - held
        if self.n_train < max(2, trainer.batch_size):
            raise ValueError(
                f"ldke: training needs at least a batch of records besides those held for validation "
                f"(got records={len(records)}, valid_records={held}, batch_size={trainer.batch_size})"
            )
        self.model, self.classifier, self.trainer = model, classifier, trainer
        self.records, self.stored, self.false_rate = records, stored, false_rate
        self.contrast, self.decorrelation = contrast, decorrelation
        self.config, self.finish = dict(config), finish
        siblings = siblings_of(model, records, trainer.seed) if wordings else ()
        self.questions = Questions(records, trainer.seed, wordings, siblings)
        self.store = TokenStore(model, point, self.questions, room)
        described = repr((self.config, point, held, stored, contrast, decorrelation, wordings))
        digest = hashlib.sha256(described.encode()).hexdigest()
        self.fingerprint = f"{model.fingerprint[:16]}/{fingerprint(records)[:16]}/{digest[:16]}"

    def parameters(self) -> dict[str, Tensor]:
        """The classifier's."""
        return dict(self.classifier.named_parameters())

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of records."""
        records = self._records(step)
        keys: Keys = [(record, number) for record in records for number in range(len(self.questions.of[record]))]
        kinds = [self.questions.of[record][number].kind for record, number in keys]
        entity, relation = self._own_vectors(records, keys)
        anchors = self._anchors(keys, kinds, step)
        pairs = Pairs.of(self.questions, keys, anchors)
        by_entity, by_relation = entity[anchors] @ entity.T, relation[anchors] @ relation.T
        value, parts = self._pair_loss(by_entity, by_relation, pairs)
        contrast = self._contrast(entity, keys, kinds, "image_generality", self.questions.entity)
        contrast = contrast + self._contrast(relation, keys, kinds, "text_generality", self.questions.relation)
        total = value + self.contrast * contrast + self.decorrelation * _correlation(entity, relation)
        return total, {**parts, "contrast": float(contrast.detach())}

    def _own_vectors(self, records: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """Entity and relation vectors of all questions; of several processes each looks at its own records."""
        mine = set(processes.own(records))
        rows = [row for row, (record, _) in enumerate(keys) if record in mine]
        entity, relation = self.classifier(self.store.get([keys[row] for row in rows]))
        start, total = rows[0], len(keys)
        return processes.gathered(entity, start, total), processes.gathered(relation, start, total)

    def _pair_loss(self, by_entity: Tensor, by_relation: Tensor, pairs: Pairs) -> tuple[Tensor, dict[str, float]]:
        device = by_entity.device
        related, counts, is_same = (part.to(device) for part in (pairs.related, pairs.counts, pairs.own))
        inside = self.classifier.log_probability(by_entity, by_relation)
        # log(1 - p) has an unbounded slope at p = 1
        outside = torch.log(-torch.expm1(inside.clamp(max=-1e-6)))
        wanted, hard = counts & related, counts & ~related & is_same
        positive = -_mean(inside, wanted)
        negative = -_mean(outside, hard)
        others = (-outside).masked_fill(~(counts & ~related & ~is_same), 0.0)
        worst = others.topk(min(HARDEST, others.shape[1]), dim=1).values.mean()
        parts = {"related": float(positive.detach()), "same": float(negative.detach()), "other": float(worst.detach())}
        return positive + negative + worst, parts

    def _contrast(
        self,
        vectors: Tensor,
        keys: Keys,
        kinds: Sequence[str],
        kind: str,
        number: Callable[[Any], int],
    ) -> Tensor:
        """InfoNCE between the edits' vectors and those of one of their rephrased views."""
        first = {record: row for row, (record, _) in enumerate(keys) if kinds[row] == "reliability"}
        second = {record: row for row, (record, _) in enumerate(keys) if kinds[row] == kind}
        records = [record for record in first if record in second]
        if len(records) < 2:
            return vectors.new_zeros(())
        rows = [first[record] for record in records]
        classes = torch.tensor([number(self.questions.of[keys[row][0]][keys[row][1]]) for row in rows])
        logits = vectors[rows] @ vectors[[second[record] for record in records]].T / TEMPERATURE
        # Other records with the same question or image are no counterexamples
        same = (classes[:, None] == classes) & ~torch.eye(len(rows), dtype=torch.bool)
        logits = logits.masked_fill(same.to(logits.device), -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(rows), device=logits.device))

    def _anchors(self, keys: Keys, kinds: Sequence[str], step: int) -> list[int]:
        """Of every record the edit, another related question, and any other one: as edits that may be stored."""
        make = torch.Generator().manual_seed(self.trainer.seed * 1_000_003 + step)
        by_record: dict[int, tuple[list[int], list[int]]] = {}
        for row, (record, _) in enumerate(keys):
            by_record.setdefault(record, ([], []))[kinds[row] not in RELATED].append(row)
        chosen = []
        for related, rest in by_record.values():
            edit = next(row for row in related if kinds[row] == "reliability")
            chosen.append(edit)
            for group in ([row for row in related if row != edit], rest):
                if group:
                    chosen.append(group[int(torch.randint(len(group), (1,), generator=make))])
        return chosen

    def _records(self, step: int) -> list[int]:
        """Records of a step: all of them in a new order every epoch."""
        made: list[int] = []
        orders: dict[int, list[int]] = {}
        for index in range(step * self.trainer.batch_size, (step + 1) * self.trainer.batch_size):
            epoch, within = divmod(index, self.n_train)
            if epoch not in orders:
                make = torch.Generator().manual_seed(self.trainer.seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(self.n_train, generator=make).tolist()
            record = orders[epoch][within]
            if record not in made:
                made.append(record)
        return made

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Rates on held-out records at the best threshold, see ``calibrated``."""
        return self.calibrated()[1]

    def result(self) -> Artifact:
        """The classifier with its threshold set; rates by kind of question as metrics."""
        probability, rates = self.calibrated()
        self.classifier.threshold.fill_(probability).log_()
        config = {**self.config, "classifier": self.classifier.settings(), **self.finish()}
        agreement = None if self.false_rate is None else self.agreement(self.false_rate)
        if agreement is not None:
            config["agreement"] = agreement.settings()
        metrics = {"rates": rates, "threshold": probability}
        return Artifact(self.name, self.model.fingerprint, config, self.classifier.tensors(), metrics)

    @torch.no_grad()
    def calibrated(self) -> tuple[float, dict[str, float]]:
        """The threshold (a probability) that is best on held-out records, and the rates there.

        Rates: of each kind of question the share that its edit acts on ("<kind>"), alone; and in a sequence of up to
        ``stored`` edits, the held-out ones among them ("<kind>@<n>"): for related kinds the share that its own edit
        acts on, for others the share that any does. "score" is the mean over both of the mean right share of related
        and of unrelated kinds.
        """
        held = list(range(self.n_train, len(self.records)))
        before = list(range(max(0, self.n_train - max(0, self.stored - len(held))), self.n_train))
        keys: Keys = [(record, number) for record in held for number in range(len(self.questions.of[record]))]
        known = [*before, *held]
        edits: Keys = [(record, self._edit(record)) for record in known]
        asked, stored = self._vectors(keys), self._vectors(edits)
        column = {record: number for number, record in enumerate(known)}
        own_column = torch.tensor([column[record] for record, _ in keys], device=asked[0].device)
        every = self.classifier.log_probability(asked[0] @ stored[0].T, asked[1] @ stored[1].T)
        alone = every.gather(1, own_column[:, None])[:, 0]
        kinds = [self.questions.of[record][number].kind for record, number in keys]
        answers = answer_numbers([target_key(self.records[record].target) for record in known]).to(every.device)
        found: list[tuple[float, dict[str, float]]] = []
        for probability in THRESHOLDS:
            least = float(torch.tensor(probability).log())
            value, edit = settled(every.clone(), least, asked[2], stored[2], answers).max(1)
            acts = value >= least
            right = acts & (edit == own_column)
            found.append((probability, _rates(kinds, alone >= least, acts, right, len(known))))
        most = max(rates["score"] for _, rates in found)
        # Of those that are as good, the one with most room on both sides
        best = [each for each in found if each[1]["score"] >= most - PLATEAU]
        return best[len(best) // 2]

    @torch.no_grad()
    def agreement(self, false_rate: float) -> Agreement | None:
        """How alike images must be, from held-out questions against the edits of all records."""
        held = range(self.n_train, len(self.records))
        edits: Keys = [(record, self._edit(record)) for record in range(len(self.records))]
        asked: Keys = [
            (record, number)
            for record in held
            for number, one in enumerate(self.questions.of[record])
            if one.kind in ("reliability", "image_generality")
        ]
        vectors, stored = self._vectors(asked), self._vectors(edits)
        pairs = Pairs.of(self.questions, [*edits, *asked], range(len(edits)))
        foreign, related, own = (
            part[:, len(edits) :].T.to(vectors[0].device)
            for part in (pairs.counts & ~pairs.related & ~pairs.own, pairs.related, pairs.own)
        )
        cosine = vectors[0] @ stored[0].T
        agreement = Agreement.of(
            cosine, torch.cdist(vectors[2], stored[2], compute_mode="donot_use_mm_for_euclid_dist")
        )
        # What would be said of them if they showed the same
        best = self.classifier.log_probability(torch.ones_like(cosine), vectors[1] @ stored[1].T)
        asks_same = best >= self.classifier.threshold
        other = torch.tensor([self.questions.of[r][n].kind == "image_generality" for r, n in asked])
        same_thing = agreement[(related & own) & other.to(agreement.device)[:, None]]
        pictured = torch.tensor([one.image is not None for one in (self.questions.of[r][n] for r, n in edits)])
        foreign &= pictured.to(foreign.device)
        return Agreement.fitted(
            agreement[foreign & asks_same], int(foreign.sum()), same_thing, false_rate=false_rate, kept=KEPT
        )

    def _edit(self, record: int) -> int:
        return next(n for n, one in enumerate(self.questions.of[record]) if one.kind == "reliability")

    def _vectors(self, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
        """Entity and relation vectors and centres of images, some rows at a time."""
        parts = []
        for start in range(0, len(keys), 1024):
            tokens = self.store.get(keys[start : start + 1024])
            parts.append((*self.classifier(tokens), tokens.centre()))
        entity, relation, centre = (torch.cat(part) for part in zip(*parts, strict=True))
        return entity, relation, centre


def _rates(kinds: Sequence[str], alone: Tensor, acts: Tensor, right: Tensor, stored: int) -> dict[str, float]:
    found: dict[str, float] = {}
    scores = []
    for suffix, of_related, of_others in (("", alone, alone), (f"@{stored}", right, acts)):
        for kind in sorted(set(kinds)):
            chosen = torch.tensor([one == kind for one in kinds], device=acts.device)
            found[kind + suffix] = float((of_related if kind in RELATED else of_others)[chosen].float().mean())
        inside = [found[kind + suffix] for kind in RELATED if kind in kinds]
        outside = [1 - found[kind + suffix] for kind in UNRELATED if kind in kinds]
        scores += [sum(inside) / len(inside), sum(outside) / max(1, len(outside))]
    return {**found, "score": sum(scores) / len(scores)}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Squared correlations over a batch of coordinates of vectors (R, n), summed over one's, mean over the other's."""
    a, b = ((part - part.mean(0)) / (part.std(0, unbiased=False) + 1e-6) for part in (a, b))
    return (a.T @ b / len(a)).square().sum(1).mean()
