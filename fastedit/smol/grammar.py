"""Questions about scenes, their right answers, and captions.

`ask` gives one question of a kind about a scene, as the parts it is made of, so that it can be put in other words
(`Question.prompts`, and `Question.unseen` for the words nothing is trained on) or asked of another scene (`answer_to`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from fastedit.pocket.facts import sentence
from fastedit.pocket.templates import NUMBERS
from fastedit.smol.concepts import FLAG, concepts
from fastedit.smol.facts import this_one
from fastedit.smol.scenes import BACKGROUNDS, Scene, Shown, by_name
from fastedit.smol.templates import prompts

#: What a picture itself answers; `fastedit.smol.facts` has what its subject is known for.
SCENE_KINDS = (
    "name", "at", "flag", "flag_at", "where", "beside", "count", "background", "exist", "is_count", "is_background",
    "absent", "caption",
)  # fmt: skip
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_RELATIONS = {("left", "right"): "to the left of", ("top", "bottom"): "above"}


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question of one kind; `slots` fill its templates."""

    kind: str
    slots: tuple[str, ...]
    answer: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the same question in every wording that training may see."""
        return prompts(self.kind, self.slots)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Return the same question in every wording of the second set, which nothing is trained on."""
        return prompts(self.kind, self.slots, unseen=True)


def phrase(name: str) -> str:
    """Return a concept's noun phrase: "a dog", "grapes", "the flag of Japan"."""
    return by_name()[name][1].phrase


def definite(name: str) -> str:
    """Return a concept's definite noun phrase: "the dog", "the flag of Japan"."""
    concept = by_name()[name][1]
    return concept.phrase if concept.kind == FLAG else f"the {name}"


def seen_as(one: Shown, scene: Scene) -> tuple[str, ...]:
    """Return what a thing is called in a question about its picture: "this animal", "the animal on the left"."""
    if len(scene.shown) == 1:
        return this_one(one.name)
    concept = by_name()[one.name][1]
    place = PLACES[one.cell]
    if concept.kind == FLAG:
        return (f"the country whose flag is {place}",)
    return (f"the {concept.kind if concept.kind in ('animal', 'food') else 'thing'} {place}",)


def _is_flag(name: str) -> bool:
    return by_name()[name][1].kind == FLAG


def caption(scene: Scene) -> str | None:
    """Return the scene's caption, in reading order and then the background; None for several of a kind."""
    ground = sentence(f"a {scene.background} background")
    ground = ground[0].lower() + ground[1:]
    if len(scene.shown) == 1:
        return f"{phrase(scene.names[0])} on {ground}"
    if len(scene.shown) != 2 or scene.names[0] == scene.names[1]:
        return None
    first, second = scene.shown
    return f"{phrase(first.name)} {_RELATIONS[first.cell, second.cell]} {phrase(second.name)} on {ground}"


def answer_to(kind: str, slots: tuple[str, ...], scene: Scene) -> str | None:
    """Return the right answer to a question on a scene, or None where the question makes no sense there."""
    if kind == "background":
        return scene.background
    if kind == "count":
        return NUMBERS[len(scene.shown)]
    if kind in ("exist", "absent"):
        shown = slots[0] in map(phrase, scene.names)
        return "yes" if shown == (kind == "exist") else "no"
    if kind == "is_count":
        return "yes" if slots[0] == NUMBERS[len(scene.shown)] else "no"
    if kind == "is_background":
        return "yes" if slots[0] == scene.background else "no"
    if kind == "caption":
        return caption(scene)
    if kind in ("name", "flag"):
        single = len(scene.shown) == 1 and _is_flag(scene.names[0]) == (kind == "flag")
        return scene.names[0] if single else None
    if len(set(scene.names)) < 2:
        return None
    if kind in ("at", "flag_at"):
        at = next((one.name for one in scene.shown if PLACES.get(one.cell) == slots[0]), None)
        return at if at is not None and _is_flag(at) == (kind == "flag_at") else None
    if kind in ("where", "beside"):
        at_slot = next((one for one in scene.shown if definite(one.name) == slots[0]), None)
        if at_slot is None:
            return None
        other = next(one for one in scene.shown if one != at_slot)
        if kind == "where":
            return at_slot.cell
        return None if _is_flag(other.name) else other.name
    raise ValueError(f"answer_to: kind must be one of {', '.join(SCENE_KINDS)} (got kind={kind!r})")


def _slots(kind: str, scene: Scene, rng: random.Random) -> tuple[str, ...]:
    one = rng.choice(scene.shown)
    if kind in ("at", "flag_at"):
        return (PLACES.get(one.cell, ""),)
    if kind in ("where", "beside"):
        return (definite(one.name),)
    if kind in ("exist", "absent"):
        name = one.name if rng.random() < 0.5 else _another(one, rng)
        return (phrase(name),)
    if kind == "is_count":
        return (NUMBERS[len(scene.shown) if rng.random() < 0.5 else rng.randint(1, 4)],)
    if kind == "is_background":
        return (scene.background if rng.random() < 0.5 else rng.choice(tuple(BACKGROUNDS)),)
    return ()


def _another(one: Shown, rng: random.Random) -> str:
    kind = by_name()[one.name][1].kind
    return rng.choice([concept.name for concept in concepts() if concept.kind == kind and concept.name != one.name])


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Draw a question of a kind about a scene; None where the kind makes no sense there."""
    slots = _slots(kind, scene, rng)
    answer = answer_to(kind, slots, scene)
    return None if answer is None else Question(kind, slots, answer)


def askable(scene: Scene) -> Sequence[str]:
    """Return the kinds of questions that make sense of a scene."""
    rng = random.Random(0)
    return [kind for kind in SCENE_KINDS if ask(scene, kind, rng)]


def knowledge(relation: str, subject: str, answer: str, rng: random.Random) -> Question:
    """Return the question for what a single picture's subject is known for: "Which sound does this animal make?"."""
    return Question(relation, (rng.choice(this_one(subject)),), answer)
