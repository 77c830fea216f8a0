"""A published row run anew, and whether it falls within what was published."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel, load, weights_hash
from fastedit.engine import Run, edit
from fastedit.evaluation import Score
from fastedit.published.case import Case, arguments, records, trained_part
from fastedit.published.rows import PublishedRow, published_rows

#: Strict scores that are compared, where a row has them.
COMPARED = (
    "reliability", "text_generality", "text_generality_unseen", "image_generality", "text_locality", "image_locality",
    "near", "same", "sibling", "polite", "portability",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """One score beside the published one."""

    name: str
    published: Score
    measured: Score
    #: fewer edits were run than the row has, so both have an interval that counts
    partial: bool

    @property
    def holds(self) -> bool:
        """Whether it was reproduced.

        All edits run: the mean lies within the published interval. Where that has no width, because all edits scored
        alike, it is as wide as no failure among n edits allows: 3/n (the rule of three). Fewer edits run: both
        intervals, widened so, meet.
        """
        low, high = _widened(self.published)
        if not self.partial:
            return low <= self.measured.mean <= high
        other_low, other_high = _widened(self.measured)
        return other_low <= high and low <= other_high


def _widened(score: Score) -> tuple[float, float]:
    if score.high > score.low:
        return score.low, score.high
    return score.low - 3.0 / score.n, score.high + 3.0 / score.n


@dataclass(frozen=True)
class Reproduction:
    """A row, the run that measured it anew, and their scores side by side."""

    row: PublishedRow
    run: Run
    comparisons: tuple[Comparison, ...]

    @property
    def holds(self) -> bool:
        """Whether every compared score was reproduced."""
        return all(comparison.holds for comparison in self.comparisons)


def row_named(name: str) -> PublishedRow:
    """Return a published row.

    Raises:
        ValueError: there is none of this name; the message names some that are close.
    """
    rows = published_rows()
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.3) or list(rows)[:3]
        raise ValueError(f"reproduce: row must name a published row, for example {', '.join(near)} (got row={name!r})")
    return rows[name]


def reproduce(
    name: str,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    artifacts: Path = Path("runs/reproduce/artifacts"),
    show_progress: bool = True,
) -> Reproduction:
    """Run one row of ``docs/results.md`` anew: load, train what is to be trained, edit, score, compare.

    Args:
        name: of the row: "single/pocket-llava/pocket-vqa/lora"; see `published_rows`.
        limit: only the first so many edits of it (a sequence's checkpoints are then scored up to there).
        batch_size: edits fitted together; results are those of any other size but for rounding.
        seed: of what is drawn; rows were measured with 0.
        artifacts: folder of trained parts; what is not there is trained on the train split, once.
        show_progress: show a progress bar.
    Returns:
        The run and its scores beside the published ones.
    Raises:
        ValueError: no such row, a limit below 1, or a row that was measured on other weights than the model has now.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "show_progress": show_progress}
    return run_again(row_named(name), limit=limit, artifacts=artifacts, **options)


def run_again(
    row: PublishedRow, *, limit: int | None, batch_size: int, seed: int, artifacts: Path, show_progress: bool
) -> Reproduction:
    """Run a row that was measured before, and compare. Arguments and errors as for `reproduce`."""
    if limit is not None and limit < 1:
        raise ValueError(f"reproduce: limit must be positive (got limit={limit})")
    count = min(row.case.edits, limit or row.case.edits)
    case = replace(row.case, edits=count, score_at=tuple(gap for gap in row.case.score_at if gap < count))
    model = load(case.model)
    weights = weights_hash(model.hf)
    if weights != row.weights:
        raise ValueError(
            f"reproduce: {case.model} must have the weights that the row was measured on "
            f"(got SHA-256 {weights[:12]}, the row has {row.weights[:12]})"
        )
    run = run_case(model, case, batch_size=batch_size, seed=seed, artifacts=artifacts, show_progress=show_progress)
    partial = count < row.case.edits
    return Reproduction(row, run, tuple(_compared(row, run, COMPARED, partial=partial)))


def run_case(
    model: EditableModel, case: Case, *, batch_size: int, seed: int, artifacts: Path, show_progress: bool
) -> Run:
    """Make the edits of a case and score them. Arguments as for `reproduce`."""
    edits, pool = records(case.data, "eval", case.edits), records(case.data, "train", None)
    trained = trained_part(case, model, pool, artifacts, show_progress=show_progress)
    return edit(
        model, edits, case.method, batch_size=batch_size, mode=case.mode, score_at=case.score_at,
        show_progress=show_progress, **arguments(case, pool, trained, seed),
    )  # fmt: skip


def _compared(row: PublishedRow, run: Run, names: Iterable[str], *, partial: bool) -> Iterable[Comparison]:
    published, measured = row.scores["strict"], run.scores["strict"]
    for name in names:
        if name in published and name in measured:
            yield Comparison(name, published[name], measured[name], partial)
