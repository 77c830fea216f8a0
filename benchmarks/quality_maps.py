"""What the pictures of ``quality.py`` need besides scores: layers by kind of question, and the encoders' spaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastedit
from benchmarks.quality_run import records
from fastedit.deltas import DeltaSpec
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import prepare
from fastedit.fitting.views import ViewSource
from fastedit.methods.ldke.localize import layer_scores
from fastedit.methods.unike.view import KINDS, knowledge_view
from fastedit.objectives import ROLES
from fastedit.requests import EditRequest
from fastedit.training import load_artifact

TOGETHER = 32


def layer_map(model_name: str, data: str, edits: int, path: Path) -> dict[str, Any]:
    """Mean localization score of every layer by kind of edit; kept at ``path`` and read from there next time."""
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    model = fastedit.load(model_name)
    chosen = records(data, "eval", edits)
    scores = localized(model, chosen)
    by_kind: dict[str, list[list[float]]] = {}
    for edit, own in zip(chosen, scores.tolist(), strict=True):
        by_kind.setdefault(edit.tags[-1], []).append(own)
    kinds = sorted(by_kind)
    values = [[sum(column) / len(column) for column in zip(*by_kind[kind], strict=True)] for kind in kinds]
    found = {"kinds": [f"{kind} ({len(by_kind[kind])})" for kind in kinds], "values": values, "edits": len(chosen)}
    found |= {"model": model_name, "data": data}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def localized(model: Any, edits: Sequence[EditRequest]) -> torch.Tensor:
    """(B, L) localization scores over all layers, of the records' own views."""
    sites = tuple(model.sites(range(model.n_layers), ["down"]))
    spec, source, timer = DeltaSpec("full", sites), ViewSource(edits, None, source="record"), PhaseTimer(model.device)
    parts = []
    for start in range(0, len(edits), TOGETHER):
        views = [source.views(number, ROLES) for number in range(start, min(start + TOGETHER, len(edits)))]
        parts.append(layer_scores(model, sites, prepare(model, spec, views, timer), probes=0.0))
    return torch.cat(parts)


def knowledge(artifact: Path) -> dict[str, tuple[list[list[float]], list[str]]]:
    """By title of a panel, points (N, 2) and what each is: states of UniKE's memory, and their codes."""
    view = knowledge_view(load_artifact(artifact, kind="unike"))
    found = {}
    for name, kinds in (("semantic", view.semantic_kinds), ("truthful", view.truthful_kinds)):
        labels = [KINDS[kind] for kind in kinds.tolist()]
        for when, title in (("before", "states"), ("after", f"{name} space")):
            own = f"{title}, {'questions and answers' if name == 'semantic' else 'answers'}"
            found[own] = (getattr(view, f"{name}_{when}").tolist(), labels)
    return found
