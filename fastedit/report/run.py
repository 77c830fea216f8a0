"""The page of one run: what was edited, how well, how fast, and every answer that one may want to look at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastedit.report.colours import method_colours
from fastedit.report.curve import forgetting_curve
from fastedit.report.gallery import chosen_numbers, holds, is_failed, is_right, make_card, must_change
from fastedit.report.page import render
from fastedit.report.pictures import Pictures
from fastedit.report.scores import score_rows, unedited_scores
from fastedit.report.words import (
    NFU,
    NFU_MEANING,
    STATUSES,
    count_of,
    machine_words,
    method_words,
    nfu_words,
    phase_meaning,
    seconds_words,
)
from fastedit.requests import EditRequest

_MODES = {
    "single": "Every edit was made and asked alone, on the unedited model.",
    "sequential": "Edits accumulated in order, and all were asked after the last.",
}


def run_page(record: Mapping[str, Any], requests: Sequence[EditRequest] = ()) -> str:
    """The page of a run, with nothing that it would have to load.

    Args:
        record: of the run, ``Run.record()``, or what its ``scores.json`` holds.
        requests: the edits of the run, in order, for their pictures; without them there are none.
    """
    edits, provenance = record["edits"], record["provenance"]
    method = str(provenance.get("method", "an unknown method"))
    pictures = Pictures()
    numbers = chosen_numbers([is_failed(edit) for edit in edits])
    cards = [make_card(n, edits[n], requests[n] if n < len(requests) else None, pictures) for n in numbers]
    unedited = unedited_scores(edits, int(provenance.get("seed", 0)))
    colours = method_colours([method])
    runs = {method: record["scores"]}
    counts = outcome_counts(edits)
    return render("run.html", {
        "title": headline(counts, method, model_name(record)),
        "lead": lead(record, counts),
        "tiles": tiles(record, counts),
        "strict": score_rows(runs, "strict", colours, unedited),
        "legacy": score_rows(runs, "legacy", colours),
        "cards": cards,
        "n_edits": len(edits),
        "pictures": pictures,
        "curve": forgetting_curve(record),
        "phases": phases(record["timing"]["seconds"]),
        "nfu": (NFU, NFU_MEANING, nfu_words(record["timing"]["nfu"], model_of(record).get("parameters"))),
        "method_words": method_words(method),
        "method": method,
        "statuses": [(STATUSES.get(name, name), n) for name, n in Counter(e["status"] for e in edits).most_common()],
        "provenance": provenance_rows(provenance),
    })  # fmt: skip


def outcome_counts(edits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many edits there are, were asked and hold; of other questions how many must stay, and did."""
    answers = [answer for edit in edits for answer in edit.get("answers", ())]
    own = [answer for answer in answers if answer["score"] == "reliability"]
    kept = [answer for answer in answers if not must_change(answer)]
    return {
        "edits": len(edits),
        "asked": sum(holds(edit) is not None for edit in edits),
        "held": sum(holds(edit) is True for edit in edits),
        "before": sum(is_right({**answer, "after": answer["before"]}) for answer in own),
        "kept": sum(map(is_right, kept)),
        "must_stay": len(kept),
    }


def headline(counts: Mapping[str, int], method: str, model: str) -> str:
    """What came of a run, in one line."""
    if not counts["asked"]:
        return f"{count_of(counts['edits'], 'edit')} of {model} by {method}, not scored"
    return f"{counts['held']:,} of {count_of(counts['asked'], 'edit')} of {model} hold, made by {method}"


def lead(record: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    """The sentences below the headline."""
    provenance, timing = record["provenance"], record["timing"]
    sentences = []
    finished = provenance.get("finished")
    if finished:
        sentences.append(
            f"The run ended early: {counts['edits']:,} of {count_of(finished['of'], 'edit')} are finished."
        )
    if counts["asked"]:
        share = f"{counts['held'] / counts['asked']:.0%}"
        sentences.append(
            f"Asked again, {counts['held']:,} of {count_of(counts['asked'], 'edit')} ({share}) got the new answer; "
            f"before the edit {counts['before']:,} did."
        )
    if counts["must_stay"]:
        share = f"{counts['kept'] / counts['must_stay']:.1%}"
        sentences.append(
            f"Of {count_of(counts['must_stay'], 'other question')} that must be answered as before, "
            f"{counts['kept']:,} ({share}) were."
        )
    mode = provenance.get("run", {}).get("mode")
    sentences += [_MODES[mode]] if mode in _MODES else []
    spent = editing_seconds(timing["seconds"])
    if timing["edits_per_s"]:
        machine = machine_words(provenance.get("machine", {}))
        sentences.append(f"Editing took {seconds_words(spent)}, {speed(timing)} edits a second, on {machine}.")
    return sentences


def tiles(record: Mapping[str, Any], counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Numbers that stand out, with what they are."""
    timing = record["timing"]
    shown = [(f"{counts['edits']:,}", "edits")]
    if counts["asked"]:
        shown.append((f"{100 * counts['held'] / counts['asked']:.1f} %", "hold"))
    if counts["must_stay"]:
        shown.append((f"{100 * counts['kept'] / counts['must_stay']:.1f} %", "of other answers kept"))
    if timing["edits_per_s"]:
        shown.append((speed(timing), "edits a second"))
    if timing["peak_memory_mib"]:
        shown.append((f"{timing['peak_memory_mib']:,.0f} MiB", "peak memory"))
    return shown


def speed(timing: Mapping[str, Any]) -> str:
    """Edits per second, in three digits."""
    value = float(timing["edits_per_s"])
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def editing_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of everything but scoring."""
    return sum(value for name, value in seconds.items() if name != "evaluation")


def phases(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Phases with their share of the time, the longest first."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [
        {"meaning": phase_meaning(name), "time": seconds_words(value), "share": 100 * value / total, "name": name}
        for name, value in ordered
        if total
    ]


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that a result says about where it came from: name and value."""
    rows = []
    for name, value in provenance.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}: {inner}", _text(each)) for inner, each in value.items()]
        else:
            rows.append((name, _text(value)))
    return rows


def model_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the provenance says about the model."""
    return record["provenance"].get("model") or {}


def model_name(record: Mapping[str, Any]) -> str:
    """The model's name; of a folder its last part."""
    name = str(model_of(record).get("name", "an unknown model"))
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".")) else name


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
