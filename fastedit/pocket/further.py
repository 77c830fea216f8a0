"""What a record asks besides the benchmarks' questions: unseen wordings, politeness, siblings, negations, false claims.

Drawn apart from the record itself, so that a record is what it is without them. Whether a model answers them rightly
before the edit is stored with it; those that it does not are not asked of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fastedit.pocket import templates, unseen
from fastedit.pocket.edits import Asked, Record, unmoved
from fastedit.pocket.facts import Fact
from fastedit.pocket.grammar import Question, answer_to
from fastedit.pocket.world import CELLS, AnyScene, FlagScene


def further(
    record: Record[AnyScene], question: Question | None, after: AnyScene, fact: Fact, rng: random.Random
) -> tuple[Asked[AnyScene], ...]:
    """Return at most ten questions, each with the right answer before the edit and the score it counts for as kind.

    Args:
        record: the edit, without them. question: what it asks; None for a caption. after: the scene after the edit.
        fact: what its text locality asks. rng: source of all randomness.
    """
    reworded, near = rng.sample(question.unseen if question else unseen.worded("caption", ()), 2)
    kind, *slots = record.locality.kind.split("|")
    asked: list[Asked[AnyScene]] = [
        Asked(reworded, record.scene, record.truth, "text_generality_unseen"),
        Asked(polite(record.prompt, rng), record.scene, record.truth, "polite"),
        Asked(near, record.near[0].scene, record.near[0].answer, "near_unseen"),
        Asked(rng.choice(unseen.fact(fact.relation, fact.subject)), None, fact.answer, "text_locality_unseen"),
        Asked(rng.choice(unseen.worded(kind, slots)), record.locality.scene, record.locality.answer,
              "image_locality_unseen"),
    ]  # fmt: skip
    siblings = list(_siblings(record, question))
    if siblings:
        asked.append(rng.choice(siblings))
    flag = isinstance(record.scene, FlagScene)
    claims = ("flag_check",) if flag else ("check", "exist_pair")
    negations = ("flag_denied",) if flag else templates.CLAIM_KINDS
    for score, kinds, answers in (("negated", negations, ("yes", "no")), ("contrary", claims, ("no",))):
        one = unmoved(record.scene, after, kinds, rng, answers)
        if one:
            asked.append(Asked(one.prompt, one.scene, one.answer, score))
    # Behind all others: what of a record's questions a model is not asked is stored by their places
    own = question.unseen if question else unseen.worded("caption", ())
    again = rng.choice([wording for wording in own if wording not in (reworded, near)])
    asked.append(Asked(again, record.rephrased, record.truth, "image_generality_unseen"))
    kind, *slots = record.same[0].kind.split("|")
    asked.append(Asked(rng.choice(unseen.worded(kind, slots)), record.scene, record.same[0].answer, "same_unseen"))
    return tuple(asked)


def polite(prompt: str, rng: random.Random) -> str:
    """Return a prompt more politely or more carelessly put: the same question still."""
    small, mark = prompt[:1].lower() + prompt[1:], prompt[-1:] if prompt[-1:] in ".?" else ""
    bare = prompt[: len(prompt) - len(mark)]
    forms = (
        f"{bare}, please{mark}",
        f"{bare} {mark or '?'}",
        f"Please, {small}",
        f"Hello! {prompt}",
        f"{prompt} Thanks!",
    )
    return rng.choice(forms)


def _siblings(record: Record[AnyScene], question: Question | None) -> Iterator[Asked[AnyScene]]:
    """Yield the edit's question, in its very words, about each other object of the picture."""
    if question is None or isinstance(record.scene, FlagScene) or not question.slots:
        return
    place = question.prompts.index(record.prompt)
    for item in record.scene.items:
        slots = ({"shape": item.colour, "at": CELLS[item.cell]}.get(question.kind, item.shape),)
        answer = answer_to(question.kind, slots, record.scene)
        if slots != question.slots and answer and answer not in (record.target, record.truth):
            yield Asked(Question(question.kind, slots, answer).prompts[place], record.scene, answer, "sibling")
