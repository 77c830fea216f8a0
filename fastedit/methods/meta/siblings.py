"""Which questions of records are one question in other words, and which are nearest in words and ask something else."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastedit.requests import EditRequest

#: So many of the nearest are drawn from.
NEAREST = 8


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


def normal_words(prompt: str) -> str:
    """A text without what case and spaces add."""
    return " ".join(prompt.lower().split())
