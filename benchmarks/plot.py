"""Figures from stored rows, and from nothing else; and one page with all of them.

python benchmarks/plot.py rows.json --out runs/figures
python benchmarks/plot.py benchmarks/results/*.jsonl.gz --out runs/figures --html runs/report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import bars, curves, record
from benchmarks.record import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures_of(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows have data for, by file stem."""
    made = {
        "speed": bars.speed(rows),
        "roofline": bars.peak_share(rows),
        "phases": bars.phases(rows),
        "memory": bars.memory(rows),
    }
    found = {name: figure for name, figure in made.items() if figure is not None}
    several = {
        "scaling": curves.scaling(rows),
        "memory": curves.memory_scaling(rows),
        "sweep": bars.sweeps(rows),
        "precision": bars.precisions(rows),
        "endurance": curves.endurance(rows),
    }
    for kind, figures in several.items():
        found |= {name if name.startswith(kind) else f"{kind}-{name}": figure for name, figure in figures.items()}
    return found


def write_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write every figure as a PNG file into a folder, made if needed; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def main(
    files: Annotated[list[Path], typer.Argument(help="stored rows: .jsonl, .jsonl.gz or JSON lists", exists=True)],
    out: Annotated[Path, typer.Option(help="folder for PNG files")] = Path("runs/figures"),
    html: Annotated[Path | None, typer.Option(help="also one self-contained page with all of it")] = None,
) -> None:
    """Draw what stored rows say."""
    try:
        rows = [row for file in files for row in record.read(file)]
    except record.RowError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    figures = figures_of(rows)
    for path in write_figures(figures, out):
        typer.echo(str(path))
    if html is not None:
        from benchmarks.report import write_page

        typer.echo(str(write_page(rows, figures, html)))


if __name__ == "__main__":
    typer.run(main)
