"""How the edits of a ledger were made, so that they can be made again; and which can act together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastedit.deltas import DeltaSpec
from fastedit.deltas.kinds import KINDS
from fastedit.engine.run_state import EditJob
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import LedgerError
from fastedit.methods import EditPlan, resolve
from fastedit.methods.base import Method

# Options in which deltas may differ that are laid side by side
_SIZES = ("rank", "scale", "n", "seed")


def settings_of(job: EditJob, mode: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the edits of a run depend on besides their records, as plain values."""
    return {
        "method": job.plan.name,
        "mode": mode,
        "overrides": _overrides(job.plan),
        "seed": job.seed,
        "bind": job.bind,
        "views": job.views.source,
        "near": job.views.near,
        "artifact": None if job.artifact is None else job.artifact.id,
        "pool": provenance.get("pool"),
    }


def _overrides(plan: EditPlan) -> dict[str, Any]:
    """Fields of a plan's configs that are not as they are by themselves; given to ``resolve`` they make it again."""
    changed: dict[str, Any] = {}
    plain = resolve(plan.name, {})
    for config, usual in ((plan.config, plain.config), (plan.objective_config, plain.objective_config)):
        for field in fields(config):
            value = getattr(config, field.name)
            if value != getattr(usual, field.name):
                changed[field.name] = list(value) if isinstance(value, tuple) else value
    return changed


def plan_of(settings: Mapping[str, Any]) -> EditPlan:
    """The plan that settings say."""
    return resolve(settings["method"], settings["overrides"])


def adds_up(method: type[Method], mode: str) -> bool:
    """Whether each edit is fitted on top of the earlier ones."""
    return mode == "sequential" and method.sequence == "accumulate"


def acts_alone(method: type[Method], mode: str) -> bool:
    """Whether edits cannot act together: each is added to the base model and knows nothing of the others."""
    return mode == "single" and method.sequence != "route"


def check_alike(contents: Contents, plan: EditPlan, delta_spec: DeltaSpec, mode: str) -> None:
    """Refuse edits that cannot stand beside those that act.

    Raises:
        LedgerError: another method, mode or kind; names both.
    """
    there = contents.newest_run()
    if there is None:
        return
    old, method = plan_of(there["settings"]), plan.method
    was, now = (old.method, there["mode"]), (method, mode)
    if was[0] is not now[0] or adds_up(*was) != adds_up(*now) or acts_alone(*was) != acts_alone(*now):
        raise LedgerError(
            f"ledger: edits that act are of one method and mode; undo those that do, or open another ledger (got "
            f"method={plan.name!r}, mode={mode!r} beside {len(contents.acting())} of {there['method']!r}, "
            f"mode={there['mode']!r})"
        )
    spec, given = there["spec"], json.loads(delta_spec.text)
    if KINDS[delta_spec.kind].joined is not None:
        # Low-rank deltas that are not added up may stand at other sites each, as adapters of others do
        anywhere = mode == "single" and delta_spec.kind == "low_rank"
        spec, given = _comparable(spec, anywhere), _comparable(given, anywhere)
    if spec != given:
        raise LedgerError(
            f"ledger: edits that act have one kind of delta at the same sites; undo those that do, or open another "
            f"ledger (got {given} beside {spec})"
        )


def _comparable(spec: Mapping[str, Any], anywhere: bool) -> dict[str, Any]:
    """What of a spec deltas must share that are laid side by side."""
    options = {name: value for name, value in spec["options"].items() if name not in _SIZES}
    return {"kind": spec["kind"], "options": options, **({} if anywhere else {"sites": spec["sites"]})}
