"""Questions in many more words than the templates: frames, politeness, preambles, and careless typing.

Applied to templates with their slots still open, so that what a question is about is never misspelled.
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Sequence

from fastedit.pocket.facts import RELATIONS, Fact, with_articles
from fastedit.pocket.phrases import AFTER, FACT_PARTS, FRAMES, PARTS, POLITE, PREAMBLE, THANKS, Parts
from fastedit.pocket.templates import CAPTION_PROMPTS, MORE, TEMPLATES
from fastedit.pocket.unseen import TEMPLATES as TEMPLATES_UNSEEN

FRAMED = 0.5  # share of questions put together from phrases instead of taken from the templates


def worded(kind: str, slots: Sequence[str], rng: random.Random) -> str:
    """Return a question of a kind (or "caption") in words drawn at random."""
    templates = (*(CAPTION_PROMPTS if kind == "caption" else TEMPLATES[kind]), *MORE[kind])
    parts = PARTS["exist" if kind == "exist_pair" else kind]
    while True:
        template = dressed(_framed(parts, rng) if rng.random() < FRAMED else rng.choice(templates), rng)
        if normal(template) not in _untrained(kind):
            return _begun(template, slots, rng)


def worded_fact(fact: Fact, rng: random.Random) -> str:
    """Return a question for a fact in words drawn at random, never those of its untrained template."""
    templates = RELATIONS[fact.relation][1]
    trained = [template for template in templates if template != templates[fact.untrained]]
    template = rng.choice(trained)
    if rng.random() < FRAMED:
        framed = _framed(FACT_PARTS[fact.relation], rng)
        if normal(framed) != normal(templates[fact.untrained]):
            template = framed
    return _begun(dressed(template, rng), (fact.subject,), rng)


@functools.cache
def _untrained(kind: str) -> frozenset[str]:
    """Return the second set's wordings of a kind: typing errors alone could make one of them."""
    return frozenset(map(normal, TEMPLATES_UNSEEN.get(kind, ())))


def _begun(template: str, slots: Sequence[str], rng: random.Random) -> str:
    """Return the filled template; a slot that it begins with has a capital letter as a rule, as any first word."""
    text = filled(template, slots)
    return text[:1].upper() + text[1:] if template.startswith("{}") and rng.random() < 0.7 else text


def normal(text: str) -> str:
    """Return the text without case, punctuation and doubled spaces: what makes two wordings the same."""
    kept = "".join(c if c.isalnum() or c in "{}" else " " for c in text.lower())
    return " ".join(kept.split())


def filled(template: str, slots: Sequence[str]) -> str:
    """Return the template with its slots filled, its letters' case kept."""
    return with_articles(template.format(*slots))


def _framed(parts: Parts, rng: random.Random) -> str:
    ways = [field for field in FRAMES if getattr(parts, field)]
    field = rng.choice(ways)
    text: str = rng.choice(FRAMES[field]).replace("{}", rng.choice(getattr(parts, field)), 1)
    return text[:1].upper() + text[1:]


def dressed(template: str, rng: random.Random) -> str:
    """Return the template as it is (half the time), or with politeness, a preamble, or carelessly typed."""
    if rng.random() < 0.4:
        return template
    text = template
    if rng.random() < 0.3:
        mark = text[-1] if text[-1] in ".?" else ""
        text = text[: len(text) - len(mark)] + rng.choice(THANKS) + mark
    if rng.random() < 0.2:
        text = rng.choice(POLITE) + text[:1].lower() + text[1:]
    if rng.random() < 0.35:
        text = f"{_preamble(rng)} {text}"
    if rng.random() < 0.15:
        text += rng.choice(AFTER)
    return _careless(text, rng)


def _preamble(rng: random.Random) -> str:
    sentences = []
    for _ in range(1 if rng.random() < 0.7 else 2):
        words = [_invented(rng) if rng.random() < 0.12 else rng.choice(PREAMBLE) for _ in range(rng.randint(2, 11))]
        text = " ".join(words)
        sentences.append(text[:1].upper() + text[1:] + rng.choice("...!:,"))
    return " ".join(sentences)


def _invented(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 9)))


def _careless(text: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    elif text[-1] in "?.!" and rng.random() < 0.1:
        text = text[:-1] + " " + text[-1]
    if rng.random() < 0.3:
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if len(word) > 1 and word.isalpha()]
        for place in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 3)))):
            words[place] = _misspelled(words[place], rng)
        text = " ".join(words)
    return text


def _misspelled(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    how = rng.randrange(3)
    if how == 0:  # two letters in the wrong order
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if how == 1 else word[: at + 1] + word[at:]  # one left out, one doubled
