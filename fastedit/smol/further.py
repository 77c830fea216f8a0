"""What a record asks besides the benchmarks' questions: unseen wordings, politeness, siblings, negations, false claims.

Drawn apart from the record itself, so that a record is what it is without them. Whether the model answers them rightly
before the edit is stored beside the set; those that it does not are not asked.
"""

from __future__ import annotations

import random

from fastedit.pocket.edits import Asked, Record
from fastedit.pocket.further import polite
from fastedit.smol.concepts import concepts
from fastedit.smol.facts import Fact
from fastedit.smol.grammar import PLACES, Question, answer_to, phrase
from fastedit.smol.scenes import Scene, by_name
from fastedit.smol.templates import prompts


def further(
    record: Record[Scene], question: Question, after: Scene, fact: Fact, rng: random.Random
) -> tuple[Asked[Scene], ...]:
    """Return the questions, each with the right answer before the edit and the score it counts for as its kind.

    Args:
        record: the edit, without them. question: what it asks. after: the scene after the edit.
        fact: what its text locality asks. rng: source of all randomness.
    """
    first, second, third, near = rng.sample(question.unseen, 4)
    asked = [
        Asked(first, record.scene, record.truth, "text_generality_unseen"),
        Asked(second, record.scene, record.truth, "text_generality_unseen"),
        Asked(third, record.rephrased, record.truth, "image_generality_unseen"),
        Asked(polite(record.prompt, rng), record.scene, record.truth, "polite"),
        Asked(near, record.near[0].scene, record.near[0].answer, "near_unseen"),
        Asked(rng.choice(fact.prompts(unseen=True)), None, fact.answer, "text_locality_unseen"),
    ]
    for one, score in ((record.locality, "image_locality_unseen"), (record.same[0], "same_unseen")):
        kind, *slots = one.kind.split("|")
        asked.append(Asked(rng.choice(prompts(kind, tuple(slots), unseen=True)), one.scene, one.answer, score))
    for sibling in _siblings(record, question):
        asked.append(sibling)
    asked += [
        Asked(one.prompt, one.scene, one.answer, "contrary")
        for one in record.same
        if one.answer == "no" and one.kind.startswith("exist|")
    ]
    # Behind all others: what of a record's questions a model is not asked is stored by their places
    asked.append(_negated(record.scene, after, rng))
    return tuple(asked)


def _negated(scene: Scene, after: Scene, rng: random.Random) -> Asked[Scene]:
    """Return whether a thing is missing from the picture, of which the edit says nothing new."""
    kind = by_name()[scene.names[0]][1].kind
    gone = [concept.name for concept in concepts() if concept.kind == kind]
    stays = [rng.choice([name for name in gone if name not in scene.names + after.names])]
    stays += [name for name in scene.names if name in after.names]
    slots = (phrase(rng.choice(stays)),)
    return Asked(rng.choice(prompts("absent", slots)), scene, answer_to("absent", slots, scene), "negated")


def _siblings(record: Record[Scene], question: Question) -> list[Asked[Scene]]:
    """Return the edit's question, in its very words, about the other thing of the picture; none where there is none."""
    if not question.slots or len(set(record.scene.names)) < 2:
        return []
    place = question.prompts.index(record.prompt)
    found = []
    for one in record.scene.shown:
        slots = (PLACES[one.cell],)
        answer = answer_to(question.kind, slots, record.scene)
        if slots != question.slots and answer and answer not in (record.target, record.truth):
            prompt = Question(question.kind, slots, answer).prompts[place]
            found.append(Asked(prompt, record.scene, answer, "sibling"))
    return found
