"""Ask a model questions, feed it answers, and let it write its own, as many at once as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded
from fastedit.backbone.generation import Reader, likeliest
from fastedit.engine.memory.oom import Halving
from fastedit.evaluation.metrics import AskedRow
from fastedit.requests import Query

# Bytes for the keys and values of the questions that are read together, and for the logits held at a time
MEMORY = 1 << 30
LOGITS = 64 << 20


class Asker:
    """Asks the rows of an evaluation, some at a time.

    An answer that is fed shows greedy decoding as far as its tokens are the argmax: only the rest is decoded.

    Args:
        model: frozen.
        max_new_tokens: longest generated answer.
        memory: most bytes for keys and values, by which questions are taken a part at a time.
        row_limit: most questions at a time; half as many from where memory runs out.
    """

    def __init__(
        self, model: EditableModel, *, max_new_tokens: int = 48, memory: int = MEMORY, row_limit: int = 256
    ) -> None:
        self.model = model
        self.max_new_tokens, self.memory = max_new_tokens, memory
        self._room = Halving(model, row_limit, "asking {} questions")

    def ask(
        self,
        rows: Sequence[AskedRow],
        part: Callable[[Sequence[AskedRow], Encoded], None],
        queries: Callable[[Sequence[AskedRow]], Sequence[Query]],
    ) -> None:
        """Hand over all rows in order, as many at a time as there is room for, with their encoded prompts.

        Args:
            part: fills in some rows. queries: what is asked of rows.
        """
        done = 0
        while done < len(rows):
            chosen = rows[done : done + self._room.size]
            with self._room.trial(len(chosen)):
                encoded = self.model.encode(queries(chosen), answers=False)
                some = chosen[: self.fitting(encoded)]
                self._room.trying = len(some)
                part(some, encoded if len(some) == len(encoded) else encoded.select(range(len(some))))
                done += len(some)
                self._room.done += len(some)

    def fitting(self, encoded: Encoded) -> int:
        """How many of these rows have room for their keys and values."""
        width = self.model.stored_per_token * torch.finfo(self.model.dtype).bits // 8
        capacity = int(encoded.lengths.max()) + self.max_new_tokens
        return max(1, min(len(encoded), self.memory // (width * capacity)))

    def feed(self, reader: Reader, last: Tensor, answers: dict[int, tuple[int, ...]]) -> Tensor:
        """Final hidden states (T, d) that predict the answers' tokens, rows in order; ``last`` (R, d) ends prompts."""
        rows = sorted(answers)
        if not rows:
            return last[:0]
        inner = {row: answers[row][:-1] for row in rows if len(answers[row]) > 1}
        states = reader.extend(inner, dict.fromkeys(inner, 0)) if inner else last[:0]
        # The first token is predicted by the end of the prompt, the others by the tokens before them
        source, start, order = torch.cat([last, states]), len(last), []
        for row in rows:
            order += [row, *range(start, start + len(answers[row]) - 1)]
            start += len(answers[row]) - 1
        return source[torch.tensor(order, device=last.device)]

    def agreed(
        self, reader: Reader, last: Tensor, states: Tensor, answers: dict[int, tuple[int, ...]], most: Sequence[int]
    ) -> tuple[dict[int, list[int]], dict[int, int]]:
        """By row: the fed tokens that greedy decoding gives as well; and the token after them, where it goes on.

        Where nothing is fed, that is the token after the prompt, whose end is in ``last`` (R, d). Rows whose logits are
        not finite are noted with the reader, and do not go on.
        """
        (chosen, sound), written, coming = self.likeliest(states), {}, {}
        start = 0
        for row in sorted(answers):
            labels, predicted = answers[row], chosen[start : start + len(answers[row])]
            good = all(sound[start : start + len(labels)])
            start += len(labels)
            same = next(
                (n for n, pair in enumerate(zip(labels, predicted, strict=True)) if pair[0] != pair[1]), len(labels)
            )
            # All of it, the end token included, is the whole answer
            written[row] = list(labels[: min(same, len(labels) - 1, most[row])])
            if not good:
                reader.broken.add(row)
            elif same < len(labels) and len(written[row]) < most[row]:
                coming[row] = predicted[same]
        free = [row for row in range(len(last)) if row not in answers]
        for row, token, good in zip(free, *self.likeliest(last[free]), strict=True):
            if good:
                coming[row] = token
            else:
                reader.broken.add(row)
                written[row] = []
        return written, coming

    def likeliest(self, states: Tensor) -> tuple[list[int], list[bool]]:
        """Token of the largest logit of every final hidden state (T, d), and whether that is finite."""
        tokens: list[int] = []
        sound: list[bool] = []
        for part in torch.split(states, self.tokens_at_once()) if len(states) else ():
            chosen, good = likeliest(self.model.head(part))
            tokens += chosen
            sound += good
        return tokens, sound

    def tokens_at_once(self) -> int:
        """Tokens whose logits are held at a time."""
        return max(1, LOGITS // (4 * self.model.vocab_size))

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens of an answer as it is shown."""
        text: str = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()


def merged_states(states: Sequence[Tensor], groups: Sequence[dict[int, tuple[int, ...]]]) -> Tensor:
    """States (T, d) of groups of rows as one, rows in order."""
    places: dict[int, range] = {}
    start = 0
    for group in groups:
        for row in sorted(group):
            places[row] = range(start, start + len(group[row]))
            start += len(group[row])
    order = [place for row in sorted(places) for place in places[row]]
    return torch.cat(list(states))[torch.tensor(order, dtype=torch.long, device=states[0].device)]


def split_states(states: Tensor, labels: dict[int, tuple[int, ...]]) -> dict[int, Tensor]:
    """States (T, d), rows in order, by row."""
    rows = sorted(labels)
    return dict(zip(rows, torch.split(states, [len(labels[row]) for row in rows]), strict=True))


def has_text(text: str | None) -> bool:
    """Whether there is more than white space."""
    return bool((text or "").strip())
