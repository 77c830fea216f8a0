"""Take edits back, or let them act again: first what it costs, then the work."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fastedit.cli.app import tell
from fastedit.cli.documents import edit_id, lost_document, one_line, print_document, print_lines, text_table
from fastedit.cli.failures import STOPPED, Ended
from fastedit.cli.ledger_model import Loading, one_change, pool_of, reading, with_model
from fastedit.ledger import Ledger
from fastedit.ledger.history import listed
from fastedit.ledger.undo import LATER, Undone


def undo_edits(
    console: Console,
    folder: Path,
    ids: Sequence[str],
    *,
    later: str,
    records: Mapping[str, Any],
    yes: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Say what taking edits back costs, then do it.

    Args:
        later: "refit" or "keep". records: pool, format and images, as ``pool_of`` takes them.
    """
    if later not in LATER:
        raise ValueError(f"--later: one of {', '.join(LATER)} (got {later!r})")
    with reading(folder) as opened:
        cost = opened.undo_cost([edit_id(each) for each in ids])
        behind, refits = cost.refitted, bool(cost.refitted) and later == "refit"
        tell(f"to take back: {_named(opened, cost.ids)}")
        if refits:
            tell(f"fitted on top and fitted again: {_count(behind)}, {_steps(opened, behind)}")
        else:
            tell(f"fitted on top, kept and asked again: {_count(behind)}" if behind else _ALONE)
        _agree(yes, refits)
        learned = pool_of(opened, behind, **records) if refits else None
        if not behind:
            with one_change(opened):
                done = opened.undo(list(cost.ids), later=later)
    if behind:
        with with_model(folder, loading) as opened, one_change(opened):
            done = opened.undo(list(cost.ids), later=later, pool=learned)
    _print_undone(console, folder, "taken back", done, as_json)


def redo_edits(
    console: Console,
    folder: Path,
    ids: Sequence[str],
    *,
    records: Mapping[str, Any],
    yes: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Say what letting edits act again costs, then do it. Arguments as for ``undo_edits``."""
    with reading(folder) as opened:
        cost = opened.redo_cost([edit_id(each) for each in ids])
        refits = bool(cost.refitted)
        tell(f"to act again: {_named(opened, cost.ids)}")
        tell(f"fitted again, {_steps(opened, cost.ids)}" if refits else "as they were")
        _agree(yes, refits)
        learned = pool_of(opened, cost.ids, **records) if refits else None
        if not refits:
            with one_change(opened):
                done = opened.redo(list(cost.ids))
    if refits:
        with with_model(folder, loading) as opened, one_change(opened):
            done = opened.redo(list(cost.ids), pool=learned)
    _print_undone(console, folder, "acting again", done, as_json)


_ALONE = "the other edits stay as they are"


def _count(ids: Sequence[int]) -> str:
    return f"{len(ids)} edit{'' if len(ids) == 1 else 's'}"


def _named(opened: Ledger, ids: Sequence[int]) -> str:
    """The first of some edits by what they ask for."""
    shown = listed(opened.contents, ids[:3])
    told = ", ".join(f"{each.id} ({one_line(each.prompt):.60} -> {one_line(each.target):.40})" for each in shown)
    return told + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _steps(opened: Ledger, ids: Sequence[int]) -> str:
    outcomes = [each.outcome for each in listed(opened.contents, ids)]
    return f"which took {sum(each.steps for each in outcomes if each is not None):,} steps"


def _agree(yes: bool, refits: bool) -> None:
    """Ask on a terminal whether to go on; elsewhere what takes work is done only where that was said.

    Raises:
        ValueError: nobody can be asked. typer.Exit: the answer was no. Ended: stopped by a signal.
    """
    if yes:
        return
    if not is_terminal():
        if refits:
            raise ValueError("--yes: edits are fitted again where that was agreed to (got no --yes, and no terminal)")
        return
    try:
        agreed = typer.confirm("go on?", err=True)
    except typer.Abort as stopped:
        raise Ended("stopped; the ledger is as it was", STOPPED) from stopped
    if not agreed:
        tell("nothing was changed")
        raise typer.Exit(1)


def is_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin is not None and sys.stdin.isatty()


def _print_undone(console: Console, folder: Path, action: str, done: Undone, as_json: bool) -> None:
    if as_json:
        print_document(
            {
                "ledger": str(folder), "ids": list(done.ids), "refitted": list(done.refitted), "kept": list(done.kept),
                "lost": [lost_document(each) for each in done.lost], "event": done.event,
            }
        )  # fmt: skip
        return
    print_lines(console, f"{action}: {done} (event {done.event})")
    if done.lost:
        rows = [(each.edit, each.request.prompt, each.request.target, each.answer) for each in done.lost]
        console.print(text_table("do not hold any more", ("id", "prompt", "target", "answer"), rows))
