"""Training from the command line: what it came to, as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastedit.training import Artifact

#: Rows of the table: the first, the best, the last ones.
MOST_ROWS = 8


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
    """Train, save, tell."""
    import fastedit

    artifact = fastedit.train(model, method, records, out=out, resume=resume, trainer=trainer, **settings)
    console.print(validation_table(artifact))
    metrics = artifact.metrics
    console.print(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s; saved to {out}", soft_wrap=True)
    console.print(f"use it: fastedit edit --method {method} --artifact {out}", soft_wrap=True)
    return artifact


def validation_table(artifact: Artifact) -> Table:
    """Scores on the records held for validation, in per cent, by step; the kept one is marked."""
    history: list[dict[str, float]] = list(artifact.metrics.get("validation", []))
    best = artifact.metrics.get("best") or {}
    names = [name for name in (history[-1] if history else {}) if name not in ("step", "score")]
    table = Table(title=f"{artifact.kind}: held-out records, %", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("step", "score", *(name.replace("_", " ") for name in names)):
        table.add_column(heading, justify="right")
    for entry in shown(history, best):
        mark = " *" if entry["step"] == best.get("step") else ""
        values = (f"{100 * entry[name]:.1f}" if name in entry else "-" for name in ("score", *names))
        table.add_row(f"{entry['step']:.0f}{mark}", *values)
    return table


def shown(history: list[dict[str, float]], best: Mapping[str, float]) -> list[dict[str, float]]:
    """The first, the kept one and the last ones."""
    if len(history) <= MOST_ROWS:
        return history
    kept = [entry for entry in history[1 : -(MOST_ROWS - 2)] if entry["step"] == best.get("step")]
    return [history[0], *kept, *history[-(MOST_ROWS - 2) :]]
