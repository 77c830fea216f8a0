"""``fastedit report``: a page about saved runs, and answers before and after on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import RenderableType

import fastedit
from fastedit.cli.app import console
from fastedit.cli.documents import text_table
from fastedit.cli.options import Format, Images, require_known
from fastedit.engine import Run
from fastedit.progress import progress
from fastedit.report import REPORT, saved_page, write_page

#: Edits that are shown on the terminal, and characters of a text.
EXAMPLES, _LONGEST = 3, 60


def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or of comparisons")],
    out: Annotated[Path, typer.Option(help="file for the page")] = Path("runs") / REPORT,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the records that were edited, for their pictures: a file or an embedded set"),
    ] = None,
    format: Format = None,
    images: Images = None,
) -> None:
    """A page about a saved run, or one that compares several; it opens in a browser and loads nothing."""
    requests: Sequence[fastedit.EditRequest] = ()
    if data is not None:
        require_known(data, None)
        with progress(f"reading {data}", 0):
            requests = fastedit.read_edits(data, format=format, images=images)
    page = saved_page(runs, out, requests)
    out.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"report, for a browser: {write_page(out, page)}", soft_wrap=True, markup=False)


def examples(run: Run) -> RenderableType | None:
    """The first edits of a run with their answers before and after; None where it was not scored."""
    rows = []
    for scores in run.edit_scores[:EXAMPLES]:
        for answer in scores.answers:
            if answer["score"] == "reliability":
                rows.append([_short(answer[part]) for part in ("prompt", "wanted", "before", "after")])
    left = len(run.deltas) - len(rows)
    title = "answers before and after" + (f", the first {len(rows)} edits" if left > 0 else "")
    return text_table(title, ("question", "wanted", "before", "after"), rows) if rows else None


def _short(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
