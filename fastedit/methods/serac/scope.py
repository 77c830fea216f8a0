"""Examples that SERAC's scope classifier is trained on, and its loss on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.deltas import DeltaSpec, split_point
from fastedit.fitting.wordings import reworded
from fastedit.methods.meta.siblings import siblings_of
from fastedit.methods.meta.views import CHANGED, KEPT, MetaViews
from fastedit.requests import Query
from fastedit.routers.scope import ScopeFeatures, ScopeHeads, ScopeShape, scope_features, scope_loss, squared_distances
from fastedit.training import processes

#: Questions whose features are made together.
CHUNK = 256
#: Kinds of rewordings: of a record's question, and of one that must stay.
REWORDED, REWORDED_KEPT = "reworded", "reworded_kept"
#: Questions of other records, nearly in the words of a record's own, about its image.
SIBLING = "sibling"
#: What must stay and is nearest in words: the same image asked about something else.
NEAREST = "same"


class FeatureStore:
    """What the scope sees of the views of records and of rewordings, kept as long as there is room.

    Args:
        model: frozen. spec: of the deltas. views: of the records. shape: of the heads.
        wordings: rewordings of a record's question, and as many of what must stay; with 0 there are no siblings either.
        room: bytes.
    """

    def __init__(
        self, model: EditableModel, spec: DeltaSpec, views: MetaViews, shape: ScopeShape, wordings: int, room: int
    ) -> None:
        self.model, self.spec, self.views, self.shape = model, spec, views, shape
        self.wordings, self.room = wordings, room
        records = views.records
        self.siblings = siblings_of(model, records, views.seed) if wordings else [[] for _ in records]
        self._kept: dict[int, ScopeFeatures] = {}

    def questions(self, index: int) -> list[tuple[str, Query]]:
        """Every question of a record that has features, in their order: its views, siblings, rewordings, by kind."""
        asked = [(each.kind, each.view.query) for each in self.views.of(index)]
        changed = [query for kind, query in asked if kind in CHANGED[:2]]
        kept = [query for kind, query in asked if kind not in CHANGED]
        nearest = [query for kind, query in asked if kind == NEAREST]
        rng = random.Random(f"{self.views.seed}|wordings|{index}")
        record = self.views.records[index]
        asked += [(SIBLING, Query(prompt, record.image)) for prompt in self.siblings[index]]
        for number in range(self.wordings):
            asked.append((REWORDED, _reworded(rng.choice(changed), rng)))
            # Every other one of what is nearest in words
            sources = nearest if nearest and number % 2 == 0 else kept
            if sources:
                asked.append((REWORDED_KEPT, _reworded(rng.choice(sources), rng)))
        return asked

    def get(self, chosen: Sequence[int]) -> list[ScopeFeatures]:
        """Features of all questions of some records."""
        missing = [index for index in dict.fromkeys(chosen) if index not in self._kept]
        made: dict[int, ScopeFeatures] = {}
        if missing:
            queries = [[query for _, query in self.questions(index)] for index in missing]
            whole = self._made([query for each in queries for query in each])
            start = 0
            for index, queries_of in zip(missing, queries, strict=True):
                made[index] = whole.select(range(start, start + len(queries_of)))
                start += len(queries_of)
        found = [self._kept[index] if index in self._kept else made[index] for index in chosen]
        for index, features in made.items():
            if features.n_bytes <= self.room:
                self.room -= features.n_bytes
                self._kept[index] = features
        return found

    def edits(self, chosen: Sequence[int]) -> ScopeFeatures:
        """Features of the edits themselves."""
        return self._made([self.views.of(index)[0].view.query for index in chosen])

    def loss(self, heads: ScopeHeads, chosen: Sequence[int], recall: float) -> Tensor:
        """Binary cross-entropy of the scope: rephrases, against near questions and against other records' edits.

        Args:
            heads: trained. chosen: records. recall: weight of the rephrases.
        """
        asked = [self.questions(index) for index in chosen]
        kinds = [kind for each in asked for kind, _ in each]
        row = token_rows([len(each) for each in asked], self.model.device)
        # Of several processes each looks at its own records
        start = sum(len(each) for each in asked[: processes.bounds(len(chosen))[0]])
        points = heads(ScopeFeatures.cat(self.get(processes.own(chosen))))
        points = processes.gathered(points, start, len(row))

        def of(*wanted: str) -> Tensor:
            return torch.tensor([kind in wanted for kind in kinds], device=row.device)

        first, changed = of(CHANGED[0]), of(*CHANGED, REWORDED)
        edits = points[first]
        distance = (points - edits[row]).square().sum(1)
        each = scope_loss(distance, changed)
        # Rewordings are many: in means of their own they do not drown what a record has one of
        loss = recall * (_mean(each, of(*CHANGED[1:])) + _mean(each, of(REWORDED)))
        loss = loss + _mean(each, of(*KEPT)) + _mean(each, of(REWORDED_KEPT)) + _mean(each, of(SIBLING))
        others = squared_distances(points[changed], edits)
        apart = row[changed][:, None] != torch.arange(len(edits), device=row.device)
        outside = scope_loss(others, torch.zeros_like(others, dtype=torch.bool))[apart]
        # Nearly all of these are far away: the hardest few are what is learned from
        return loss + outside.topk(min(len(edits), len(outside))).values.mean()

    def _made(self, queries: Sequence[Query]) -> ScopeFeatures:
        parts = []
        for start in range(0, len(queries), CHUNK):
            encoded = self.model.encode(queries[start : start + CHUNK], answers=False)
            state = packed_prefix(self.model, packed_start(self.model, encoded), *split_point(self.spec))
            parts.append(scope_features(self.model, state, self.shape))
        return ScopeFeatures.cat(parts)


def _reworded(query: Query, rng: random.Random) -> Query:
    return replace(query, prompt=reworded(query.prompt, rng))


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 where there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
