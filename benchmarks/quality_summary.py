"""The half page before the tables: what to use when, eight methods side by side, one picture. All of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_cases import DATA, MODELS
from benchmarks.quality_outcomes import seconds_of, unlabelled
from benchmarks.quality_tables import Outcome, named, of, score

#: Side by side, in this order.
EIGHT = ("lora", "kl+lora", "odedit+lora", "unike", "wise", "grace", "serac", "ldke")
#: The pair of set and model that is shown: the first of these that all eight were measured on, else the fullest.
PAIRS = (("icon-vqa", "smol-llava"), (DATA[0], MODELS[0]))
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "the edit": ("reliability",),
    "other words, seen": ("text_generality",),
    "other words, unseen": ("text_generality_unseen",),
    "another picture of it": ("image_generality",),
    "unrelated stays": ("text_locality", "image_locality"),
    "same question, other picture stays": ("near",),
    "same picture, other question stays": ("same", "sibling"),
}
GENERAL = ("reliability", "text_generality", "text_generality_unseen", "image_generality")
LOCAL = ("text_locality", "image_locality", "near", "same", "sibling")
#: Deltas of these are plain changes of weights: merged, exported, served without fastedit.
MERGED = ("ft", "lora", "ft-vision")
#: Least locality of a method that is recommended for its generality.
LEAST = 0.95
#: Least mean of what must change of a method that is recommended for its speed.
LEAST_GENERAL = 0.9


def summary(outcomes: Sequence[Outcome], pictures: Mapping[str, str]) -> list[str]:
    """Lines of Markdown; none without single edits.

    Args:
        outcomes: of ``quality.py``. pictures: paths by name, as ``quality_figures.draw`` names them.
    """
    group = shown_pair(outcomes)
    if not group:
        return []
    case = group[0]["case"]
    title = f"{case['data']} on {case['model']}"
    long = [o for o in of(outcomes, "sequential") if len(o["checkpoints"]) > 1]
    lines = ["## In short", "", *_advice(group, long), "", *_table(group, long), ""]
    lines += [f"{title}, {case['edits']} edits, strict protocol, means.", ""]
    picture = pictures.get(f"trade-off, {title}")
    return [*lines, f"![trade-off, {title}]({picture})", ""] if picture else lines


def shown_pair(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The single edits of one pair of set and model."""
    by_pair: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in unlabelled(of(outcomes, "single")):
        by_pair.setdefault((outcome["case"]["data"], outcome["case"]["model"]), []).append(outcome)
    for pair in PAIRS:
        if set(EIGHT) <= {o["case"]["method"] for o in by_pair.get(pair, [])}:
            return by_pair[pair]
    return max(by_pair.values(), key=len, default=[])


def _mean(outcome: Outcome, names: Sequence[str], scores: Mapping[str, Any] | None = None) -> float | None:
    """Mean of those of the scores that there are."""
    if scores is None:
        found = [score(outcome, name) for name in names]
    else:
        found = [scores["strict"].get(name) for name in names]
    values = [each["mean"] for each in found if each is not None and each["mean"] is not None]
    return sum(values) / len(values) if values else None


def _known(outcome: Outcome, names: Sequence[str]) -> float:
    return _mean(outcome, names) or 0.0


def _table(group: Sequence[Outcome], long: Sequence[Outcome]) -> list[str]:
    by_method = {outcome["case"]["method"]: outcome for outcome in group}
    after = {o["case"]["method"]: o for o in long if not o["case"]["label"]}
    columns = {name: scores for name, scores in COLUMNS.items() if any(_mean(o, scores) is not None for o in group)}
    count = max((o["case"]["edits"] for o in after.values()), default=0)
    headings = ["method", *columns, *([f"holds after {count} in sequence"] if count else []), "s/edit"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name in EIGHT:
        if name not in by_method:
            continue
        outcome = by_method[name]
        cells = [_text(_mean(outcome, scores)) for scores in columns.values()]
        if count:
            sequence = after.get(name)
            same = sequence is not None and sequence["case"]["edits"] == count
            cells.append(_text(_mean(sequence, ("reliability",))) if sequence is not None and same else "")
        lines.append(f"| {name} | " + " | ".join([*cells, seconds_of(outcome)]) + " |")
    return lines


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _advice(group: Sequence[Outcome], long: Sequence[Outcome]) -> list[str]:
    lines = []
    merged = [o for o in group if o["case"]["method"].rpartition("+")[2] in MERGED]
    if merged:
        best = _best(merged, lambda o: _known(o, GENERAL) + _known(o, LOCAL))
        lines.append(f"* **Changes of weights that are to be merged or exported:** {_told(best)}.")
    careful = [o for o in group if _known(o, LOCAL) >= LEAST]
    if careful:
        best = _best(careful, lambda o: _known(o, GENERAL))
        lines.append(f"* **Edits that must touch nothing else:** {_told(best)}.")
    if long:
        count = max(o["case"]["edits"] for o in long)
        best = _best([o for o in long if o["case"]["edits"] == count], lambda o: _known(o, GENERAL) + _known(o, LOCAL))
        lines.append(f"* **Thousands of edits in one model** ({count} in sequence): {_told(best)}.")
    fast = [o for o in group if o["timing"]["train_s"] is None and _known(o, GENERAL) >= LEAST_GENERAL]
    if fast:
        best = _best(fast, lambda o: -o["timing"]["seconds_per_edit"])
        lines.append(f"* **Least time, nothing trained before:** {_told(best)}, {seconds_of(best)} s an edit.")
    return lines


def _best(group: Sequence[Outcome], worth: Callable[[Outcome], float]) -> Outcome:
    return max(group, key=worth)


def _told(outcome: Outcome) -> str:
    return f"`{named(outcome)}` (must change {_known(outcome, GENERAL):.3f}, must stay {_known(outcome, LOCAL):.3f})"
