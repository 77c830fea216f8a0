"""``fastedit compare``: several methods on the same edits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.cli.figure import draw_comparison
from fastedit.cli.tables import score_tables, speed_table
from fastedit.engine import Run
from fastedit.engine.run import plain
from fastedit.files import write_json
from fastedit.methods import resolve, setting_names
from fastedit.methods.base import hook
from fastedit.requests import EditRequest


def settings_per_method(methods: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that each method has a field for.

    Raises:
        ValueError: a method that does not exist, or a setting that none of them has.
    """
    known = {name: setting_names(resolve(name, {})) for name in methods}
    for key, value in settings.items():
        if not any(key in fields for fields in known.values()):
            resolve(methods[0], {key: value})
    chosen = {name: {k: v for k, v in settings.items() if k in known[name]} for name in methods}
    for name, each in chosen.items():
        resolve(name, each)
    return chosen


def trained_part(
    model: Any,
    method: str,
    pool: Sequence[EditRequest] | None,
    folder: Path,
    settings: dict[str, Any],
    *,
    data: str,
    console: Console,
) -> Path | None:
    """The file of a method's trained parts, trained if it is not there; None for a method without any.

    Raises:
        ValueError: there is nothing to train on.
    """
    plan = resolve(method, settings)
    needs = hook(plan.method, "artifact")
    kind = None if needs is None else needs(plan.config, method)
    if kind is None:
        return None
    path = folder / f"{Path(model.name).name}-{Path(data).stem}-{kind}.safetensors"
    if not path.exists():
        if not pool:
            told = f"fastedit train --method {kind} --out {path}"
            raise ValueError(
                f"compare: {method} has parts to train, and no records to train on; run {told} (got no pool)"
            )
        console.print(f"{method}: training on {len(pool)} records, once", markup=False)
        fastedit.train(model, kind, pool, out=path, **settings)
    return path


def compare_methods(
    model: Any,
    edits: Sequence[EditRequest],
    pool: Sequence[EditRequest] | None,
    methods: Sequence[str],
    *,
    data: str,
    out: Path,
    batch_size: Any,
    mode: str,
    console: Console,
    settings: dict[str, Any] | None = None,
    artifacts: Path,
) -> dict[str, Run]:
    """Run every method, print score and speed tables, write ``comparison.json``, ``comparison.png`` and the runs.

    A setting goes to every method that has a field of this name, and must fit at least one of them. Trained parts are
    read from the folder ``artifacts``; those that are not there are trained on the pool and put there.
    """
    chosen = settings_per_method(methods, settings or {})
    runs: dict[str, Run] = {}
    for name in methods:
        trained = trained_part(model, name, pool, artifacts, chosen[name], data=data, console=console)
        start = time.perf_counter()
        runs[name] = fastedit.edit(
            model, edits, name, batch_size=batch_size, mode=mode, pool=pool, artifact=trained, **chosen[name]
        )
        runs[name].save(out / name.replace("+", "-"))
        console.print(f"{name}: {len(edits)} edits in {time.perf_counter() - start:.1f} s", markup=False)
    for protocol in ("legacy", "strict"):
        for table in score_tables(runs, protocol):
            console.print(table)
    console.print(speed_table(runs))
    record = {
        "model": model.name,
        "data": data,
        "n_edits": len(edits),
        "mode": mode,
        "runs": {name: {k: v for k, v in run.record().items() if k != "edits"} for name, run in runs.items()},
    }
    path = out / "comparison.json"
    write_json(path, plain(record))
    picture = draw_comparison(record, out / "comparison.png")
    console.print(f"table: {path}\npicture: {picture}\nruns: {out}", soft_wrap=True, markup=False)
    return runs
