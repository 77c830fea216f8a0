"""What a published row measured, as data, and the records and trained parts that it needs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastedit.data import read_edits
from fastedit.engine.train import train
from fastedit.methods import resolve
from fastedit.requests import EditRequest


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        table: "single", "sequential", "cross-task", or "ablation-<of what>".
        model, data: embedded names; sets by turns are joined by "+".
        method: as ``fastedit.edit`` takes it.
        label: how it is told from others of its table; the method's name by default.
        settings: overrides. training: overrides of ``fastedit.train`` for the method's trained parts.
        edits: how many. score_at: gaps of a sequence.
    """

    table: str
    model: str
    data: str
    method: str
    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    edits: int = 1000
    score_at: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Unique among the cases."""
        return "/".join((self.table, self.model, self.data, self.label or self.method))

    @property
    def mode(self) -> str:
        """Of ``fastedit.edit``."""
        return "sequential" if self.table in ("sequential", "cross-task") else "single"


def case_of(data: Mapping[str, Any]) -> Case:
    """A case that was stored as JSON, which has lists where a case has tuples."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in data["settings"].items()}
    known = {name: value for name, value in data.items() if name != "name"}
    return Case(**{**known, "score_at": tuple(data["score_at"]), "settings": settings})


def records(data: str, split: str, limit: int | None) -> list[EditRequest]:
    """Records of a set, or of several by turns ("a+b")."""
    names = data.split("+")
    each = None if limit is None else math.ceil(limit / len(names))
    parts = [read_edits(name, split=split, limit=each) for name in names]
    together = [record for turn in itertools.zip_longest(*parts) for record in turn if record is not None]
    return together[:limit]


def trained_part(
    case: Case, model: Any, pool: Sequence[EditRequest], folder: Path, *, show_progress: bool = False
) -> tuple[Path, float | None] | None:
    """Return the file of the method's trained parts, made if it is absent, and the seconds of making it.

    Cases whose methods share a kind of artifact and its training share the file. None: the method has none.
    """
    kind = resolve(case.method, case.settings).artifact_kind
    if kind is None:
        return None
    # Trained in another way it has another name
    digest = hashlib.sha256(json.dumps(case.training, sort_keys=True).encode()).hexdigest()[:8] if case.training else ""
    path = folder / f"{'-'.join(filter(None, (case.model, case.data, kind, digest)))}.safetensors"
    notes = path.with_suffix(".json")
    if not path.exists():
        begin = time.perf_counter()
        train(model, kind, pool, out=path, show_progress=show_progress, **case.training)
        notes.write_text(json.dumps({"train_s": time.perf_counter() - begin}), encoding="utf-8")
    return path, json.loads(notes.read_text(encoding="utf-8"))["train_s"] if notes.exists() else None


def arguments(
    case: Case, pool: Sequence[EditRequest], trained: tuple[Path, float | None] | None, seed: int
) -> dict[str, Any]:
    """What ``fastedit.edit`` is given of a case, however its edits are timed."""
    return {"pool": pool, "seed": seed, **({} if trained is None else {"artifact": trained[0]}), **case.settings}
