"""The outcomes of ``quality.py`` as Markdown tables and as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.quality_cases import DATA, EVERY_SET, FIVE, MODELS, SCORES
from benchmarks.quality_outcomes import (
    COMPARED,
    HEADINGS,
    Outcome,
    differences,
    load_outcomes,
    mean_of_five,
    named,
    of,
    pairs,
    score,
    seconds_of,
)
from benchmarks.quality_verdicts import over_methods, verdicts
from fastedit.evaluation import Score, bootstrap

#: Scores that are asked in unseen wording as well, and the questions that are closest to an edit's own.
REWORDED = ("text_generality", "image_generality", "text_locality", "image_locality", "near", "same")
CLOSEST = ("polite", "sibling", "negated", "contrary")

__all__ = [
    "Outcome",
    "differences",
    "load_outcomes",
    "markdown",
    "named",
    "of",
    "pairs",
    "rows_of",
    "score",
    "verdicts",
]


def markdown(
    outcomes: Sequence[Outcome], pictures: Mapping[str, str], first: Sequence[str] = (), further: Sequence[str] = ()
) -> str:
    """The document.

    Args:
        outcomes: of ``quality.py``. pictures: paths by name. first: lines that stand before how the numbers were made.
        further: lines behind the differences.
    """
    lines = ["# Results", "", *first, *(["## How the numbers are made", ""] if first else []), *_how(outcomes), ""]
    if verdicts(outcomes):
        lines += ["## What was aimed at", "", "| aim | reached | measured |", "|---|---|---|"]
        lines += [f"| {aim} | {'yes' if reached else 'no'} | {told} |" for aim, reached, told in verdicts(outcomes)]
        lines.append("")
    for title, group in _groups(of(outcomes, "single")):
        lines += [f"## Single edits: {title}", "", *_score_table(group), "", *_wording_table(group)]
        lines += [*_legacy_table(group), ""]
    lines += [*_difference_tables(outcomes), *further]
    for table, heading in (("sequential", "In sequence"), ("cross-task", "Across tasks")):
        for title, group in _groups(of(outcomes, table)):
            lines += [f"## {heading}: {title}", "", *_sequence_table(group), ""]
    for table in sorted({o["case"]["table"] for o in outcomes if o["case"]["table"].startswith("ablation")}):
        group = of(outcomes, table)
        lines += [f"## Parts of {table.removeprefix('ablation-')}", "", *_score_table(group, "variant"), ""]
        lines += _brute_force(group)
    lines += _rates(outcomes)
    if pictures:
        lines += ["## Pictures", ""]
        for name, path in pictures.items():
            lines += [f"![{name}]({path})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _how(outcomes: Sequence[Outcome]) -> list[str]:
    notes = outcomes[0]["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in notes["versions"].items())
    commits = sorted({str(o["provenance"]["commit"])[:12] for o in outcomes})
    return [
        "Made by `python benchmarks/quality.py`; nothing here is typed in. Means over edits with 95 % bootstrap "
        "intervals; where all edits score alike an interval has no width, and no failure among n edits still allows a "
        "rate of 3/n. The strict protocol compares generated answers; `near` is the edit's question about another "
        "image, `same` another question about the edit's image, both must stay. Trained parts and pools come from the "
        "train split, edits from the eval split. Seconds an edit are processor seconds of one out of a batch of 16 on "
        "one thread, without scores; those marked AVX2, of a machine with nothing wider, compare with no others. "
        "Training is wall time on one thread of a machine that ran other cases beside; "
        "memory is the peak of a process that fits and scores 64 edits at a time and does nothing else.",
        "",
        f"Versions: {versions}. Commits: {', '.join(commits)}.",
        "",
        "What is not here was not measured on the weights that are shipped now. All methods, sequences, edits across "
        "tasks and parts taken away were, on earlier ones: [Results on the weights of before](results-before.md).",
    ]


def _groups(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome["case"]
        found.setdefault(f"{case['data']} on {case['model']}, {case['edits']} edits", []).append(outcome)
    titles = sorted(found, key=lambda title: _place(found[title][0]["case"]))
    return [(title, sorted(found[title], key=_order)) for title in titles]


def _place(case: Mapping[str, Any]) -> tuple[int, int]:
    """Sets and models in the order in which they run, others behind."""
    data = DATA.index(case["data"]) if case["data"] in DATA else len(DATA)
    return data, MODELS.index(case["model"]) if case["model"] in MODELS else len(MODELS)


def _order(outcome: Outcome) -> tuple[str, int]:
    method = outcome["case"]["method"]
    return method.rpartition("+")[2], len(method)


def _score_table(group: Sequence[Outcome], heading: str = "method") -> list[str]:
    lines = [
        "| "
        + " | ".join([heading, *(HEADINGS[name] for name in SCORES), "mean of five", "s/edit", "training", "MiB"])
        + " |",
        "|---" * (len(SCORES) + 5) + "|",
    ]
    for outcome in group:
        timing = outcome["timing"]
        train = "" if timing["train_s"] is None else f"{timing['train_s']:.0f} s"
        cells = [_cell(score(outcome, name)) for name in SCORES]
        cells += [f"{mean_of_five(outcome):.3f}", seconds_of(outcome), train]
        memory = "" if timing["peak_memory_mib"] is None else f"{timing['peak_memory_mib']:.0f}"
        lines.append("| " + " | ".join([named(outcome), *cells, memory]) + " |")
    return lines


def _wording_table(group: Sequence[Outcome]) -> list[str]:
    """Seen beside unseen wording, and the questions that are closest to an edit; nothing where none was asked."""
    names = [name for name in REWORDED if any(score(o, f"{name}_unseen") for o in group)]
    close = [name for name in CLOSEST if any(score(o, name) for o in group)]
    if not names:
        return []
    lines = [
        "Seen / unseen wording, and the closest questions: `polite` must change, `sibling` (another object of the "
        "picture), `negated` and `contrary` must stay. Each is asked where the unedited model answers it rightly.",
        "",
        "| method | " + " | ".join([*(HEADINGS[name] for name in names), *close]) + " |",
        "|---" * (1 + len(names) + len(close)) + "|",
    ]
    for outcome in group:
        cells = [
            " / ".join(_mean_text(score(outcome, each)) or "-" for each in (name, f"{name}_unseen")) for name in names
        ]
        cells += [_mean_text(score(outcome, name)) for name in close]
        lines.append("| " + " | ".join([named(outcome), *cells]) + " |")
    return [*lines, ""]


def _legacy_table(group: Sequence[Outcome]) -> list[str]:
    names = (*FIVE, "text_locality_top10", "image_locality_top10")
    titles = [HEADINGS.get(name, name.replace("_locality_top10", "-loc top 10")) for name in names]
    lines = ["Legacy protocol (teacher-forced tokens; locality by argmax and by the ordered ten best):", ""]
    lines += ["| method | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    for outcome in group:
        found = [score(outcome, name, "legacy") for name in names]
        cells = ["" if each is None else f"{each['mean']:.3f}" for each in found]
        lines.append("| " + " | ".join([named(outcome), *cells]) + " |")
    return lines


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.3f}<br><sub>{found['low']:.3f} to {found['high']:.3f}</sub>"


def _difference_tables(outcomes: Sequence[Outcome]) -> list[str]:
    note = "Paired bootstrap, strict protocol; bold: the interval is above zero."
    data = "The control fits the same views: rephrased ones by their NLL, those that must stay by KL. " + note
    lines = _differences(
        "odedit+x minus kl+x: what MMD, total variation and multiplier are worth", outcomes, "kl", data
    )
    return lines + _differences("odedit+x minus x on the same edits", outcomes, "", note)


def _differences(heading: str, outcomes: Sequence[Outcome], against: str, note: str) -> list[str]:
    """Over all pairs of model and set, and by pair; nothing where none was measured."""
    found: dict[str, list[str]] = {}
    beside = pairs(outcomes, against=against)
    for plain, other in sorted(beside, key=lambda pair: (_place(pair[0]["case"]), _order(pair[0]))):
        case, apart = plain["case"], differences(plain, other)
        cells = [_difference(apart[name]) if name in apart else "" for name in COMPARED]
        title = f"{case['data']} on {case['model']}, {case['edits']} edits"
        base = case["method"].rpartition("+")[2]
        found.setdefault(title, []).append(f"| {base} | " + " | ".join(cells) + " |")
    if not found:
        return []
    lines = [f"## {heading}", "", note, ""]
    columns = ["| x | mean of five | near | mean of the six |", "|---|---|---|---|"]
    if len(found) > 1:
        pooled = {name: over_methods(beside, name) for name in COMPARED}
        rows = [
            f"| {base} | " + " | ".join(_difference(pooled[name][base]) for name in COMPARED) + " |"
            for base in sorted(pooled["mean_of_six"])
        ]
        lines += ["### Mean over all pairs of model and set", "", *columns, *rows, ""]
    for title, rows in found.items():
        lines += [f"### {title}", "", *columns, *rows, ""]
    return lines


def _difference(found: Score) -> str:
    text = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return f"**{text}**" if found.low > 0 else text


def _sequence_table(group: Sequence[Outcome]) -> list[str]:
    shown = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality", "near")
    lines = [
        "| method | edits | " + " | ".join(HEADINGS[name] for name in shown) + " | s/edit |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for outcome in group:
        points = [*outcome["checkpoints"].items(), (str(outcome["case"]["edits"]), outcome["scores"])]
        for number, (count, scores) in enumerate(points):
            cells = [_mean_text(scores["strict"].get(name)) for name in shown]
            name = named(outcome) if not number else ""
            seconds = seconds_of(outcome) if number == len(points) - 1 else ""
            lines.append(f"| {name} | {count} | " + " | ".join(cells) + f" | {seconds} |")
    return lines


def _brute_force(group: Sequence[Outcome]) -> list[str]:
    """The best set of layers for each edit, by its own scores, beside sets that are chosen without knowing them."""
    free = [outcome for outcome in group if outcome["case"]["settings"].get("route") is False]
    worth = {outcome["case"]["label"]: outcome["per_edit"]["mean_of_six"] for outcome in free}
    if not set(EVERY_SET) <= set(worth):
        return []
    best = bootstrap([max(values) for values in zip(*(worth[label] for label in EVERY_SET), strict=True)])
    means = {label: bootstrap(values).mean for label, values in worth.items() if label not in EVERY_SET[1:]}
    return [
        "Brute force fits every set of two layers and takes the best for each edit by its scores, which no editor "
        f"knows beforehand: mean of the five and near {best.mean:.3f} ({best.low:.3f} to {best.high:.3f}). Beside it: "
        + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items())
        + ".",
        "",
    ]


def _mean_text(found: Mapping[str, Any] | None) -> str:
    return "" if not found or found["mean"] is None else f"{found['mean']:.3f}"


def _rates(outcomes: Sequence[Outcome]) -> list[str]:
    routed = [o for o in outcomes if o["rates"] and o["case"]["table"] in ("single", "sequential")]
    if not routed:
        return []
    names = sorted({name for outcome in routed for name in outcome["rates"]})
    lines = ["## What routers let through", "", "Share of questions of a kind on which an edit acted.", ""]
    lines += ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for outcome in routed:
        cells = [_mean_text(outcome["rates"].get(name)) for name in names]
        lines.append(f"| {outcome['case']['name']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row a case: scores and checkpoints as [mean, low, high, n], differences to x, seconds, memory, provenance."""
    plain, controls = (
        {id(other): (own, differences(own, other)) for own, other in pairs(outcomes, against=against)}
        for against in ("", "kl")
    )
    rows = []
    for outcome in outcomes:
        row = {
            "case": outcome["case"],
            **({"weights": outcome["weights"]} if "weights" in outcome else {}),
            "scores": _compact(outcome["scores"]),
            "checkpoints": {count: _compact(scores) for count, scores in outcome["checkpoints"].items()},
            "rates": {name: _interval(found) for name, found in outcome["rates"].items()},
            "mean_of_five": mean_of_five(outcome),
            "timing": {name: value for name, value in outcome["timing"].items() if name != "seconds"},
            "provenance": outcome["provenance"],
        }
        for key, known in (("minus", plain), ("minus_control", controls)):
            if id(outcome) in known:
                own, apart = known[id(outcome)]
                row[key] = {"method": own["case"]["method"], **{k: _interval(asdict(v)) for k, v in apart.items()}}
        rows.append(row)
    return rows


def _compact(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {protocol: {name: _interval(found) for name, found in own.items()} for protocol, own in scores.items()}


def _interval(found: Mapping[str, Any]) -> list[Any]:
    """Mean and bounds to four digits, finer than any of the intervals, and the number of edits."""
    rounded = [None if found[part] is None else float(f"{found[part]:.4g}") for part in ("mean", "low", "high")]
    return [*rounded, found["n"]]
