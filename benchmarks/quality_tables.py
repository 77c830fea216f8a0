"""The outcomes of ``quality.py`` as Markdown tables, as rows, and as verdicts on what was aimed at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality_cases import DATA, EVERY_SET, FIVE, MODELS, SCORES, UNFITTED
from fastedit.evaluation import Score, bootstrap, bootstrap_difference

Outcome = dict[str, Any]

HEADINGS: Mapping[str, str] = {
    "reliability": "Rel",
    "text_generality": "T-Gen",
    "image_generality": "M-Gen",
    "text_locality": "T-Loc",
    "image_locality": "M-Loc",
    "near": "near",
    "same": "same",
}
#: Compared between x and odedit+x.
COMPARED = ("mean_of_five", "near", "mean_of_six")


def load_outcomes(folder: Path) -> list[Outcome]:
    """Every outcome of a folder, by name of its case; of the same case the one with the most edits."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.json")):
        outcome = json.loads(path.read_text(encoding="utf-8"))
        name = outcome["case"]["name"]
        if name not in found or outcome["case"]["edits"] > found[name]["case"]["edits"]:
            found[name] = outcome
    return list(found.values())


def score(outcome: Outcome, name: str, protocol: str = "strict") -> dict[str, Any] | None:
    """One score with its interval, or None."""
    found = outcome["scores"].get(protocol, {}).get(name)
    return found if found and found["mean"] is not None else None


def mean_of_five(outcome: Outcome) -> float:
    """Mean over edits of the mean of the five scores."""
    values = [value for value in outcome["per_edit"]["mean_of_five"] if value is not None]
    return sum(values) / len(values)


def differences(plain: Outcome, other: Outcome) -> dict[str, Score]:
    """``other`` minus ``plain`` on the same edits, with intervals (paired bootstrap)."""
    names = [name for name in COMPARED if name in plain["per_edit"] and name in other["per_edit"]]
    return {name: bootstrap_difference(other["per_edit"][name], plain["per_edit"][name]) for name in names}


def pairs(outcomes: Sequence[Outcome], table: str = "single") -> list[tuple[Outcome, Outcome]]:
    """(x, odedit+x) on the same edits."""
    by_key = {(o["case"]["model"], o["case"]["data"], o["case"]["method"]): o for o in of(outcomes, table)}
    found = []
    for (model, data, method), outcome in by_key.items():
        other = by_key.get((model, data, f"odedit+{method}"))
        if other is not None and len(other["per_edit"]["near"]) == len(outcome["per_edit"]["near"]):
            found.append((outcome, other))
    return found


def of(outcomes: Iterable[Outcome], table: str) -> list[Outcome]:
    """The outcomes of a table."""
    return [outcome for outcome in outcomes if outcome["case"]["table"] == table]


def markdown(outcomes: Sequence[Outcome], pictures: Mapping[str, str]) -> str:
    """The document."""
    lines = ["# Results", "", *_how(outcomes), ""]
    if verdicts(outcomes):
        lines += ["## What was aimed at", "", "| aim | reached | measured |", "|---|---|---|"]
        lines += [f"| {aim} | {'yes' if reached else 'no'} | {told} |" for aim, reached, told in verdicts(outcomes)]
        lines.append("")
    for title, group in _groups(of(outcomes, "single")):
        lines += [f"## Single edits: {title}", "", *_score_table(group), "", *_legacy_table(group), ""]
    lines += _difference_tables(outcomes)
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
        "one thread, without scores; training is wall time on one thread of a machine that ran other cases beside; "
        "memory is the peak of a process that fits and scores 64 edits at a time and does nothing else.",
        "",
        f"Versions: {versions}. Commits: {', '.join(commits)}.",
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


def named(outcome: Outcome) -> str:
    """The case's label, or its method."""
    return str(outcome["case"]["label"] or outcome["case"]["method"])


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
        cells += [f"{mean_of_five(outcome):.3f}", f"{timing['seconds_per_edit']:.3f}", train]
        memory = "" if timing["peak_memory_mib"] is None else f"{timing['peak_memory_mib']:.0f}"
        lines.append("| " + " | ".join([named(outcome), *cells, memory]) + " |")
    return lines


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
    found: dict[str, list[str]] = {}
    for plain, other in sorted(pairs(outcomes), key=lambda pair: (_place(pair[0]["case"]), _order(pair[0]))):
        case, apart = plain["case"], differences(plain, other)
        cells = [_difference(apart[name]) if name in apart else "" for name in COMPARED]
        title = f"{case['data']} on {case['model']}, {case['edits']} edits"
        found.setdefault(title, []).append(f"| {case['method']} | " + " | ".join(cells) + " |")
    if not found:
        return []
    lines = [
        "## odedit+x minus x on the same edits",
        "",
        "Paired bootstrap, strict protocol; bold: the interval is above zero.",
        "",
    ]
    for title, rows in found.items():
        lines += [f"### {title}", "", "| x | mean of five | near | mean of the six |", "|---|---|---|---|", *rows, ""]
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
            seconds = f"{outcome['timing']['seconds_per_edit']:.3f}" if number == len(points) - 1 else ""
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


