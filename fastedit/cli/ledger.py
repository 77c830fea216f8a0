"""Look at a ledger, ask it, and take its edits out: what the commands do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastedit.cli.documents import (
    edit_document,
    edit_id,
    event_document,
    image_names,
    one_line,
    print_document,
    print_lines,
    text_table,
    verified_document,
)
from fastedit.cli.ledger_model import Loading, one_change, reading, require_ledger, with_model
from fastedit.cli.tables import HEADINGS
from fastedit.data.images import check_image
from fastedit.ledger import DamagedLedger
from fastedit.ledger.history import Shown
from fastedit.ledger.verify import Verified
from fastedit.requests import Query


def print_log(console: Console, folder: Path, *, limit: int | None, edits: bool, as_json: bool) -> None:
    """What was done in a ledger, or the edits that were asked for, the newest last."""
    with reading(folder) as opened:
        shown = opened.edits(limit) if edits else []
        events = [] if edits else opened.history(limit)
        counted, model = len(opened), opened.contents.meta("name")
    if as_json:
        listed: dict[str, Any] = (
            {"edits": [edit_document(each) for each in shown]}
            if edits
            else {"events": [event_document(event) for event in events]}
        )
        print_document({"ledger": str(folder), "model": model, "acting": counted, **listed})
        return
    title = f"{counted} edit{'' if counted == 1 else 's'} act, of {Path(model).name}"
    if edits:
        rows = [(each.id, each.status, each.method, each.prompt, each.target) for each in shown]
        console.print(text_table(title, ("id", "status", "method", "prompt", "target"), rows))
        return
    rows_of_events = [(event.id, event.time[:19], event.action, event.told()) for event in events]
    console.print(text_table(title, ("event", "time", "action", "of"), rows_of_events))


def print_edit(console: Console, folder: Path, edit: str, *, as_json: bool) -> None:
    """All that there is of one edit."""
    with reading(folder) as opened:
        found = opened.show(edit_id(edit))
    if as_json:
        print_document({"ledger": str(folder), **edit_document(found, scores=True)})
        return
    print_lines(console, "\n".join(f"{name:<9}{value}" for name, value in _fields(found).items()))
    for state, scores in list(found.scores.items())[:1]:
        for protocol, values in (("legacy", scores.legacy), ("strict", scores.strict)):
            told = ", ".join(
                f"{HEADINGS[name]} {100 * value:.0f}" for name, value in values.items() if name in HEADINGS
            )
            print_lines(console, f"scores   {protocol}, %: {told} (state {state[:12]})")


def _fields(edit: Shown) -> dict[str, str]:
    fields = {"edit": f"{edit.id}, {edit.name}", "prompt": edit.prompt, "target": edit.target, "status": edit.status}
    fields["method"] = f"{edit.method}, mode {edit.mode}"
    if edit.outcome is not None:
        fields["fit"] = f"{edit.outcome.status} after {edit.outcome.steps} steps"
        fields["versions"] = f"{edit.versions}, the newest from event {edit.since}"
        if edit.until is not None:
            fields["versions"] += f" until {edit.until}"
        fields["delta"] = edit.delta
    return {name: one_line(value) for name, value in fields.items()}


def verify_ledger(console: Console, folder: Path, *, ask: bool, loading: Loading, as_json: bool) -> bool:
    """Check a ledger; returns whether it is sound and, where they were asked, all edits hold."""
    try:
        with reading(folder) as opened:
            found = opened.verify()
        if found.sound and ask:
            with with_model(folder, loading) as opened:
                found = opened.verify(ask=True)
    except DamagedLedger as damage:
        # It cannot even be opened
        found = Verified((str(damage).removeprefix("ledger: "),), 0, 0)
    if as_json:
        print_document({"ledger": str(folder), **verified_document(found)})
    else:
        print_lines(console, str(found))
    return found.sound and not found.lost


def print_ledger_scores(
    console: Console, folder: Path, loading: Loading, spread: Mapping[str, Any], *, as_json: bool
) -> None:
    """Score what acts; a table a protocol."""
    from fastedit.ledger.scoring import score_edits

    require_ledger(folder)
    with with_model(folder, loading) as opened:
        found = score_edits(opened, **spread)
    if as_json:
        scores = {
            protocol: {name: asdict(each) for name, each in table.items()} for protocol, table in found.scores.items()
        }
        print_document({"ledger": str(folder), "edits": len(found.edits), "new": found.new, "scores": scores})
        return
    print_lines(console, f"{len(found.edits)} edits, {found.new} scored now")
    for protocol, table in found.scores.items():
        rows = [(name.replace("_", " "), f"{100 * each.mean:.1f}") for name, each in table.items()]
        console.print(text_table(f"{protocol}, %", ("score", "mean"), rows))


def print_diff(
    console: Console, folder: Path, before: str | None, after: str | None, loading: Loading, *, as_json: bool
) -> None:
    """Which answers differ between two moments."""
    with reading(folder) as opened:
        # An unknown moment is told of before the model is loaded
        for moment in (before, after):
            if moment is not None:
                opened.at(moment)
    with with_model(folder, loading) as opened:
        changes = opened.diff(before, after)
    if as_json:
        listed = [
            {
                "edit": each.edit, "prompt": each.query.prompt, "images": image_names(each.query.image),
                "before": each.before, "after": each.after,
            }
            for each in changes
        ]  # fmt: skip
        print_document({"ledger": str(folder), "before": before, "after": after, "changes": listed})
        return
    moments = ("base model" if before is None else before, "now" if after is None else after)
    rows = [(each.edit or "", each.query.prompt, each.before, each.after) for each in changes]
    title = "1 answer differs" if len(rows) == 1 else f"{len(rows)} answers differ"
    console.print(text_table(title, ("id", "question", *moments), rows))


def print_answers(
    console: Console,
    folder: Path,
    question: str,
    images: Sequence[Path],
    at: str | None,
    loading: Loading,
    *,
    as_json: bool,
) -> None:
    """The base model's answer to a question, and that with the edits, side by side."""
    for image in images:
        check_image(image)
    query = Query(question, None if not images else images[0] if len(images) == 1 else tuple(images))
    with reading(folder) as opened:
        if at is not None:
            opened.at(at)
    with with_model(folder, loading) as opened:
        base, edited = opened.ask(query.prompt, query.image, at=at)
    if as_json:
        named = [str(image) for image in images]
        print_document(
            {"ledger": str(folder), "at": at, "question": question, "images": named, "base": base, "edited": edited}
        )
        return
    console.print(text_table(one_line(question), ("base model", "edited"), [(base, edited)]))


