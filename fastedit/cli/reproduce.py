"""``fastedit reproduce``: a row of the tables run anew, beside what was published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from fastedit.cli.app import console, tell
from fastedit.cli.options import BatchSize, Limit, Seed, Threads, parse_batch_size

if TYPE_CHECKING:
    from fastedit.published import Reproduction


def reproduce(
    row: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="a row of docs/results.md, single/pocket-llava/pocket-vqa/lora; its names if absent"),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = "64",
    seed: Seed = 0,
    artifacts: Annotated[Path, typer.Option(help="folder of trained parts; what is not there is trained")] = Path(
        "runs/reproduce/artifacts"
    ),
    threads: Threads = None,
) -> None:
    """Run one row of the published tables anew and say whether it falls in the published interval; exit 1 if not."""
    if row is None:
        list_rows(console)
        return
    size = parse_batch_size(batch_size)
    if isinstance(size, str):
        raise ValueError(f"--batch-size: a row is run with a number (got --batch-size {batch_size})")
    from fastedit.published import reproduce as run_row
    from fastedit.published import row_named

    edits = row_named(row).case.edits
    tell(f"{row}: {min(edits, limit or edits)} of {edits} edits")
    result = run_row(row, limit=limit, batch_size=size, seed=seed, artifacts=artifacts)
    print_reproduction(console, result)
    if not result.holds:
        raise typer.Exit(1)


def list_rows(to: Console) -> None:
    """Names of the published rows with their number of edits, one line each."""
    from fastedit.published import published_rows

    for name, row in published_rows().items():
        to.print(f"{name}  ({row.case.edits} edits)", markup=False, highlight=False, soft_wrap=True)


def print_reproduction(to: Console, result: Reproduction) -> None:
    """Every compared score beside the published one, and the verdict in a sentence."""
    from fastedit.cli.tables import HEADINGS, titled

    shown, table = titled(result.row.case.name, ("score", "published", "measured", "holds"))
    for each in result.comparisons:
        published = f"{each.published.mean:.3f} ({each.published.low:.3f} to {each.published.high:.3f})"
        table.add_row(
            HEADINGS.get(each.name, each.name), published, f"{each.measured.mean:.3f}", "yes" if each.holds else "NO"
        )
    to.print(shown)
    missed = [each.name for each in result.comparisons if not each.holds]
    count = len(result.comparisons)
    verdict = f"all {count} scores are reproduced" if not missed else f"not reproduced: {', '.join(missed)}"
    run, of = len(result.run.deltas), result.row.case.edits
    rule = "each mean lies within the published 95 % interval" if run == of else "the 95 % intervals meet"
    to.print(f"{verdict} ({run} of {of} edits; a score holds where {rule})", markup=False, soft_wrap=True)
