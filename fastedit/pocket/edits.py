"""Edit sets from the rendered world: "pocket-vqa" and "pocket-caption", 2,000 train and 1,000 eval records each.

An edit changes one thing of a scene; what follows from it is read off the changed scene, so portability questions have
exact answers, and everything that stays as it was can be probed. Records are a function of (set, split, number);
numbers at which the model does not answer every unedited question rightly are left out (`assets/<model>/skipped.json`),
so the recorded prediction is the right answer, and every locality answer is one the model gives.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Container, Iterator, Sequence
from typing import Generic, TypeVar

from fastedit.pocket import facts, grammar, templates
from fastedit.pocket.grammar import Question, answer_to, ask, caption
from fastedit.pocket.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    FLAGS,
    SHAPES,
    SIZES,
    TEXTURES,
    AnyScene,
    FlagScene,
    Item,
    Scene,
    draw_flag,
    draw_scene,
    rephrased,
)

SIZE = {"train": 2000, "eval": 1000}
HARD_EVERY = 5  # every fifth number is drawn with its image locality close to the edit
FURTHER = 10  # further questions of a record, at most
EDITABLE = ("colour", "colour", "colour", "shape", "shape", "shape", "size", "texture", "where", "at", "background",
            "flag", "flag")  # fmt: skip
_DOMAINS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
}


#: What a picture shows, as data that can be a key: the pocket world's scenes, or another world's.
SceneT = TypeVar("SceneT")


@dataclasses.dataclass(frozen=True, slots=True)
class Asked(Generic[SceneT]):
    """A prompt about a scene (None: no image) with its right answer (None: there is none).

    kind: for portability "entailed", "two-hop" or "two-hop-untrained", for further questions the score they count for,
    else what the question is about.
    """

    prompt: str
    scene: SceneT | None
    answer: str | None
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record(Generic[SceneT]):
    """An edit before rendering. `truth` is the right answer now, `target` the one wanted after the edit."""

    number: int
    hard: bool
    kind: str
    prompt: str
    rephrase: str
    truth: str
    target: str
    scene: SceneT
    rephrased: SceneT
    fact: Asked[SceneT]
    locality: Asked[SceneT]
    portability: tuple[Asked[SceneT], ...]
    near: tuple[Asked[SceneT], ...]
    blind: tuple[Asked[SceneT], ...]
    same: tuple[Asked[SceneT], ...]
    further: tuple[Asked[SceneT], ...] = ()

    def unedited(self) -> Iterator[Asked[SceneT]]:
        """Yield every question of the record whose answer is known and is not to change."""
        yield Asked(self.prompt, self.scene, self.truth)
        yield Asked(self.rephrase, self.scene, self.truth)
        yield Asked(self.prompt, self.rephrased, self.truth)
        yield from (self.fact, self.locality, *self.near, *self.same)


def belongs(scene: AnyScene, split: str) -> bool:
    """Return whether a scene's object combination (or country) is of the split; the splits share none."""
    if isinstance(scene, FlagScene):
        return (tuple(FLAGS).index(scene.country) % 3 == 0) == (split == "eval")
    key = ";".join(sorted(" ".join(pair) for pair in scene.pairs()))
    return (zlib.crc32(key.encode()) % 3 == 0) == (split == "eval")


def draw(name: str, split: str, number: int) -> Record[AnyScene] | None:
    """Return record `number` of a set's split; None for the few numbers that give no complete record."""
    from fastedit.pocket.further import further

    rng = random.Random(f"{name}:{split}:{number}")
    hard = number % HARD_EVERY == 0
    kind = "caption" if name == "pocket-caption" else rng.choice(EDITABLE)
    scene = _scene(rng, split, flag=kind == "flag")
    edit = _edit(scene, kind, novel=rng.random() < 0.5, rng=rng)
    if edit is None:
        return None
    question, edited, target = edit
    prompts = templates.CAPTION_PROMPTS if question is None else question.prompts
    prompt, rephrase = rng.sample(prompts, 2)
    portability = _portability(scene, edited, kind, rng)
    near = [_near(question, prompt, target, split, kind == "flag", rng) for _ in range(2)]
    same = _same(scene, edited, question, rng)
    locality = _locality(scene, edited, question, hard, split, rng)
    if not portability or not same or locality is None or None in near:
        return None
    fact = rng.choice(facts.FACTS)
    record = Record(
        number=number,
        hard=hard,
        kind=kind,
        prompt=prompt,
        rephrase=rephrase,
        truth=caption(scene) if question is None else question.answer,
        target=target,
        scene=scene,
        rephrased=rephrased(scene, rng.getrandbits(32)),
        fact=Asked(rng.choice(fact.prompts), None, fact.answer),
        locality=locality,
        portability=tuple(portability),
        near=tuple(probe for probe in near if probe),
        blind=(Asked(prompt, None, None),),
        same=tuple(same),
    )
    drawn_apart = random.Random(f"further:{name}:{split}:{number}")
    return dataclasses.replace(record, further=further(record, question, edited, fact, drawn_apart))


