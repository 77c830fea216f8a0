"""Training from the command line: what it came to, as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from fastedit.cli.failures import STOPPED, Ended
from fastedit.cli.options import parse_settings
from fastedit.cli.tables import HEADINGS, titled
from fastedit.engine.train import trained_kind, trainer_settings
from fastedit.methods import resolve
from fastedit.training import Artifact

#: Rows of the table: the first, the best, the last ones.
MOST_ROWS = 8


def training_settings(
    method: str, overrides: Mapping[str, Any], trainer: list[str] | None, steps: int | None
) -> dict[str, Any]:
    """Settings of training as they were typed.

    Raises:
        ValueError: one is given twice or does not exist, or the method has nothing to train.
    """
    chosen = parse_settings(trainer, "--trainer")
    if steps is not None:
        if "steps" in chosen:
            raise ValueError(f"--trainer: steps is given once (got --steps {steps} and steps={chosen['steps']!r})")
        chosen["steps"] = steps
    plan = resolve(method, overrides)
    trained_kind(plan)
    trainer_settings(plan, chosen)
    return chosen


def train_method(
    console: Console,
    model: Any,
    method: str,
    records: Any,
    out: Path,
    *,
    resume: bool,
    trainer: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Artifact:
    """Train, save, tell.

    Raises:
        Ended: stopped by a signal; says from which checkpoint the same command goes on.
    """
    import fastedit

    try:
        artifact = fastedit.train(model, method, records, out=out, resume=resume, trainer=trainer, **settings)
    except KeyboardInterrupt as stopped:
        state = out.with_name(out.name + ".training")
        kept = f"the last checkpoint is kept in {state}, and the same command goes on from it"
        state_kept = kept if state.is_file() else "no checkpoint was written yet, so nothing is kept"
        raise Ended(f"stopped; {state_kept}", STOPPED) from stopped
    console.print(validation_table(artifact))
    metrics = artifact.metrics
    console.print(
        f"{metrics['steps']} steps in {metrics['seconds']:.0f} s; saved to {out}", soft_wrap=True, markup=False
    )
    console.print(f"use it: fastedit edit --method {method} --artifact {out}", soft_wrap=True, markup=False)
    return artifact


def validation_table(artifact: Artifact) -> Group:
    """Scores on the records held for validation, in per cent, by step; the kept one is marked."""
    history: list[dict[str, float]] = list(artifact.metrics.get("validation", []))
    best = artifact.metrics.get("best") or {}
    names = [name for name in (history[-1] if history else {}) if name not in ("step", "score")]
    headings = ("step", "score", *(HEADINGS.get(name, name.replace("_", " ")) for name in names))
    table, rows = titled(f"{artifact.kind}: held-out records, %", headings, left=0)
    for entry in shown(history, best):
        mark = " *" if entry["step"] == best.get("step") else ""
        values = (f"{100 * entry[name]:.1f}" if name in entry else "-" for name in ("score", *names))
        rows.add_row(f"{entry['step']:.0f}{mark}", *values)
    return table


def shown(history: list[dict[str, float]], best: Mapping[str, float]) -> list[dict[str, float]]:
    """The first, the kept one and the last ones."""
    if len(history) <= MOST_ROWS:
        return history
    kept = [entry for entry in history[1 : -(MOST_ROWS - 2)] if entry["step"] == best.get("step")]
    return [history[0], *kept, *history[-(MOST_ROWS - 2) :]]
