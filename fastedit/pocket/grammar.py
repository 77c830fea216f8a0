"""Questions about scenes, their right answers, and captions: English sentences as a user would type them.

`ask` gives one question of a kind about a scene, as the parts it is made of, so that the same question can be put in
other words (`Question.prompts`) or asked of another scene (`answer_to`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from fastedit.pocket import phrases, unseen
from fastedit.pocket.facts import COMPLEMENTS, COUNTRIES, SIDES, sentence
from fastedit.pocket.templates import (
    CAPTION_PROMPTS,
    DIRECTIONS,
    FLAG_CLAIM_KINDS,
    FLAG_KINDS,
    MORE,
    NOVEL,
    NUMBERS,
    TEMPLATES,
)
from fastedit.pocket.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    FLAGS,
    GRID,
    SHAPES,
    SIZES,
    TEXTURES,
    AnyScene,
    FlagScene,
    Item,
    Scene,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question of one kind; `slots` fill its templates."""

    kind: str
    slots: tuple[str, ...]
    answer: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the same question in the words of every template of its kind."""
        return tuple(sentence(template.format(*self.slots)) for template in TEMPLATES[self.kind])

    @property
    def unseen(self) -> tuple[str, ...]:
        """Return the same question in every wording of the second set, which nothing is trained on."""
        return unseen.worded(self.kind, self.slots)


def article(noun_phrase: str) -> str:
    """Return the phrase with its indefinite article."""
    return sentence("a " + noun_phrase)[:1].lower() + sentence("a " + noun_phrase)[1:]


def describe(item: Item) -> str:
    """Return "a small striped red circle"."""
    return article(f"{item.size} {item.texture} {item.colour} {item.shape}")


def caption(scene: AnyScene) -> str:
    """Return the scene's caption: objects in raster order, then the background."""
    if isinstance(scene, FlagScene):
        return f"the flag of {scene.country}"
    parts = [f"{describe(item)} at the {CELLS[item.cell]}" for item in scene.items]
    return f"{' and '.join(parts)} on {article(scene.background)} background"


_LAYOUTS = {"v": "vertical stripes", "h": "horizontal stripes", "cross": "a cross", "plus": "a cross", "disc": "a disc"}


def _yes(claim: bool) -> str:
    return "yes" if claim else "no"


def _about_flag(kind: str, slots: tuple[str, ...], country: str) -> str | None:
    if kind in FLAG_CLAIM_KINDS:
        return _yes((slots[0] == country) == (kind == "flag_check"))
    capital, continent = COUNTRIES[country]
    layout, inks = FLAGS[country]
    colours = ["blue" if ink == "sky" else ink for ink in inks]
    return {
        "flag": country,
        "flag_capital": capital,
        "flag_continent": continent,
        "flag_colours": f"{', '.join(colours[:-1])} and {colours[-1]}",
        "flag_layout": _LAYOUTS[layout],
    }.get(kind)


def _find(scene: Scene, **wanted: object) -> Item | None:
    found = [item for item in scene.items if all(getattr(item, name) == value for name, value in wanted.items())]
    return found[0] if len(found) == 1 else None


def _properties(item: Item) -> dict[str, str]:
    return {"colour": item.colour, "size": item.size, "texture": item.texture, "where": f"at the {CELLS[item.cell]}"}


def _short(item: Item) -> str:
    return article(f"{item.colour} {item.shape}")


def answer_to(kind: str, slots: tuple[str, ...], scene: AnyScene) -> str | None:
    """Return the right answer to a question on a scene, or None where the question makes no sense there."""
    if isinstance(scene, FlagScene):
        return _about_flag(kind, slots, scene.country)
    if kind in ("colour", "size", "texture", "where", "describe", "complement"):
        item = _find(scene, shape=slots[0])
        if item is None:
            return None
        if kind == "complement":
            return COMPLEMENTS.get(item.colour)
        return describe(item) if kind == "describe" else _properties(item)[kind].removeprefix("at the ")
    if kind in ("shape", "describe_colour", "sides"):
        item = _find(scene, colour=slots[0])
        if item is None:
            return None
        return {"shape": item.shape, "describe_colour": describe(item), "sides": SIDES.get(item.shape)}[kind]
    if kind == "at":
        item = _find(scene, cell=CELLS.index(slots[0]))
        return _short(item) if item else "nothing"
    if kind == "count":
        return NUMBERS[len(scene.items)]
    if kind in ("exist", "exist_pair", "absent"):
        named = set(slots[0].split()) - {"object"}
        return _yes(any(named <= {item.colour, item.shape} for item in scene.items) == (kind != "absent"))
    if kind in ("check", "denied"):
        true = _check(scene, *slots)
        return None if true is None else _yes(true == (kind == "check"))
    if kind == "relation":
        return _relation(scene, *slots)
    if kind == "beside":
        return _beside(scene, *slots)
    return scene.background if kind == "background" else None


