"""What commands say about a ledger: documents for scripts, tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console, Group
from rich.text import Text

from fastedit.cli.tables import titled
from fastedit.engine.run import plain
from fastedit.ledger.history import Event, Shown
from fastedit.ledger.verify import NotHeld, Verified
from fastedit.requests import VisualSource, images_of


def print_document(content: Mapping[str, Any]) -> None:
    """Print one JSON document, in ASCII: no terminal changes it."""
    typer.echo(json.dumps(plain(content), indent=2))


def one_line(text: str) -> str:
    """A text on one line, its control characters as escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def text_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Group:
    """A table of texts, which are folded where there is no room."""
    shown, table = titled(title, headings, left=len(headings))
    for row in rows:
        table.add_row(*(Text(one_line(str(value))) for value in row))
    return shown


def print_lines(console: Console, text: str) -> None:
    """Print lines as they are, whatever is in them."""
    for line in text.splitlines():
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def edit_id(text: str) -> int | str:
    """An edit as it is typed: its number, or the id of its request."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text


def event_document(event: Event) -> dict[str, Any]:
    """An event as plain values."""
    return asdict(event)


def edit_document(edit: Shown, *, scores: bool = False) -> dict[str, Any]:
    """An edit as plain values; its request and scores where these were looked up."""
    content = asdict(edit)
    if not scores:
        del content["scores"], content["request"]
    return content


def lost_document(lost: NotHeld) -> dict[str, Any]:
    """An edit that does not hold, as plain values."""
    request = lost.request
    return {
        "edit": lost.edit, "name": request.id, "prompt": request.prompt, "target": request.target,
        "answer": lost.answer,
    }  # fmt: skip


def verified_document(found: Verified) -> dict[str, Any]:
    """What a look at a ledger found, as plain values."""
    return {
        "sound": found.sound, "problems": list(found.problems), "files": found.files, "edits": found.edits,
        "asked": found.asked, "lost": [lost_document(each) for each in found.lost],
    }  # fmt: skip


def image_names(visual: VisualSource | None) -> list[str]:
    """Images of a ledger's question, by path."""
    return [str(source) for source in images_of(visual)]
