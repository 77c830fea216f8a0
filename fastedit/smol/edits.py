"""Edit sets of real knowledge: "icon-entity", "icon-vqa" and "icon-caption", 1,000 train and 500 eval records each.

An edit changes one thing of a scene; what follows from it is read off the changed scene and, one or two steps further,
off what the language model knows of the new thing ("this is a cat" - "which sound does this animal make?"). Records are
a function of (set, split, number); numbers at which the model does not answer every unedited question rightly are left
out, so the recorded prediction is the right answer, and every locality answer is one the model gives. The splits edit
different concepts.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from fastedit.pocket.edits import HARD_EVERY, Asked, Record
from fastedit.smol import facts, grammar
from fastedit.smol.concepts import FLAG
from fastedit.smol.further import further
from fastedit.smol.grammar import Question, answer_to, ask
from fastedit.smol.scenes import BACKGROUNDS, Scene, Shown, by_name, draw_scene, rephrased
from fastedit.smol.split import concepts_of
from fastedit.smol.templates import prompts

SIZE = {"train": 1000, "eval": 500}
#: What is asked of a picture beside an edit, and follows from it. Other kinds of questions the shipped model answers
#: wrongly more often than not (where, beside), or was not trained on (is_count, is_background).
ASKED = ("name", "flag", "at", "flag_at", "count", "background", "exist", "caption")
#: What an edit of "icon-vqa" is about, by layout and whether flags are shown.
_ABOUT = (
    ("at", "pair", False), ("at", "pair", False), ("flag_at", "pair", True), ("flag_at", "pair", True),
    ("background", "one", False),
)  # fmt: skip
_FLAG_SHARE = 0.25
_TRIES = 60


def draw(name: str, split: str, number: int) -> Record[Scene] | None:
    """Return record `number` of a set's split; None for the few numbers that give no complete record.

    Args:
        name: an edit set. split: "train" or "eval".
    """
    rng = random.Random(f"{name}:{split}:{number}")
    hard = number % HARD_EVERY == 0
    kind, layout, flag = _kind(name, rng)
    scene = draw_scene(rng, concepts_of(split, FLAG if flag else "icon"), layout=layout)
    question = ask(scene, kind, rng)
    edit = _edit(scene, question, split, rng)
    if question is None or edit is None:
        return None
    after, target = edit
    prompt, rephrase = rng.sample(question.prompts, 2)
    portability = _portability(scene, after, question, rng)
    near = tuple(_near(question, prompt, target, split, layout, flag, rng) for _ in range(2))
    same = _same(scene, after, question, rng)
    locality = _locality(scene, after, question, hard, split, rng)
    if not portability or not same or locality is None or None in near:
        return None
    fact = _fact({*scene.names, *after.names}, rng)
    record = Record(
        number=number,
        hard=hard,
        kind=kind,
        prompt=prompt,
        rephrase=rephrase,
        truth=question.answer,
        target=target,
        scene=scene,
        rephrased=rephrased(scene, rng.getrandbits(32)),
        fact=Asked(rng.choice(fact.prompts()), None, fact.answer),
        locality=locality,
        portability=tuple(portability),
        near=tuple(probe for probe in near if probe),
        blind=(Asked(prompt, None, None),),
        same=tuple(same),
    )
    return dataclasses.replace(
        record, further=further(record, question, after, fact, random.Random(f"{name}:{number}:further"))
    )


def _kind(name: str, rng: random.Random) -> tuple[str, str, bool]:
    """Return (kind of question, layout, whether flags are shown)."""
    flag = rng.random() < _FLAG_SHARE
    if name == "icon-entity":
        return ("flag" if flag else "name"), "one", flag
    if name == "icon-caption":
        return "caption", rng.choice(("one", "pair")), flag
    return rng.choice(_ABOUT)


def _edit(scene: Scene, question: Question | None, split: str, rng: random.Random) -> tuple[Scene, str] | None:
    """Return (the scene after the edit, the new answer); None where nothing follows from the question."""
    if question is None:
        return None
    for _ in range(_TRIES):
        after = _changed(scene, question, split, rng)
        target = answer_to(question.kind, question.slots, after)
        if target is not None and target != question.answer:
            return after, target
    return None


def _changed(scene: Scene, question: Question, split: str, rng: random.Random) -> Scene:
    kind = question.kind
    if kind == "background":
        return dataclasses.replace(scene, background=rng.choice(list(BACKGROUNDS)))
    changed = scene
    if kind == "caption" and rng.random() < 0.4:
        changed = dataclasses.replace(scene, background=rng.choice(list(BACKGROUNDS)))
        if rng.random() < 0.5:
            return changed
    # Which of the things the question is about; a caption is about all.
    about = [one for one in scene.shown if one.name == question.answer] or [rng.choice(scene.shown)]
    new = _another(about[0].name, split, scene.names, rng)
    shown = tuple(Shown(new, one.cell) if one == about[0] else one for one in changed.shown)
    return dataclasses.replace(changed, shown=shown)


def _another(name: str, split: str, taken: tuple[str, ...], rng: random.Random) -> str:
    """Return another concept of the kind, more often one that the language model knows something of."""
    free = [one for one in concepts_of(split, by_name()[name][1].kind) if one not in taken]
    told = [one for one in free if facts.known_of(one)]
    return rng.choice(told if told and rng.random() < 0.8 else free or list(concepts_of(split, "icon")))


def _portability(before: Scene, after: Scene, edited: Question, rng: random.Random) -> list[Asked[Scene]]:
    """Return up to three questions whose right answers follow from the edit and differ from those before it.

    "entailed": another way to see the same change. "one-hop": what the language model knows of the new thing.
    "two-hop": what it knows of something that it knows of it.
    """
    found: dict[str, list[Asked[Scene]]] = {"entailed": [], "one-hop": [], "two-hop": []}
    for kind, slots in _possible(after):
        if (kind, slots) == (edited.kind, edited.slots):
            continue
        old, new = answer_to(kind, slots, before), answer_to(kind, slots, after)
        # That something is not there is no news.
        if new not in (None, old) and new != "no":
            found["entailed"].append(Asked(rng.choice(prompts(kind, slots)), before, str(new), "entailed"))
    for one in after.shown:
        old_name = next((each.name for each in before.shown if each.cell == one.cell), None)
        # Several of a kind have no one thing to ask about.
        if old_name in (None, one.name) or len(set(after.names)) < len(after.shown):
            continue
        old_facts = {fact.relation: fact.answer for fact in facts.of(str(old_name))}
        for fact in facts.known_of(one.name):
            if old_facts.get(fact.relation) == fact.answer:
                continue
            hops = "two-hop" if fact.two_hop else "one-hop"
            subject = rng.choice(grammar.seen_as(one, after))
            found[hops].append(Asked(rng.choice(prompts(fact.relation, (subject,))), before, fact.answer, hops))
    return [rng.choice(options) for options in found.values() if options]


def _possible(scene: Scene) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (kind, slots) of every question that a scene says something about."""
    for kind in ("name", "flag", "count", "background", "caption"):
        yield kind, ()
    for one in scene.shown:
        yield "exist", (grammar.phrase(one.name),)
        for kind in ("at", "flag_at"):
            yield kind, (grammar.PLACES.get(one.cell, ""),)


