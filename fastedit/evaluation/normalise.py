"""Comparing generated answers with targets: VQA normalisation, exact match, token F1, contains.

The rules are those of the VQA challenge (Antol et al., arXiv 1505.00468), so that strict scores mean what the VQA
literature means by a right answer. Ours beside them: text is brought to one Unicode form first, and an answer that
normalises to nothing ("the", "?") is compared as it was written.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
#: A period that does not begin the decimals of a number.
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


#: Contractions by ending. What is a word of its own without the apostrophe (its, were, well, id) is left out.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might must should they we would you",
    "'d": "he how it that there they what where who why you",
    "'ll": "how it that there they what who why you",
    "'re": "there they what you",
    "'s": "he here how let she somebody someone something that there what when where who why",
    "'m": "i",
}
_WHOLE = [word + ending for ending, words in _ENDINGS.items() for word in words.split()] + ["y'all", "ma'am", "o'clock"]
_CONTRACTIONS = {word.replace("'", ""): word for word in _WHOLE}


def normalise(text: str) -> str:
    """Return an answer in the form in which answers are compared.

    Lower case; punctuation removed, or a blank in its place where it joins two words; thousands separators and
    final periods removed; number words up to ten as digits ("none" is 0); articles dropped; missing apostrophes of
    contractions put back; single blanks.
    """
    text = unicodedata.normalize("NFC", text).replace("’", "'").lower()
    text = " ".join(text.split())
    # As the challenge does it: a mark vanishes everywhere if it touches a blank anywhere or if the text holds a number
    # with a thousands separator; else it joins words ("us-1") and becomes a blank.
    glued = bool(_THOUSANDS.search(text))
    for mark in _MARKS:
        if mark in text:
            alone = glued or f"{mark} " in text or f" {mark}" in text
            text = text.replace(mark, "" if alone else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _pair(answer: str, target: str) -> tuple[list[str], list[str]]:
    """Return the words of both as they are compared."""
    first, second = normalise(answer), normalise(target)
    if first and second:
        return first.split(), second.split()
    # "a" and "the" both normalise to nothing, and still are different answers.
    return answer.casefold().split(), target.casefold().split()


def exact_match(answer: str, target: str) -> bool:
    """Return whether an answer is the target after normalisation."""
    first, second = _pair(answer, target)
    return first == second


def contains(answer: str, target: str) -> bool:
    """Return whether the normalised target occurs in the normalised answer, as whole words in a row."""
    first, second = _pair(answer, target)
    if not second:
        return not first
    return any(first[start : start + len(second)] == second for start in range(len(first) - len(second) + 1))


def token_f1(answer: str, target: str) -> float:
    """Return the harmonic mean of word precision and recall after normalisation; words count as often as they occur."""
    first, second = _pair(answer, target)
    if not first or not second:
        return float(first == second)
    common = (Counter(first) & Counter(second)).total()
    return 2 * common / (len(first) + len(second))
