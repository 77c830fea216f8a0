"""One page with everything that stored rows say: numbers, figures, the machine. No other file is needed to read it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence, Set
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.canvas import speeds
from benchmarks.record import Row, latest
from fastedit.report import Section, saved_page
from fastedit.report.words import LARGE_MODEL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastedit import EditRequest

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem }
p.note { color: #5a6472; margin-top: .2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e4e7ec }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tr.engine td { font-weight: 600 }
svg { width: 100%; height: auto } details { margin-top: 1rem } code { font-size: .9em }
"""
_TITLES = {
    "speed": "Edits per second",
    "roofline": "How near to the machine's best, and where the rest goes",
    "phases": "Where the time goes",
    "memory": "Peak memory",
}
_KINDS = {
    "scaling": "Scaling of",
    "memory": "Memory of",
    "sweep": "Edits per second of",
    "precision": "Scores by precision,",
    "endurance": "A long run,",
}
#: What a figure of a kind shows, where its axes do not say it.
_NOTES = {
    "speed": "In brackets the ratio to the first baseline of the same run. The newest cases; sweeps are below.",
    "roofline": "Dark: necessary operations per second of the engine's editing time. Frame: the matrix-multiply peak "
    "of the same run. Their ratio is the necessary-FLOP utilisation (NFU); beside it, where the time went.",
    "scaling": "NFU below, where it was measured. Bands are p20 to p80 over runs.",
    "memory": "Peak is all that the process (or the device) held; working is what came on top of the loaded model.",
    "precision": "Bars are 95 % intervals over edits.",
    "endurance": "Every point is a tenth of the edits of one run.",
}


def write_page(rows: Sequence[Row], figures: Mapping[str, Figure], path: Path) -> Path:
    """Write the page. Figures are drawn into it; nothing is loaded from elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(rows, figures), encoding="utf-8")
    return path


def page(rows: Sequence[Row], figures: Mapping[str, Figure]) -> str:
    """The page as text.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("report: at least one row (got rows=[])")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fastedit throughput</title>"
        f"<style>{_STYLE}</style></head><body><h1>fastedit throughput</h1>"
        f"{_body(rows, figures, 'h2')}</body></html>\n"
    )


def write_joined_page(
    rows: Sequence[Row], figures: Mapping[str, Figure], runs: Path, path: Path, edits: Sequence[EditRequest] = ()
) -> Path:
    """Write one page with the quality of saved runs and the speed that rows say.

    Args:
        runs: folder of the runs, of ``fastedit compare``. path: of the page. edits: of the runs, for their pictures.
    Raises:
        FileNotFoundError, ValueError: no runs, runs that are not whole, or other edits than theirs.
    """
    section = Section("The engine's speed beside plain loops", _body(rows, figures, "h3"))
    text = saved_page([runs], path, edits, sections=[section])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _body(rows: Sequence[Row], figures: Mapping[str, Figure], heading: str) -> str:
    """Everything below the title; headings of figures are ``heading`` elements."""
    newest = latest(rows)
    small = _small_cases(newest)
    shown = {name: figure for name, figure in figures.items() if name != "roofline" or not small}
    drawn = "".join(
        f"<{heading}>{escape(_title(name))}</{heading}>{_note(name)}{_svg(figure)}" for name, figure in shown.items()
    )
    why = (
        f"<p class='note'>NFU is not shown for {escape(', '.join(sorted(small)))}: on a model this small the time is "
        "overhead, and its share of the peak says nothing. A model this small says whether all works, not how fast the "
        "engine is.</p>"
    )
    return (
        "<p class='note'>The engine beside plain loops on the same edits in the same run. Equal results were checked "
        "before anything was timed. Medians over runs; p20 and p80 beside them. Ratios refer to the case's first "
        f"baseline.</p>{_speed_table(newest, small)}{why if small else ''}{drawn}{_provenance(newest)}"
    )


def _small_cases(rows: Sequence[Row]) -> set[str]:
    """Cases of models whose necessary-FLOP utilisation says nothing."""
    return {row.case for row in rows if row.metric == "parameters" and row.value < LARGE_MODEL}


def _title(name: str) -> str:
    kind, _, rest = name.partition("-")
    return _TITLES.get(name) or f"{_KINDS.get(kind, kind)} {rest}"


def _note(name: str) -> str:
    note = _NOTES.get(name.partition("-")[0]) if name != "memory" else None
    return "" if note is None else f"<p class='note'>{escape(note)}</p>"


def _speed_table(rows: Sequence[Row], small: Set[str]) -> str:
    values = {(row.case, row.implementation, row.metric): row for row in rows}
    if not speeds(rows):
        return ""
    lines = []
    for row in speeds(rows):
        others = [values.get((row.case, row.implementation, metric)) for metric in ("nfu", "peak_memory_mib")]
        cells = [
            escape(row.case),
            escape(row.implementation),
            f"{row.value:.3g}",
            f"{row.p20:.3g} to {row.p80:.3g}",
            "1" if row.ratio is None else f"{row.ratio:.2f}",
            "" if others[0] is None or row.case in small else f"{others[0].value:.3f}",
            "" if others[1] is None else f"{others[1].value:,.0f}",
        ]
        style = " class='engine'" if row.implementation == "engine" else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("case", "implementation", "edits/s", "p20 to p80", "ratio", "NFU", "peak MiB")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(lines)}</table>"


def _svg(figure: Figure) -> str:
    """The figure as inline SVG, text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastedit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    drawing = text[text.index("<svg") :]
    # Fixed sizes give way to the page's width; the view box keeps the shape.
    for size in ("width", "height"):
        drawing = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", drawing, count=1)
    return drawing


def _provenance(rows: Sequence[Row]) -> str:
    """Machine, versions and commit of every run, and the settings of every case."""
    runs = {row.time: row for row in rows}
    parts = []
    for row in runs.values():
        machine = ", ".join(f"{escape(str(k))} {escape(str(v))}" for k, v in row.machine.items())
        versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in row.versions.items())
        settings = ", ".join(f"{escape(k)}={escape(str(v))}" for k, v in row.config.items())
        parts.append(
            f"<p><b>{escape(row.case)}</b>, {escape(row.time)}, commit <code>{escape(row.commit or 'unknown')}</code>"
            f"<br>{machine}<br>{versions}<br>{settings}, seed={row.seed}</p>"
        )
    return f"<details><summary>Provenance</summary>{''.join(parts)}</details>"
