"""What the models are shown: training rows drawn fresh for every step, and the held-out rows they are measured on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastedit.pocket import facts, grammar, templates, unseen
from fastedit.pocket.easyvqa import easy_scenes
from fastedit.pocket.factory.packing import Line, Packer, fill
from fastedit.pocket.factory.wording import dressed, worded, worded_fact
from fastedit.pocket.facts import with_articles
from fastedit.pocket.world import FLAGS, AnyScene, FlagScene, draw_flag, draw_scene, render

if TYPE_CHECKING:
    from PIL import Image

KINDS = (*templates.SCENE_KINDS, *templates.FLAG_KINDS)
CLAIM_KINDS = (*templates.CLAIM_KINDS, *templates.FLAG_CLAIM_KINDS)
REWORDED = "reworded:"  # before a kind: asked in a wording that nothing is trained on


@dataclasses.dataclass(frozen=True)
class Mix:
    """Shares of one training phase.

    kinds: relative frequency of question kinds; loss: weight of an answer token of a kind (1 where not named).
    """

    caption: float = 1.0
    questions: bool = True
    facts: float = 0.15
    budget: int = 176
    rows: int = 32
    easy: float = 0.16
    flags: float = 0.14
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _fact_line(rng: random.Random, known: Sequence[facts.Fact]) -> Line:
    fact = rng.choice(known)
    return Line("fact", worded_fact(fact, rng), fact.answer, with_image=False)


def _caption_line(scene: AnyScene, rng: random.Random) -> Line:
    return Line("caption", worded("caption", (), rng), grammar.caption(scene))


class Mixer:
    """Draws training rows."""

    def __init__(self, packer: Packer, seed: int) -> None:
        self.packer, self.rng, self.facts = packer, random.Random(seed), facts.FACTS

    def batch(self, mix: Mix) -> tuple[list[list[Line]], list[Image.Image]]:
        """Return (lines of every row, its image)."""
        rows, images = [], []
        for _ in range(mix.rows):
            lines, image = self._row(mix)
            rows.append(fill(self.packer, lines, mix.budget, self.rng))
            images.append(image)
        return rows, images

    def _row(self, mix: Mix) -> tuple[list[Line], Image.Image]:
        rng = self.rng
        share = rng.random()
        if mix.questions and share < mix.easy:
            easy = rng.choice(easy_scenes("train"))
            lines = [
                Line("easy", with_articles(dressed(q, rng)), a)
                for q, a in rng.sample(easy.questions, len(easy.questions))
            ]
            return self._padded(lines, mix), easy.image()
        if share < mix.easy + mix.flags:
            scene: AnyScene = draw_flag(rng)
            assert isinstance(scene, FlagScene)
            lines = [_caption_line(scene, rng)]
            if mix.questions:
                known = scene.country in templates.CAPITAL_TRAINED
                for kind in (*templates.FLAG_KINDS, *templates.FLAG_CLAIM_KINDS):
                    if kind != "flag_capital" or known:
                        lines += [self._question(scene, kind) for _ in range(2)]
            return self._padded(lines, mix), render(scene)
        scene = draw_scene(rng)
        lines = [_caption_line(scene, rng)] if rng.random() < mix.caption else []
        if mix.questions:
            asked = (*templates.SCENE_KINDS, *templates.CLAIM_KINDS)
            for kind in rng.choices(asked, [mix.kinds.get(kind, 1.0) for kind in asked], k=20):
                question = grammar.ask(scene, kind, rng)
                if rng.random() < mix.facts:
                    lines.append(_fact_line(rng, self.facts))
                elif question:
                    lines.append(Line(kind, worded(kind, question.slots, rng), question.answer))
        return lines, render(scene)

    def _padded(self, lines: list[Line], mix: Mix) -> list[Line]:
        return lines + [_fact_line(self.rng, self.facts) for _ in range(10 if mix.questions else 2)]

    def _question(self, scene: AnyScene, kind: str) -> Line:
        question = grammar.ask(scene, kind, self.rng)
        if question is None:
            raise ValueError(f"Mixer: no question of kind {kind!r} about {scene}")
        return Line(kind, worded(kind, question.slots, self.rng), question.answer)


def held_out(kind: str, n: int, seed: int = 12345) -> list[tuple[Line, Image.Image | None]]:
    """Return n fresh test samples of a kind, the same for equal arguments.

    Kinds: those of KINDS and CLAIM_KINDS, "caption", "flag_caption", "easy" (test split), "fact" and "fact_untrained"
    (all facts at most), "unseen:<kind>" (an object pair never trained), and the never-trained two-hop kinds
    "flag_capital_untrained", "flag_continent", "sides", "complement"; "reworded:<kind>" for a kind in the wordings of
    `fastedit.pocket.unseen`.
    """
    rng = random.Random(f"{kind}:{seed}")
    reworded, kind = kind.startswith(REWORDED), kind.removeprefix(REWORDED)
    samples: list[tuple[Line, Image.Image | None]] = []
    if kind in ("fact", "fact_untrained"):
        for fact in facts.FACTS:
            prompt = fact.prompts[fact.untrained] if kind == "fact_untrained" else rng.choice(fact.trained())
            if reworded:
                prompt = rng.choice(unseen.fact(fact.relation, fact.subject))
            samples.append((Line(kind, prompt, fact.answer, with_image=False), None))
        return samples[:n] if n >= len(samples) else rng.sample(samples, n)
    if kind == "easy":
        for scene in rng.choices(easy_scenes("test"), k=n):
            prompt, answer = rng.choice(scene.questions)
            samples.append((Line(kind, prompt, answer), scene.image()))
        return samples
    new_pair, name = kind.startswith("unseen:"), kind.removeprefix("unseen:")
    while len(samples) < n:
        drawn: AnyScene
        if name.startswith("flag"):
            untrained = tuple(c for c in FLAGS if c not in templates.CAPITAL_TRAINED)
            countries = {"flag_capital": templates.CAPITAL_TRAINED, "flag_capital_untrained": untrained}
            drawn = draw_flag(rng, countries.get(name, tuple(FLAGS)))
        else:
            drawn = draw_scene(rng, held_out=new_pair)
        if name.endswith("caption"):
            prompts = unseen.worded("caption", ()) if reworded else templates.CAPTION_PROMPTS
            samples.append((Line(kind, rng.choice(prompts), grammar.caption(drawn)), render(drawn)))
            continue
        question = grammar.ask(drawn, name.removesuffix("_untrained"), rng)
        if question is not None:
            prompts = question.unseen if reworded else question.prompts
            samples.append((Line(kind, rng.choice(prompts), question.answer), render(drawn)))
    return samples