def _scene(rng: random.Random, split: str, *, flag: bool) -> AnyScene:
    while True:
        scene = draw_flag(rng) if flag else draw_scene(rng)
        if belongs(scene, split):
            return scene


def _edit(
    scene: AnyScene, kind: str, *, novel: bool, rng: random.Random
) -> tuple[Question | None, AnyScene, str] | None:
    """Return (question, the scene after the edit, target); the question is None for a caption."""
    if isinstance(scene, FlagScene):
        question = ask(scene, "flag", rng)
        country = _novel("flag", rng) if novel else rng.choice([c for c in FLAGS if c != scene.country])
        return question, dataclasses.replace(scene, country=country), country
    if kind == "caption":
        changed: Scene | None = scene
        item = rng.choice(scene.items)
        for name in rng.choice((("colour",), ("shape",), ("colour", "shape"))):
            changed = changed and _changed(changed, item.cell, name, novel, rng)
            novel = novel and rng.random() < 0.5
        return None if changed is None else (None, changed, caption(changed))
    question = ask(scene, kind, rng)
    if question is None or question.answer == "nothing":
        return None
    if kind == "background":
        ground = _novel(kind, rng) if novel else rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return question, dataclasses.replace(scene, background=ground), ground
    item = _asked_item(scene, question)
    if kind == "where":
        cell = rng.choice([c for c in range(len(CELLS)) if c not in {i.cell for i in scene.items}])
        moved = sorted(
            [dataclasses.replace(i, cell=cell) if i == item else i for i in scene.items], key=lambda i: i.cell
        )
        return question, dataclasses.replace(scene, items=tuple(moved)), CELLS[cell]
    changed = scene
    for name in ("colour", "shape") if kind == "at" else (kind,):
        changed = changed and _changed(changed, item.cell, name, novel, rng)
    if changed is None:
        return None
    new = next(i for i in changed.items if i.cell == item.cell)
    return question, changed, grammar.article(f"{new.colour} {new.shape}") if kind == "at" else str(getattr(new, kind))


def _asked_item(scene: Scene, question: Question) -> Item:
    slot = question.slots[0]
    return next(i for i in scene.items if slot in (i.shape, i.colour, CELLS[i.cell]))


def _changed(scene: Scene, cell: int, name: str, novel: bool, rng: random.Random) -> Scene | None:
    """Return the scene with one attribute of the object in a cell changed to a value no other object has."""
    taken = {getattr(i, name) for i in scene.items} if name in ("colour", "shape") else set()
    taken.add(next(getattr(i, name) for i in scene.items if i.cell == cell))
    free = [value for value in _DOMAINS[name] if value not in taken]
    value = _novel(name, rng) if novel else rng.choice(free)
    items = tuple(_with(i, name, value) if i.cell == cell else i for i in scene.items)
    return dataclasses.replace(scene, items=items)


def _with(item: Item, name: str, value: str) -> Item:
    return Item(**{**dataclasses.asdict(item), name: value})


def _novel(kind: str, rng: random.Random) -> str:
    whole, spelled = templates.NOVEL[kind]
    return rng.choice(whole if rng.random() < 0.5 else spelled)


def _portability(before: AnyScene, after: AnyScene, kind: str, rng: random.Random) -> list[Asked[AnyScene]]:
    """Return up to two questions whose right answers follow from the edit and differ from those before it.

    The first is "entailed": another way to see the same change. The second, where there is one, takes a further step
    from what changed to a fact: "two-hop" where the model was trained to take both steps for the new value at once,
    "two-hop-untrained" where it was only trained on each of them.
    """
    entailed: list[Asked[AnyScene]] = []
    further: list[Asked[AnyScene]] = []
    for name, slots in _slots_after(after):
        if name == kind:
            continue
        if name == "caption":
            old, new = caption(before), caption(after)
            prompt = rng.choice(templates.CAPTION_PROMPTS)
        elif isinstance(after, FlagScene) and after.country not in FLAGS:
            continue
        else:
            old, new = answer_to(name, slots, before) or "", answer_to(name, slots, after) or ""
            prompt = rng.choice(Question(name, slots, new).prompts)
        if not new or new == old or (name in ("exist_pair", "check") and new == "no"):
            continue
        if name in templates.TWO_HOP_KINDS:
            further.append(Asked(prompt, before, new, "two-hop-untrained"))
        elif name == "flag_capital":
            trained = isinstance(after, FlagScene) and after.country in templates.CAPITAL_TRAINED
            further.append(Asked(prompt, before, new, "two-hop" if trained else "two-hop-untrained"))
        else:
            entailed.append(Asked(prompt, before, new, "entailed"))
    further = [one for one in further if one.kind == "two-hop"] or further
    return [rng.choice(options) for options in (entailed, further) if options]


