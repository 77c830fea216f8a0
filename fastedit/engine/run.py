"""The result of a run: deltas, scores, timing, provenance; and its folder on disk."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.deltas import EditDelta
from fastedit.engine.saving import SCORES, read_run, write_run
from fastedit.evaluation import EditScores, Score
from fastedit.fitting.solver import FitOutcome
from fastedit.requests import EditRequest
from fastedit.training import Artifact, require_artifact

if TYPE_CHECKING:
    from fastedit.backbone import EditableModel
    from fastedit.export import Exported

#: Numbers of a fit's outcome, in order.
LOSSES = ("loss", "nll", "first_nll", "best_nll")


#: Scores that say in a line how a run went.
_HEADLINE = ("reliability", "text_locality", "image_locality")


@dataclass(frozen=True)
class Timing:
    """Where the time of a run went.

    Args:
        edits_per_s: edits over the seconds of editing (everything but loading and evaluation).
        seconds: wall-clock seconds by phase.
        steps: optimiser steps over all edits.
        peak_memory_mib: peak resident memory of the process (of the device, on a GPU).
        nfu: necessary-FLOP utilisation, None where the peak was not measured.
    """

    edits_per_s: float
    seconds: Mapping[str, float]
    steps: int
    peak_memory_mib: float
    nfu: float | None = None


@dataclass(frozen=True)
class Run:
    """What ``fastedit.edit`` returns.

    Args:
        deltas: one EditDelta per edit, in the order of the edits; of a ledger's run read when asked for.
        outcomes: how each fit ended.
        scores: protocol -> score name -> Score; empty when the run was not evaluated.
        edit_scores: per edit, the values behind the scores and the answers given.
        timing: speed.
        provenance: everything needed to repeat and compare the run.
        checkpoints: of a sequence, number of edits made -> as ``scores``, of the edits so far.
        artifact: trained parts that the deltas need to act.
        requests: what was asked for, in order, where the run was made in this process; it is not saved.
    """

    deltas: Sequence[EditDelta]
    outcomes: Sequence[FitOutcome]
    scores: Mapping[str, Mapping[str, Score]]
    edit_scores: Sequence[EditScores]
    timing: Timing
    provenance: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Mapping[int, Mapping[str, Mapping[str, Score]]] = field(default_factory=dict)
    artifact: Artifact | None = None
    requests: Sequence[EditRequest] = field(default=(), repr=False, compare=False)

    def __repr__(self) -> str:
        ends = ", ".join(f"{count} {status}" for status, count in Counter(o.status for o in self.outcomes).items())
        strict = self.scores.get("strict", {})
        shown = [f"{n.replace('_', ' ')} {100 * strict[n].mean:.1f} %" for n in _HEADLINE if n in strict]
        model = self.provenance.get("model", {}).get("name", "an unknown model")
        scores = f"; strict {', '.join(shown)}" if shown else "; not scored"
        method = self.provenance.get("method", "an unknown method")
        count = f"{len(self.deltas)} edit{'' if len(self.deltas) == 1 else 's'}"
        return f"<Run: {method} on {model}, {count} ({ends}){scores}>"

    def record(self) -> dict[str, Any]:
        """Scores, timing, outcomes and provenance as plain values (NaN as None)."""
        scored: Sequence[EditScores | None] = self.edit_scores or [None] * len(self.deltas)
        ids = _request_ids(self.deltas)
        data = {
            "scores": _tables(self.scores),
            "checkpoints": {str(count): _tables(scores) for count, scores in self.checkpoints.items()},
            "timing": asdict(self.timing),
            "provenance": dict(self.provenance),
            "edits": [
                {"id": edit_id, **asdict(outcome), **(asdict(scores) if scores else {})}
                for edit_id, outcome, scores in zip(ids, self.outcomes, scored, strict=True)
            ],
        }
        return plain(data)  # type: ignore[no-any-return]

    def save(self, folder: str | Path) -> Path:
        """Write the run into a folder, made if needed. Returns the folder.

        The deltas go to ``deltas.safetensors``; those of a ledger are copied to files in the folder's ``deltas/``.
        Trained parts go to ``artifact.safetensors``, all else to ``scores.json``. A run that was saved there before
        stays until this one is there as a whole, and is gone then. ``report.html`` is a page about it, for a browser;
        where that alone cannot be written there is a warning.

        Raises:
            ValueError: another process writes there, or the folder's ``deltas/`` holds those of a run that was not
                saved; nothing was written.
            OSError: it cannot be written, or the disk is full; what was there is as it was.
        """
        from fastedit.report import REPORT, run_page, write_page

        folder, record = Path(folder), self.record()
        write_run(folder, record, self.deltas, self.artifact)
        try:
            write_page(folder / REPORT, run_page(record, self.requests))
        except OSError as error:
            detail = f"run: it is saved in {str(folder)!r}, but its page {REPORT} could not be written: {error}"
            warnings.warn(detail, RuntimeWarning, stacklevel=2)
        return folder

    def export(
        self,
        kind: str,
        folder: str | Path,
        model: EditableModel,
        *,
        edits: Sequence[EditRequest] = (),
        **options: Any,
    ) -> Exported:
        """Write the run's deltas as what other programs load (``fastedit.export.export_deltas``).

        Args:
            kind: "peft", "merged", "delta" or "records". folder: new or empty. model: the one that was edited.
            edits: of the run, in order, to ask again what was written; a run does not hold them.
            options: of the kind.
        Raises:
            ValueError: see there; or edits that are not those of the run.
        """
        from fastedit.export import export_deltas

        for number, (edit, edit_id) in enumerate(zip(edits, _request_ids(self.deltas), strict=False)):
            if edit.id and edit.id != edit_id:
                raise ValueError(
                    f"run: edits are those of the run, in its order (got edits[{number}] with id={edit.id!r}, of the "
                    f"run {edit_id!r})"
                )
        return export_deltas(kind, model, self.deltas, folder, requests=edits, **options)

    @staticmethod
    def load(folder: str | Path, model: EditableModel | None = None) -> Run:
        """Read a saved run back, with everything checked.

        Args:
            folder: that ``save`` wrote.
            model: the one that was edited. Trained parts, without which the deltas of some methods cannot act, are put
                at its disposal. None leaves that to ``fastedit.load_artifact``.
        Raises:
            FileNotFoundError: a file of the folder is missing.
            ValueError: a file is not what was written, the deltas do not belong to the scores, or the run is of another
                model.
        """
        saved = read_run(Path(folder))
        data, deltas = saved.content, saved.deltas
        ids = _request_ids(deltas)
        try:
            edits = data["edits"]
            if [edit["id"] for edit in edits] != ids:
                raise ValueError(f"run: scores and deltas name the same edits in one order (they differ in {folder})")
            outcomes = [FitOutcome(e["status"], e["steps"], *(_number(e.get(name)) for name in LOSSES)) for e in edits]
            scored = [EditScores(e["legacy"], e["strict"], e["answers"]) for e in edits if "strict" in e]
            checkpoints = {int(count): _scores(tables) for count, tables in data.get("checkpoints", {}).items()}
            run = Run(
                deltas, outcomes, _scores(data["scores"]), scored, Timing(**data["timing"]), dict(data["provenance"]),
                checkpoints, saved.artifact,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"run: {SCORES} is complete (got {error!r:.200} in folder={str(folder)!r})") from error
        if model is not None:
            run._bind(model)
        return run

    def _bind(self, model: EditableModel) -> None:
        """Let the deltas act on a model, which is the one that was edited."""
        of = str((self.provenance.get("model") or {}).get("fingerprint", ""))
        if of != model.fingerprint:
            detail = f"got a run of model={of[:12]!r}, in use {model.fingerprint[:12]!r}"
            raise ValueError(f"run: it is of the model in use ({detail})")
        if self.artifact is not None:
            require_artifact(self.artifact, self.artifact.kind, model)
            model.artifacts[self.artifact.id] = self.artifact


def _request_ids(deltas: Sequence[EditDelta]) -> list[str]:
    """Whose the deltas are; of those that are read when asked for, without reading them."""
    known: list[str] | None = getattr(deltas, "request_ids", None)
    return [delta.request_id for delta in deltas] if known is None else known


def _tables(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    return {p: {k: asdict(s) for k, s in table.items()} for p, table in scores.items()}


def _scores(tables: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    return {
        p: {k: Score(_number(s["mean"]), _number(s["low"]), _number(s["high"]), s["n"]) for k, s in table.items()}
        for p, table in tables.items()
    }


def plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