def verdicts(outcomes: Sequence[Outcome]) -> list[tuple[str, bool, str]]:
    """(aim, whether it is reached, what was measured), as far as the outcomes say."""
    chosen = {
        o["case"]["method"]: o
        for o in of(outcomes, "single")
        if (o["case"]["model"], o["case"]["data"]) == ("pocket-llava", "pocket-vqa")
    }
    found: list[tuple[str, bool, str]] = []
    if chosen:
        found.append(_best(chosen))
        found_pairs = pairs(list(chosen.values()))
        gained, apart = _gained(found_pairs, ("mean_of_six",)), _gained(found_pairs, ("mean_of_five", "near"))
        told = f"{len(gained)}: {', '.join(gained)}"
        if apart:
            told += f"; in the five and in near, each by itself: {', '.join(apart)}"
        aim = "odedit+x above x in the mean of the five and near, paired, at least 7"
        found.append((aim, len(gained) >= 7, told))
    if {"unike", "tpatcher"} <= set(chosen):
        ours, theirs = mean_of_five(chosen["unike"]), mean_of_five(chosen["tpatcher"])
        found.append(("UniKE above T-Patcher in the mean of five", ours > theirs, f"{ours:.3f} and {theirs:.3f}"))
    if "ldke" in chosen:
        found.append(_hard(chosen["ldke"]))
    long = [o for o in of(outcomes, "sequential") if o["case"]["edits"] >= 1000]
    if long:
        best = max(long, key=lambda o: min(_value(o, name) for name in ("reliability", *FIVE[3:])))
        values = [_value(best, name) for name in ("reliability", *FIVE[3:])]
        aim = f"after {best['case']['edits']} edits in sequence reliability 0.9, locality 0.95"
        told = f"{named(best)}: {values[0]:.3f}, {values[1]:.3f}, {values[2]:.3f}"
        found.append((aim, values[0] >= 0.9 and min(values[1:]) >= 0.95, told))
    return found


def _best(chosen: Mapping[str, Outcome]) -> tuple[str, bool, str]:
    least = dict(zip(SCORES, (0.98, 0.95, 0.95, 0.95, 0.95, 0.9, 0.9), strict=True))
    best = max(chosen.values(), key=lambda o: min(_value(o, name) - bound for name, bound in least.items()))
    reached = all(_value(best, name) >= bound for name, bound in least.items())
    told = ", ".join(f"{HEADINGS[name]} {_value(best, name):.3f}" for name in SCORES)
    return "one method with Rel 0.98, Gen 0.95, Loc 0.95, near and same 0.9 at once", reached, f"{named(best)}: {told}"


def _gained(found: Sequence[tuple[Outcome, Outcome]], names: Sequence[str]) -> list[str]:
    """Methods x whose odedit+x is better in each of these, the interval above zero."""
    gained = []
    for plain, other in found:
        if plain["case"]["method"] in UNFITTED:
            continue
        apart = differences(plain, other)
        if all(name in apart and apart[name].low > 0 for name in names):
            gained.append(plain["case"]["method"])
    return sorted(gained)


def _hard(outcome: Outcome) -> tuple[str, bool, str]:
    hard = [number for number, tags in enumerate(outcome["tags"]) if "hard" in tags]
    values = [outcome["per_edit"]["image_locality"][number] for number in hard]
    present = [value for value in values if value is not None]
    locality = sum(present) / len(present) if present else float("nan")
    generality = min(_value(outcome, "text_generality"), _value(outcome, "image_generality"))
    told = f"{locality:.3f} on {len(present)} hard questions, generality {generality:.3f}"
    return "LDKE-style: locality 0.98 on hard negatives, generality 0.9", locality >= 0.98 and generality >= 0.9, told


def _value(outcome: Outcome, name: str) -> float:
    found = score(outcome, name)
    return 0.0 if found is None else float(found["mean"])


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row a case: scores and checkpoints as [mean, low, high, n], differences to x, seconds, memory, provenance."""
    plain = {id(other): (own, differences(own, other)) for own, other in pairs(outcomes)}
    rows = []
    for outcome in outcomes:
        row = {
            "case": outcome["case"],
            "scores": _compact(outcome["scores"]),
            "checkpoints": {count: _compact(scores) for count, scores in outcome["checkpoints"].items()},
            "rates": {name: _interval(found) for name, found in outcome["rates"].items()},
            "mean_of_five": mean_of_five(outcome),
            "timing": {name: value for name, value in outcome["timing"].items() if name != "seconds"},
            "provenance": outcome["provenance"],
        }
        if id(outcome) in plain:
            own, apart = plain[id(outcome)]
            row["minus"] = {"method": own["case"]["method"], **{k: _interval(asdict(v)) for k, v in apart.items()}}
        rows.append(row)
    return rows


def _compact(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {protocol: {name: _interval(found) for name, found in own.items()} for protocol, own in scores.items()}


def _interval(found: Mapping[str, Any]) -> list[Any]:
    """Mean and bounds to four digits, finer than any of the intervals, and the number of edits."""
    rounded = [None if found[part] is None else float(f"{found[part]:.4g}") for part in ("mean", "low", "high")]
    return [*rounded, found["n"]]