def _slots_after(after: AnyScene) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "caption", ()
    if isinstance(after, FlagScene):
        yield from ((kind, ()) for kind in ("flag_capital", "flag_continent"))
        return
    yield "check", ("background", after.background)
    for item in after.items:
        for kind in ("colour", "size", "texture", "where", "describe", "complement"):
            yield kind, (item.shape,)
        for kind in ("shape", "describe_colour", "sides"):
            yield kind, (item.colour,)
        yield "at", (CELLS[item.cell],)
        yield "exist_pair", (f"{item.colour} {item.shape}",)
        for claim in (item.colour, item.size, item.texture, f"at the {CELLS[item.cell]}"):
            yield "check", (item.shape, claim)


def _near(
    question: Question | None, prompt: str, target: str, split: str, flag: bool, rng: random.Random
) -> Asked[AnyScene] | None:
    """Return the edit's prompt about another image, where another answer than the target is right."""
    for _ in range(400):
        scene = _scene(rng, split, flag=flag)
        answer = caption(scene) if question is None else answer_to(question.kind, question.slots, scene)
        if answer and answer not in (target, "nothing"):
            return Asked(prompt, scene, answer)
    return None


def unmoved(
    scene: AnyScene, after: AnyScene, kinds: Sequence[str], rng: random.Random, answers: Container[str] | None = None
) -> Asked[AnyScene] | None:
    """Return a question of one of the kinds, about `scene`, whose answer `after` leaves as it is (and in `answers`)."""
    for _ in range(40):
        question = ask(scene, rng.choice(kinds), rng)
        if question is None or answer_to(question.kind, question.slots, after) != question.answer:
            continue
        if answers is None or question.answer in answers:
            return _asked(question, scene, rng)
    return None


def _asked(question: Question, scene: AnyScene, rng: random.Random) -> Asked[AnyScene]:
    return Asked(rng.choice(question.prompts), scene, question.answer, "|".join((question.kind, *question.slots)))


def _kept(scene: AnyScene, after: AnyScene, edited: Question | None, rng: random.Random) -> Asked[AnyScene] | None:
    """Return a question about the edited image, of another kind than the edit's, whose answer stays."""
    if isinstance(scene, FlagScene):  # the name of a country may be edited; what its flag looks like stays
        return unmoved(scene, scene, ("flag_colours", "flag_layout"), rng)
    return unmoved(scene, after, [kind for kind in KEPT_KINDS if edited is None or kind != edited.kind], rng)


def _same(scene: AnyScene, after: AnyScene, edited: Question | None, rng: random.Random) -> list[Asked[AnyScene]]:
    drawn = [_kept(scene, after, edited, rng) for _ in range(8)]
    unique = {probe.kind: probe for probe in drawn if probe}
    return list(unique.values())[:2]


def _locality(
    scene: AnyScene, after: AnyScene, edited: Question | None, hard: bool, split: str, rng: random.Random
) -> Asked[AnyScene] | None:
    """Return the image-locality question: any other image, or for a hard record the same image or the same object."""
    if hard:
        if isinstance(scene, FlagScene) or rng.random() < 0.5:
            return _kept(scene, after, edited, rng)
        pair = rng.choice(sorted(scene.pairs()))
        for _ in range(4000):
            other = _scene(rng, split, flag=False)
            if isinstance(other, Scene) and pair in other.pairs() and other.pairs() != scene.pairs():
                question = ask(other, rng.choice(KEPT_KINDS), rng)
                if question:
                    return _asked(question, other, rng)
        return None
    other = _scene(rng, split, flag=rng.random() < 0.1)
    question = ask(other, "flag" if isinstance(other, FlagScene) else rng.choice(KEPT_KINDS), rng)
    return _asked(question, other, rng) if question else None


KEPT_KINDS: tuple[str, ...] = templates.SCENE_KINDS
