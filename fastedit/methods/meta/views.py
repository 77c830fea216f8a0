"""The questions that a network is meta-trained on, and their rows, walked once through the frozen part of the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed import token_rows
from fastedit.deltas import DeltaSpec, Rows
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import TrainingView, ViewSource
from fastedit.objectives import ROLES, Role
from fastedit.requests import EditRequest, Query

#: What must change, then what must stay, under the names of the scores.
CHANGED = ("reliability", "text_generality", "image_generality")
KEPT = ("text_locality", "image_locality", "near", "same", "blind")


@dataclass(frozen=True)
class MetaView:
    """A view of a record and the score that it stands for."""

    kind: str
    view: TrainingView


class MetaViews:
    """Views of every record that a network is trained on.

    The records are training data, so their own rephrased and locality questions and probes are used; a part that a
    record lacks is drawn from the others (``ViewSource``), with images that are asked the record's own question among
    the locality views in any case.

    Args:
        records: what is trained on.
        seed: of the draws.
    """

    def __init__(self, records: Sequence[EditRequest], seed: int = 0) -> None:
        self.records, self.seed = records, seed
        self._own = ViewSource(records, None, source="record", seed=seed)
        self._drawn = ViewSource(records, None, source="heldout", near=True, seed=seed)
        self._made: dict[int, tuple[MetaView, ...]] = {}

    def of(self, index: int) -> tuple[MetaView, ...]:
        """All views of a record: one of every role, then its probes."""
        if index not in self._made:
            self._made[index] = tuple(self._views(index))
        return self._made[index]

    def chosen(self, index: int, epoch: int, locality: int) -> list[int]:
        """Numbers of the views that a record is trained on in an epoch, rising.

        Everything that must change and the unrelated question in text; of what else must stay, ``locality`` kinds by
        lot and one view of each.
        """
        rng = random.Random(f"{self.seed}|{epoch}|{index}")
        views = self.of(index)
        always = [n for n, each in enumerate(views) if each.kind in (*CHANGED, "text_locality")]
        by_kind: dict[str, list[int]] = {}
        for number, each in enumerate(views):
            if number not in always:
                by_kind.setdefault(each.kind, []).append(number)
        kinds = rng.sample(sorted(by_kind), min(locality, len(by_kind)))
        return sorted(always + [rng.choice(by_kind[kind]) for kind in kinds])

    def _views(self, index: int) -> list[MetaView]:
        record = self.records[index]
        by_role = {view.role: view for view in self._own.views(index, ROLES)}
        roles = [role for role in ROLES if record.image is not None or role is not Role.IMAGE_REPHRASE]
        missing = [role for role in roles if role not in by_role]
        drawn = self._drawn.views(index, missing) if missing and len(self.records) > 1 else []
        by_role |= {view.role: view for view in drawn}
        made = [MetaView(kind, by_role[role]) for kind, role in zip((*CHANGED, *KEPT), ROLES, strict=False)
                if role in by_role]  # fmt: skip
        for probe in record.probes:
            if probe.score not in KEPT:  # unseen wordings and further probes are for measuring
                continue
            # What is fed to a question that has no known answer is the answer to it with its image
            answer = probe.answer or record.prediction or record.target
            role = Role.TEXT_LOCALITY if probe.image is None else Role.IMAGE_LOCALITY
            made.append(MetaView(probe.kind, TrainingView(role, Query(probe.prompt, probe.image, answer))))
        near_known = any(each.kind == "near" for each in made)
        if record.image is not None and not near_known and len(self.records) > 1:
            made += [MetaView("near", view) for view in self._drawn.views(index, [Role.IMAGE_LOCALITY])]
        return made


class RowStore:
    """Rows of views at the point where the deltas begin, kept as long as there is room for them.

    Args:
        model: frozen. spec: of the deltas. views: of the records.
        room: bytes for rows that are kept; others are walked again each time.
    """

    def __init__(self, model: EditableModel, spec: DeltaSpec, views: MetaViews, room: int) -> None:
        self.model, self.spec, self.views, self.room = model, spec, views, room
        self._kept: dict[tuple[int, int], EditRows] = {}

    def get(self, wanted: Sequence[tuple[int, int]]) -> list[EditRows]:
        """One row each, of (record, number of its view). No delta may act."""
        missing = [key for key in wanted if key not in self._kept]
        made: dict[tuple[int, int], EditRows] = {}
        if missing:
            views = [[self.views.of(record)[number].view] for record, number in missing]
            made = dict(zip(missing, prepare(self.model, self.spec, views, _Untimed()), strict=True))
        found = [self._kept[key] if key in self._kept else made[key] for key in wanted]
        for key, rows in made.items():
            self._keep(key, rows)
        return found

    def _keep(self, key: tuple[int, int], rows: EditRows) -> None:
        reference = rows.reference
        size = rows.state.n_bytes + (0 if reference is None else reference.numel() * reference.element_size())
        if size > self.room:
            return
        self.room -= size
        # A slice would keep its whole batch in memory
        self._kept[key] = EditRows(
            rows.state.map(torch.clone),
            rows.labels.clone(),
            rows.role,
            None if reference is None else reference.clone(),
            rows.row_roles,
        )


@dataclass(frozen=True)
class MetaBatch:
    """Rows of several records as one batch.

    Args:
        state: packed. labels, role, edit, row: (T,) int64; whose a token is. reference: of locality tokens, or None.
        rows: rows per record. kinds: by row.
    """

    state: PackedState
    labels: Tensor
    role: Tensor
    edit: Tensor
    row: Tensor
    reference: Tensor | None
    rows: Rows
    kinds: tuple[str, ...]

    @staticmethod
    def of(rows: Sequence[EditRows], counts: Sequence[int], kinds: Sequence[str]) -> MetaBatch:
        """Single rows, those of a record back to back; ``counts`` by record."""
        labels = torch.cat([each.labels for each in rows])
        row = token_rows([len(each.labels) for each in rows], labels.device)
        references = [each.reference for each in rows if each.reference is not None]
        return MetaBatch(
            state=PackedState.cat([each.state for each in rows]),
            labels=labels,
            role=torch.cat([each.role for each in rows]),
            edit=token_rows(counts, labels.device)[row],
            row=row,
            reference=torch.cat(references) if references else None,
            rows=Rows(tuple(counts)),
            kinds=tuple(kinds),
        )


class _Untimed:
    """A timer that measures nothing."""

    def phase(self, _name: str) -> AbstractContextManager[None]:
        return nullcontext()