def name_state(console: Console, folder: Path, name: str | None, *, as_json: bool) -> None:
    """Give the present state a name; without one, list those that there are."""
    with reading(folder) as opened:
        if name is None:
            tags = opened.tags()
            if as_json:
                print_document({"ledger": str(folder), "tags": tags})
            else:
                console.print(text_table("states with a name", ("tag", "event"), list(tags.items())))
            return
        with one_change(opened):
            event = opened.tag(name)
        if as_json:
            print_document({"ledger": str(folder), "name": name, "event": event, "acting": len(opened)})
        else:
            print_lines(console, f"{name}: {len(opened)} edits, after event {event}")


def compact_ledger(console: Console, folder: Path, *, as_json: bool) -> None:
    """Write what is of use into few files."""
    with reading(folder) as opened, one_change(opened):
        done = opened.compact()
    if as_json:
        sizes = {
            name: dict(zip(("before", "after"), pair, strict=True))
            for name, pair in (("segments", done.segments), ("bytes", done.bytes))
        }
        print_document({"ledger": str(folder), **sizes, "removed": done.removed})
    else:
        print_lines(console, str(done))


def export_edits(
    console: Console,
    folder: Path,
    kind: str,
    out: Path,
    options: Mapping[str, Any],
    loading: Loading,
    *,
    at: str | None = None,
    as_json: bool,
) -> None:
    """Write what acts, now or as of a tag or an event, for other programs."""
    from fastedit.export import export_function

    require_ledger(folder)
    export_function(kind, options)
    if at is not None:
        with reading(folder) as opened:
            opened.at(at)
    with with_model(folder, loading) as opened:
        done = opened.export(kind, out, at=at, **options)
    if as_json:
        files = [str(file) for file in done.files]
        print_document(
            {
                "ledger": str(folder),
                "at": at,
                "kind": kind,
                "folder": str(done.folder),
                "files": files,
                "report": done.report,
            }
        )
        return
    print_lines(console, f"{kind}: {len(done.files)} files written to {done.folder}")
    for name, value in done.report.items():
        console.print(Text(one_line(f"{name}: {value}"[:400])), soft_wrap=True)
