"""fastedit: edit knowledge in multimodal LLMs, many edits at once, on a frozen model.

Importing the package registers its ops and does nothing else; models, data and methods are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastedit import ops
from fastedit.ops import implementations
from fastedit.requests import EditRequest, Probe, Query
from fastedit.visuals import Video

if TYPE_CHECKING:
    from fastedit.backbone import EditableModel, load
    from fastedit.backbone.wrapping import wrap
    from fastedit.data import read_edits
    from fastedit.deltas import EditDelta
    from fastedit.engine import Run, RunInterrupted, RunStopped, applied, edit
    from fastedit.engine.attach import Attachment, attach, attached
    from fastedit.engine.memory.plan import MemoryPlan, plan_memory
    from fastedit.engine.profiling.utilisation import measure_peak
    from fastedit.engine.score import ModelScores, score
    from fastedit.engine.train import train
    from fastedit.export.changes import apply_delta
    from fastedit.export.from_peft import from_peft
    from fastedit.ledger import DamagedLedger, Ledger, LedgerError, open_ledger
    from fastedit.ledger.consolidate import Consolidated, consolidate
    from fastedit.methods import method_names
    from fastedit.training import Artifact, load_artifact, save_artifact

__version__ = "0.2.0"

__all__ = [
    "Artifact",
    "Attachment",
    "Consolidated",
    "DamagedLedger",
    "EditDelta",
    "EditRequest",
    "EditableModel",
    "Ledger",
    "LedgerError",
    "MemoryPlan",
    "ModelScores",
    "Probe",
    "Query",
    "Run",
    "RunInterrupted",
    "RunStopped",
    "Video",
    "__version__",
    "applied",
    "apply_delta",
    "attach",
    "attached",
    "consolidate",
    "edit",
    "from_peft",
    "implementations",
    "load",
    "load_artifact",
    "measure_peak",
    "method_names",
    "open_ledger",
    "ops",
    "plan_memory",
    "read_edits",
    "save_artifact",
    "score",
    "train",
    "wrap",
]

_LAZY = {
    "Artifact": "fastedit.training",
    "Attachment": "fastedit.engine.attach",
    "Consolidated": "fastedit.ledger.consolidate",
    "DamagedLedger": "fastedit.ledger",
    "EditDelta": "fastedit.deltas",
    "EditableModel": "fastedit.backbone",
    "Ledger": "fastedit.ledger",
    "LedgerError": "fastedit.ledger",
    "MemoryPlan": "fastedit.engine.memory.plan",
    "ModelScores": "fastedit.engine.score",
    "Run": "fastedit.engine",
    "RunInterrupted": "fastedit.engine",
    "RunStopped": "fastedit.engine",
    "applied": "fastedit.engine",
    "apply_delta": "fastedit.export.changes",
    "attach": "fastedit.engine.attach",
    "attached": "fastedit.engine.attach",
    "consolidate": "fastedit.ledger.consolidate",
    "edit": "fastedit.engine",
    "from_peft": "fastedit.export.from_peft",
    "load": "fastedit.backbone",
    "load_artifact": "fastedit.training",
    "measure_peak": "fastedit.engine.profiling.utilisation",
    "method_names": "fastedit.methods",
    "open_ledger": "fastedit.ledger",
    "plan_memory": "fastedit.engine.memory.plan",
    "read_edits": "fastedit.data",
    "save_artifact": "fastedit.training",
    "score": "fastedit.engine.score",
    "train": "fastedit.engine.train",
    "wrap": "fastedit.backbone.wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastedit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
