"""What is asked of one training picture, in wordings of the first set alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from fastedit.smol.concepts import flags, icons
from fastedit.smol.factory.packing import Line
from fastedit.smol.facts import Fact
from fastedit.smol.grammar import ask
from fastedit.smol.scenes import Scene, draw_scene

#: Of a layout: how likely a question of each kind is; more than one is that many at least.
MIX: dict[str, dict[str, float]] = {
    "one": {
        "name": 2,
        "flag": 2,
        "caption": 0.7,
        "background": 0.5,
        "exist": 1,
        "absent": 0.5,
        "count": 0.3,
        "is_background": 0.3,
        "is_count": 0.2,
    },
    "pair": {
        "at": 2,
        "flag_at": 2,
        "where": 1.5,
        "beside": 1,
        "caption": 0.8,
        "background": 0.3,
        "exist": 1,
        "absent": 0.5,
        "count": 0.2,
        "is_background": 0.2,
        "is_count": 0.2,
    },
    "copies": {"count": 2, "background": 0.6, "exist": 1, "absent": 0.5, "is_count": 1, "is_background": 0.3},
}
#: How likely a picture of a pair, and one of copies, is; the others show one thing.
_PAIR, _COPIES, _SHORT_PAIR = 0.42, 0.15, 0.4  # fmt: skip


class Mixture:
    """Draws pictures and what is asked of them.

    Args:
        facts: what may be asked through a picture, by its subject. texts: questions without a picture and what the
            unchanged language model says. seed: of everything. after: texts that have a pattern before them.
    """

    def __init__(
        self, facts: Mapping[str, Sequence[Fact]], texts: Sequence[Line], seed: int, after: Sequence[Line] = ()
    ) -> None:
        self._facts, self._texts, self._after = facts, texts, after
        self._rng = random.Random(f"mixture:{seed}")
        self._icons = tuple(concept.name for concept in icons())
        self._flags = tuple(concept.name for concept in flags())
        # How often each name is drawn; those that are still wrong, more often
        self._weight = dict.fromkeys((*self._icons, *self._flags), 1.0)

    def note(self, name: str, *, is_right: bool) -> None:
        """Take account of an answer: what was not named will be drawn more often."""
        self._weight[name] = 0.8 * self._weight[name] + 0.2 * (0.7 if is_right else 3.0)

    def draw_short(self, *, texts: int = 1) -> tuple[Scene, list[Line]]:
        """Return a picture, what it shows, asked once of one icon, twice of a pair, and a text: 75 to 95 tokens.

        Args:
            texts: questions without a picture.
        """
        rng = self._rng
        scene = self._scene("pair" if rng.random() < _SHORT_PAIR else "one")
        kinds = ("name", "flag") if len(scene.shown) == 1 else ("at", "flag_at")
        asked = [ask(scene, kind, rng) for kind in kinds for _ in scene.shown]
        lines = [Line(one.kind, rng.choice(one.prompts), one.answer) for one in asked if one is not None][:2]
        return scene, [*lines, *rng.sample(self._texts, texts)]

    def draw(self, *, texts: int = 8, after: float = 1.0, knowledge: int = 2) -> tuple[Scene, list[Line]]:
        """Return a picture and the lines that are asked of it, some of them about no picture."""
        rng = self._rng
        layout = rng.choices(("one", "pair", "copies"), (1 - _PAIR - _COPIES, _PAIR, _COPIES))[0]
        scene = self._scene(layout)
        lines = []
        for kind, likely in MIX[layout].items():
            for _ in range(int(likely) + (rng.random() < likely % 1)):
                question = ask(scene, kind, rng)
                if question is not None:
                    lines.append(Line(kind, rng.choice(question.prompts), question.answer))
        if layout == "one":
            known = list(self._facts.get(scene.names[0], ()))
            for fact in rng.sample(known, min(knowledge, len(known))):
                lines.append(Line(f"knows:{fact.relation}", rng.choice(fact.seen_prompts()), fact.answer))
        lines += rng.sample(self._texts, texts)
        if self._after:
            lines += rng.sample(self._after, int(after) + (rng.random() < after % 1))
        rng.shuffle(lines)
        return scene, lines

    def _scene(self, layout: str) -> Scene:
        rng = self._rng
        names = self._flags if rng.random() < 0.25 else self._icons
        if layout == "pair" and rng.random() < 0.3:
            names = self._icons + self._flags
        chosen = list(dict.fromkeys(rng.choices(names, [self._weight[name] for name in names], k=4)))
        return draw_scene(rng, tuple(chosen if len(chosen) > 1 else names), layout=layout)
