"""Other targets for a record, so that SERAC's counterfactual model learns to copy and not what it copied."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastedit.backbone import EditableModel

#: How a vocabulary marks the space before a word: byte-level BPE, SentencePiece.
SPACES = ("\u0120", "\u2581")
#: Of how many words an invented target is, by lot.
LENGTHS = (1, 1, 2, 3)


class Targets:
    """Targets of other records, and words of the vocabulary by lot.

    Args:
        model: its tokenizer has the words. known: targets of the records that are learned from.
        invented: share of words by lot; there are none where the vocabulary marks no words.
    """

    def __init__(self, model: EditableModel, known: Sequence[str], invented: float) -> None:
        self.known, self.invented = tuple(known), invented
        self.words = words_of(model) if invented else ()

    def other(self, rng: random.Random) -> str:
        """One of them by lot."""
        if self.words and rng.random() < self.invented:
            return " ".join(rng.choice(self.words) for _ in range(rng.choice(LENGTHS)))
        return rng.choice(self.known)


def words_of(model: EditableModel) -> tuple[str, ...]:
    """Words of at least three letters that are one token of the model's vocabulary each, behind a space."""
    found = (token[1:] for token in sorted(model.tokenizer.get_vocab()) if token[:1] in SPACES)
    return tuple(word for word in found if len(word) >= 3 and word.isascii() and word.isalpha())
