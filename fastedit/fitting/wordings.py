"""Other ways to put a question, by rules: what is asked stays, how it is asked does not.

For training what must know a question again in words that it has never seen. Nothing here knows a data set: rules
change manner (frames around a question, case, marks), order, small words and spelling, several of them at a time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

#: What people say around a question.
FRAMES = (
    "Please tell me: {}", "Please answer: {}", "Could you tell me, {}", "I would like to know: {}", "Question: {}",
    "{} Thank you.", "{} Answer in one word.", "Hello! {}", "Quick question. {}", "{} I am curious.",
    "Look closely. {}", "Someone asked me this, and I do not know what to say. {}",
    "We have talked about many things today, and here is one more. {}",
)  # fmt: skip
#: Words that can go without changing what a short question is about: no asking word but the plainest, no preposition.
SMALL = frozenset(
    ("a", "an", "the", "is", "are", "was", "does", "do", "did", "has", "have", "had", "of", "me", "you", "what",
     "which", "please")
)  # fmt: skip
#: What a question may begin with; each stands for any other.
OPENINGS = ("What is", "Which is", "Tell me", "Say", "Name", "Give me", "Let me know", "Find out", "I wonder about")
#: A beginning that says no more than that something is asked.
_ASKING = re.compile(r"^(what is|what are|which is|what|which|tell me|name|give me)\b", re.IGNORECASE)
_MARKS = "?.!"


def reworded(question: str, rng: random.Random) -> str:
    """The question put in another way, by one to three rules, the same for the same random state.

    Args:
        question: any text. rng: what is drawn from.
    Returns:
        str, never empty; the question itself where no rule finds anything to change.
    """
    text = question.strip()
    for rule in rng.sample(_RULES, rng.randint(1, 3)):
        text = rule(text, rng).strip() or text
    return text


def _framed(text: str, rng: random.Random) -> str:
    return rng.choice(FRAMES).format(text)


def _careless(text: str, _rng: random.Random) -> str:
    """Lower case, without the mark at the end."""
    return text.lower().rstrip(_MARKS)


def _turned(text: str, rng: random.Random) -> str:
    """Begun somewhere else: what stood before follows."""
    words = text.rstrip(_MARKS).split()
    if len(words) < 3:
        return text
    cut = rng.randrange(1, len(words))
    return f"{' '.join(words[cut:])}, {' '.join(words[:cut]).lower()}{rng.choice(('?', '', '.'))}"


def _sparse(text: str, rng: random.Random) -> str:
    """With fewer of the small words, or none."""
    share = rng.choice((0.5, 1.0))
    words = [word for word in text.split() if _bare(word) not in SMALL or rng.random() >= share]
    return " ".join(words)


def _opened(text: str, rng: random.Random) -> str:
    """Begun with other words."""
    found = _ASKING.match(text)
    if found is None:
        return text
    rest = text[found.end() :].lstrip()
    return f"{rng.choice(OPENINGS)} {rest}"


def _misspelt(text: str, rng: random.Random) -> str:
    """Two letters inside one longer word swapped, or one of them lost."""
    words = text.split()
    long = [number for number, word in enumerate(words) if len(_bare(word)) > 3]
    if not long:
        return text
    number = rng.choice(long)
    word = words[number]
    place = rng.randrange(1, len(_bare(word)) - 1)
    middle = word[place + 1] + word[place] if rng.random() < 0.5 else word[place]
    words[number] = word[:place] + middle + word[place + 2 :]
    return " ".join(words)


def _bare(word: str) -> str:
    return word.strip("?.!,:;").lower()


_RULES: tuple[Callable[[str, random.Random], str], ...] = (_framed, _careless, _turned, _sparse, _opened, _misspelt)