def _check(scene: Scene, subject: str, claim: str) -> bool | None:
    if subject == "background":
        return scene.background == claim
    item = _find(scene, shape=subject)
    if item is None:
        return None
    return claim in _properties(item).values()


def _relation(scene: Scene, first: str, direction: str, second: str) -> str | None:
    a, b = _find(scene, shape=first), _find(scene, shape=second)
    if a is None or b is None:
        return None
    rows, columns = b.cell // GRID - a.cell // GRID, b.cell % GRID - a.cell % GRID
    down, right = DIRECTIONS[direction]
    along = -(rows * down + columns * right)
    return None if along == 0 else ("yes" if along > 0 else "no")


def _beside(scene: Scene, direction: str, shape: str) -> str | None:
    item = _find(scene, shape=shape)
    if item is None:
        return None
    row, column = (c + d for c, d in zip(divmod(item.cell, GRID), DIRECTIONS[direction], strict=True))
    if not (0 <= row < GRID and 0 <= column < GRID):
        return None
    other = _find(scene, cell=row * GRID + column)
    return _short(other) if other else "nothing"


def ask(scene: AnyScene, kind: str, rng: random.Random) -> Question | None:
    """Draw one question of a kind about a scene; None where the scene has none."""
    slots = _slots(scene, kind, rng)
    if slots is None:
        return None
    answer = answer_to(kind, slots, scene)
    return None if answer is None else Question(kind, slots, answer)


def _slots(scene: AnyScene, kind: str, rng: random.Random) -> tuple[str, ...] | None:
    if isinstance(scene, FlagScene):
        if kind in FLAG_CLAIM_KINDS:
            return (scene.country if rng.random() < 0.5 else rng.choice([c for c in FLAGS if c != scene.country]),)
        return () if kind in (*FLAG_KINDS, "flag_continent") else None
    if kind in ("count", "background"):
        return ()
    item = rng.choice(scene.items)
    if kind in ("colour", "size", "texture", "where", "describe", "complement"):
        return (item.shape,)
    if kind in ("shape", "describe_colour", "sides"):
        return (item.colour,)
    if kind == "at":
        return (CELLS[item.cell] if rng.random() < 0.8 else rng.choice(CELLS),)
    if kind == "absent":
        kind = rng.choice(("exist", "exist_pair"))
    if kind == "exist":
        if rng.random() < 0.5:
            return (rng.choice([item.shape, rng.choice(SHAPES)]),)
        return (f"{rng.choice([item.colour, rng.choice(tuple(COLOURS))])} object",)
    if kind == "exist_pair":
        return (_claimed_pair(scene, item, rng),)
    if kind in ("check", "denied"):
        if rng.random() < 0.15:
            return "background", scene.background if rng.random() < 0.5 else rng.choice(tuple(BACKGROUNDS))
        name = rng.choice(("colour", "size", "texture", "where"))
        true = _properties(item)[name]
        choices = {"colour": tuple(COLOURS), "size": SIZES, "texture": TEXTURES,
                   "where": tuple(f"at the {cell}" for cell in CELLS)}[name]  # fmt: skip
        if name == "colour" and len(scene.items) > 1 and rng.random() < 0.7:
            choices = tuple(other.colour for other in scene.items)
        return item.shape, true if rng.random() < 0.5 else rng.choice([c for c in choices if c != true])
    if kind == "relation" and len(scene.items) > 1:
        other = rng.choice([o for o in scene.items if o is not item])
        usable = [d for d in DIRECTIONS if _relation(scene, item.shape, d, other.shape) is not None]
        return item.shape, rng.choice(usable), other.shape
    if kind == "beside":
        return rng.choice([d for d in DIRECTIONS if _beside(scene, d, item.shape) is not None]), item.shape
    return None


def _claimed_pair(scene: Scene, item: Item, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{item.colour} {item.shape}"
    # A false claim is near the truth: one of its two words is in the image, often both.
    others = [o for o in scene.items if o is not item]
    if others and rng.random() < 0.5:
        return f"{rng.choice(others).colour} {item.shape}"
    if rng.random() < 0.5:
        return f"{item.colour} {rng.choice([s for s in SHAPES if s != item.shape])}"
    return f"{rng.choice([c for c in COLOURS if c != item.colour])} {item.shape}"


def every_word() -> Iterator[str]:
    """Yield texts that together contain every word the grammar can say."""
    for kind, templates in TEMPLATES.items():
        yield from (*templates, *MORE.get(kind, ()))
    yield from (*CAPTION_PROMPTS, *MORE["caption"])
    yield from phrases.every_word()
    yield from (*SHAPES, *COLOURS, *SIZES, *TEXTURES, *CELLS, *BACKGROUNDS, *NUMBERS, *DIRECTIONS, *FLAGS)
    yield from (COUNTRIES[country][0] for country in FLAGS)
    yield from _LAYOUTS.values()
    yield ", yes no nothing a an the and at on of flag background small Small"
    for whole, _ in NOVEL.values():
        yield from whole