def _near(
    question: Question, prompt: str, target: str, split: str, layout: str, flag: bool, rng: random.Random
) -> Asked[Scene] | None:
    """Return the edit's prompt about another image, where another answer than the target is right."""
    for _ in range(_TRIES):
        scene = draw_scene(rng, concepts_of(split, FLAG if flag else "icon"), layout=layout)
        answer = answer_to(question.kind, question.slots, scene)
        if answer and answer != target:
            return Asked(prompt, scene, answer)
    return None


def _unmoved(scene: Scene, after: Scene, edited: Question, rng: random.Random) -> Iterator[Asked[Scene]]:
    """Yield questions about the edited image whose answers the edit leaves as they are, in a random order."""
    possible = [*_possible(scene), *(("exist", (grammar.phrase(name),)) for name in _absent(scene, after, rng))]
    rng.shuffle(possible)
    for kind, slots in possible:
        answer = answer_to(kind, slots, scene)
        if kind == edited.kind and slots == edited.slots:
            continue
        if answer is not None and kind != "caption" and answer == answer_to(kind, slots, after):
            yield Asked(rng.choice(prompts(kind, slots)), scene, answer, "|".join((kind, *slots)))


def _absent(scene: Scene, after: Scene, rng: random.Random) -> list[str]:
    kind = by_name()[scene.names[0]][1].kind
    pool = concepts_of("train", kind) + concepts_of("eval", kind)
    return rng.sample([name for name in pool if name not in scene.names + after.names], 1)


def _same(scene: Scene, after: Scene, edited: Question, rng: random.Random) -> list[Asked[Scene]]:
    unique = {probe.kind: probe for probe in _unmoved(scene, after, edited, rng)}
    return list(unique.values())[:2]


def _locality(
    scene: Scene, after: Scene, edited: Question, hard: bool, split: str, rng: random.Random
) -> Asked[Scene] | None:
    """Return the image-locality question: any other image, or for a hard record the same image or the same thing."""
    if hard and rng.random() < 0.5:
        return next(_unmoved(scene, after, edited, rng), None)
    names = scene.names if hard else concepts_of(split, FLAG if rng.random() < _FLAG_SHARE else "icon")
    for _ in range(_TRIES):
        layout = rng.choice(("one", "copies")) if hard else rng.choice(("one", "one", "pair", "copies"))
        other = draw_scene(rng, names, layout=layout)
        kinds = [
            kind for kind in grammar.askable(other) if kind in ASKED and kind != (edited.kind if hard else "caption")
        ]
        question = ask(other, rng.choice(kinds), rng)
        if question and (other.names, other.background) != (scene.names, scene.background):
            about = "|".join((question.kind, *question.slots))
            return Asked(rng.choice(question.prompts), other, question.answer, about)
    return None


def _fact(shown: set[str], rng: random.Random) -> facts.Fact:
    """Return a known fact about something that the edit does not touch."""
    while True:
        fact = rng.choice(facts.known())
        if fact.subject not in shown:
            return fact
