"""Which questions of records are one question in other words, and which are nearest in words and ask something else."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastedit.backbone import EditableModel
from fastedit.methods.captured import answered
from fastedit.requests import EditRequest, Query

#: So many of the nearest are drawn from.
NEAREST = 8
#: Siblings of a record.
COUNT = 2


class Classes:
    """Keys that were said to be the same, directly or through others."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._number: dict[str, int] = {}

    def _root(self, key: str) -> str:
        self._parent.setdefault(key, key)
        while self._parent[key] != key:
            # Halving the path keeps it short
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, a: str, b: str) -> None:
        """Say that two keys are the same."""
        self._parent[self._root(a)] = self._root(b)

    def number(self, key: str) -> int:
        """The number of the key's class, the same for all of its keys."""
        return self._number.setdefault(self._root(key), len(self._number))


class Siblings:
    """Questions of other records that share most words with a record's own and are none of its wordings.

    Two questions are one where any record gives them as question and rephrase, directly or through others: "What colour
    is the square?" is a sibling of "What colour is the circle?", "What color is the circle?" is not, if records say so.

    Args:
        records: whose questions are known.
    """

    def __init__(self, records: Sequence[EditRequest]) -> None:
        self._classes = Classes()
        prompts: dict[str, str] = {}
        for record in records:
            prompts.setdefault(normal_words(record.prompt), record.prompt)
            if record.rephrase is not None:
                self._classes.join(normal_words(record.prompt), normal_words(record.rephrase))
                prompts.setdefault(normal_words(record.rephrase), record.rephrase)
        self._prompts = [(key, text, frozenset(key.split())) for key, text in sorted(prompts.items())]
        self._nearest: dict[str, list[str]] = {}

    def of(self, prompt: str, rng: random.Random, count: int) -> list[str]:
        """Up to ``count`` siblings of a question, drawn from the nearest."""
        key = normal_words(prompt)
        if key not in self._nearest:
            own, words = self._classes.number(key), frozenset(key.split())
            others = [
                (len(words & other) / len(words | other), text)
                for name, text, other in self._prompts
                if self._classes.number(name) != own
            ]
            # Words that nothing shares make no sibling
            ranked = sorted((each for each in others if each[0] > 0), key=lambda each: (-each[0], each[1]))
            self._nearest[key] = [text for _, text in ranked[:NEAREST]]
        nearest = self._nearest[key]
        return rng.sample(nearest, min(count, len(nearest)))


def siblings_of(model: EditableModel, records: Sequence[EditRequest], seed: int) -> list[list[str]]:
    """Up to ``COUNT`` questions by record that are nearly in its words and ask something else about its image.

    Words do not tell what is asked: where few records say which questions are one, "What does this show?" is the
    nearest to "What does it show?". So what the unedited model answers about the image as the record's own question is
    no sibling of it. A record without an image, or whose own answer is not known, has none.

    Args:
        model: no delta may act. records: with their images. seed: of the draws.
    """
    known = Siblings(records)
    waiting = {
        number: known.of(record.prompt, random.Random(f"{seed}|{number}|siblings"), NEAREST)
        for number, record in enumerate(records)
        if record.image is not None and record.prediction
    }
    found: list[list[str]] = [[] for _ in records]
    while waiting:
        drawn = [(number, text) for number, texts in waiting.items() for text in texts[: COUNT - len(found[number])]]
        asked = [Query(text, records[number].image, records[number].prediction) for number, text in drawn]
        for (number, text), alike in zip(drawn, answered(model, asked), strict=True):
            waiting[number].remove(text)
            if not alike:
                found[number].append(text)
        waiting = {number: texts for number, texts in waiting.items() if texts and len(found[number]) < COUNT}
    return found


def normal_words(prompt: str) -> str:
    """A text without what case and spaces add."""
    return " ".join(prompt.lower().split())
