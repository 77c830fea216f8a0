"""Examples that SERAC's scope classifier is trained on, and its loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.deltas import DeltaSpec, split_point
from fastedit.methods.meta.views import CHANGED, MetaViews
from fastedit.requests import Query
from fastedit.routers.scope import ScopeFeatures, ScopeHeads, scope_features, scope_loss, squared_distances

#: Questions whose features are made together.
CHUNK = 256


class FeatureStore:
    """What the scope sees of the views of records, kept as long as there is room.

    Args:
        model: frozen. spec: of the deltas. views: of the records. segments: of images.
        room: bytes.
    """

    def __init__(self, model: EditableModel, spec: DeltaSpec, views: MetaViews, segments: int, room: int) -> None:
        self.model, self.spec, self.views, self.segments, self.room = model, spec, views, segments, room
        self._kept: dict[int, ScopeFeatures] = {}

    def get(self, chosen: Sequence[int]) -> list[ScopeFeatures]:
        """Features of all views of some records."""
        missing = [index for index in dict.fromkeys(chosen) if index not in self._kept]
        made: dict[int, ScopeFeatures] = {}
        if missing:
            queries = [[each.view.query for each in self.views.of(index)] for index in missing]
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
        parts = self.get(chosen)
        kinds = [each.kind for index in chosen for each in self.views.of(index)]
        row = token_rows([len(part) for part in parts], self.model.device)
        points = heads(ScopeFeatures.cat(parts))
        first = torch.tensor([kind == CHANGED[0] for kind in kinds], device=row.device)
        changed = torch.tensor([kind in CHANGED for kind in kinds], device=row.device)
        edits = points[first]
        distance = (points - edits[row]).square().sum(1)
        each = scope_loss(distance, changed)
        loss = recall * _mean(each, changed & ~first) + _mean(each, ~changed)
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
            parts.append(scope_features(state, self.segments))
        return ScopeFeatures.cat(parts)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 where there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
