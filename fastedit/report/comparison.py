"""The page that compares runs: their scores beside each other, and their answers to the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.report.colours import method_colours
from fastedit.report.curve import forgetting_curve
from fastedit.report.gallery import chosen_numbers, holds, is_failed, is_right, must_change, shortened
from fastedit.report.page import Section, render
from fastedit.report.pictures import Pictures, more_words
from fastedit.report.run import (
    editing_seconds,
    headline,
    model_name,
    model_of,
    outcome_counts,
    provenance_rows,
    speed,
)
from fastedit.report.scores import score_rows, unedited_scores
from fastedit.report.words import count_of, machine_words, method_words, nfu_words, seconds_words
from fastedit.requests import EditRequest


@dataclass(frozen=True)
class Answer:
    """What one run answers to an edit's question, and how many of its other questions are not as they must be."""

    label: str
    colour: str
    text: str
    right: bool
    missed: int
    disturbed: int


@dataclass(frozen=True)
class ComparedEdit:
    """One edit, as every run answers it."""

    number: int
    prompt: str
    target: str
    before: str
    answers: Sequence[Answer]
    pictures: Sequence[str]
    more: str

    @property
    def failed(self) -> bool:
        """Whether a run has anything of it wrong."""
        return any(not each.right or each.missed + each.disturbed for each in self.answers)

    @property
    def differs(self) -> bool:
        """Whether the runs disagree on whether it holds."""
        return len({each.right for each in self.answers}) > 1


def comparison_page(
    runs: Mapping[str, Mapping[str, Any]],
    requests: Sequence[EditRequest] = (),
    *,
    links: Mapping[str, str] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """The page of several runs, with nothing that it would have to load.

    Args:
        runs: by label, their records (``Run.record()``), at least one.
        requests: the edits, in order, where all runs made the same ones; for their pictures.
        links: by label, the address of the run's own page. sections: that the caller adds.
    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("report: at least one run to compare (got none)")
    names = {label: str(run["provenance"].get("method", label)) for label, run in runs.items()}
    shades = method_colours(names.values())
    colours = {label: shades[name] for label, name in names.items()}
    same = same_edits(runs)
    longest = max(runs.values(), key=lambda run: len(run["edits"]))
    unedited = unedited_scores(longest["edits"]) if same else None
    scores = {label: run["scores"] for label, run in runs.items()}
    pictures = Pictures()
    cards = _cards(runs, requests, colours, pictures) if same else []
    models = list(dict.fromkeys(model_name(run) for run in runs.values()))
    n_edits = len(longest["edits"])
    title = f"{count_of(n_edits, 'edit')} of {' and '.join(models)}, made in {count_of(len(runs), 'way')}"
    return render("comparison.html", {
        "title": title if same else f"{count_of(len(runs), 'run')} of {' and '.join(models)}",
        "lead": _lead(runs, same),
        "runs": [_run_row(label, run, colours[label], (links or {}).get(label)) for label, run in runs.items()],
        "strict": score_rows(scores, "strict", colours, unedited),
        "legacy": score_rows(scores, "legacy", colours),
        "curves": [(label, curve) for label, run in runs.items() if (curve := forgetting_curve(run)) is not None],
        "cards": cards,
        "n_edits": n_edits,
        "same": same,
        "pictures": pictures,
        "sections": sections,
        "provenance": [(label, provenance_rows(run["provenance"])) for label, run in runs.items()],
    })  # fmt: skip


def same_edits(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all runs asked the same questions of the same edits, as far as they went."""
    asked = [[[(a["score"], a["prompt"]) for a in edit.get("answers", ())] for edit in run["edits"]]
             for run in runs.values()]  # fmt: skip
    ids = [[edit["id"] for edit in run["edits"]] for run in runs.values()]
    longest, names = max(asked, key=len), max(ids, key=len)
    return all(each == longest[: len(each)] for each in asked) and all(each == names[: len(each)] for each in ids)


def _lead(runs: Mapping[str, Mapping[str, Any]], same: bool) -> list[str]:
    sentences = [f"{label}: {_outcome(run)}." for label, run in runs.items()]
    if not same:
        sentences.append("The runs did not make the same edits: their scores do not compare methods.")
    machines = {machine_words(run["provenance"].get("machine", {})) for run in runs.values()}
    sentences.append(f"On {' and '.join(sorted(machines))}.")
    return sentences


def _outcome(run: Mapping[str, Any]) -> str:
    counts = outcome_counts(run["edits"])
    if not counts["asked"]:
        return headline(counts, "it", model_name(run))
    text = f"{counts['held']:,} of {count_of(counts['asked'], 'edit')} hold"
    if counts["must_stay"]:
        text += f", {counts['kept'] / counts['must_stay']:.1%} of other answers are kept"
    return text


def _run_row(label: str, run: Mapping[str, Any], colour: str, link: str | None) -> dict[str, Any]:
    timing = run["timing"]
    return {
        "label": label,
        "colour": colour,
        "link": link,
        "words": method_words(str(run["provenance"].get("method", label))),
        "speed": speed(timing) if timing["edits_per_s"] else "",
        "editing": seconds_words(editing_seconds(timing["seconds"])),
        "evaluation": seconds_words(timing["seconds"].get("evaluation", 0.0)),
        "steps": f"{timing['steps'] / max(1, len(run['edits'])):.1f}",
        "memory": f"{timing['peak_memory_mib']:,.0f}",
        "nfu": nfu_words(timing["nfu"], model_of(run).get("parameters")),
    }


def _cards(
    runs: Mapping[str, Mapping[str, Any]],
    requests: Sequence[EditRequest],
    colours: Mapping[str, str],
    pictures: Pictures,
) -> list[ComparedEdit]:
    n_edits = max(len(run["edits"]) for run in runs.values())
    by_number = [
        {label: run["edits"][number] for label, run in runs.items() if number < len(run["edits"])}
        for number in range(n_edits)
    ]
    failed = [any(map(is_failed, edits.values())) for edits in by_number]
    cards = []
    for number in chosen_numbers(failed):
        edits = {label: edit for label, edit in by_number[number].items() if holds(edit) is not None}
        if not edits:
            continue
        own = next(a for a in next(iter(edits.values()))["answers"] if a["score"] == "reliability")
        image = requests[number].image if number < len(requests) else None
        names = pictures.of(image)
        cards.append(ComparedEdit(
            number + 1, shortened(own["prompt"]), shortened(own["wanted"]), shortened(own["before"]),
            [_answer(label, edit, colours[label]) for label, edit in edits.items()], names, more_words(image, names),
        ))  # fmt: skip
    return cards


def _answer(label: str, edit: Mapping[str, Any], colour: str) -> Answer:
    own = next(answer for answer in edit["answers"] if answer["score"] == "reliability")
    wrong = [answer for answer in edit["answers"] if answer is not own and not is_right(answer)]
    missed = sum(map(must_change, wrong))
    return Answer(label, colour, shortened(own["after"]), is_right(own), missed, len(wrong) - missed)
