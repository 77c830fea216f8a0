"""Questions about one picture in one training row: the same computation as one row each, the picture paid once.

A row is [picture][question answer]...[question answer]. A 4-D mask lets a question see the picture and itself, or,
where it is about no picture, only itself; positions go on from what a question sees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fastedit.smol.models import IMAGE_PROMPT, IMAGE_TOKEN, IMAGE_TOKENS, TEXT_PROMPT

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One question and the answer to be given; `kind` is only for accounting, `before` stands ahead of the question."""

    kind: str
    question: str
    answer: str
    with_image: bool = True
    before: str = ""
    #: By token of the answer, the end included: what may stand there and how likely; () is the answer alone.
    likely: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclasses.dataclass
class Packed:
    """R rows of N tokens."""

    ids: Tensor  # (R, N), int64
    mask: Tensor  # (R, 1, N, N), bool: what a token sees
    positions: Tensor  # (R, N), int64
    picked: Tensor  # (T,), int64: indices into (R * N) of the tokens that predict an answer's token
    labels: Tensor  # (T,), int64
    owner: Tensor  # (T,), int64: the line of each
    lines: list[Line]

    def loss(self, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of (T, V) with what is likely in place of each token, or with the token."""
        logs = torch.log_softmax(logits.float(), -1)
        told = -logs.gather(1, self.labels[:, None])[:, 0]
        likely: list[tuple[int, int, float]] = []
        first = 0
        for line, count in zip(self.lines, torch.bincount(self.owner, minlength=len(self.lines)).tolist(), strict=True):
            for at, token in enumerate(line.likely, start=first):
                likely += [(at, number, share) for number, share in token]
            first += count
        if likely:
            rows, numbers, shares = (torch.tensor(part) for part in zip(*likely, strict=True))
            expected = torch.zeros_like(told).index_add(0, rows, -shares * logs[rows, numbers])
            told = torch.where(torch.bincount(rows, minlength=len(told)) > 0, expected, told)
        return told.mean()

    def right(self, logits: Tensor) -> list[bool]:
        """Return for every line whether its whole answer, end included, is what greedy decoding of (T, V) gives."""
        right = torch.ones(len(self.lines), dtype=torch.bool)
        right[self.owner[logits.argmax(-1) != self.labels]] = False
        return [bool(value) for value in right]


class Packer:
    """Turns rows of lines into tensors.

    Args:
        tokenizer: of the language model; it needs to know no image token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        self._ids: Callable[[str], tuple[int, ...]] = functools.cache(
            lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        )
        before, after = IMAGE_PROMPT.split(IMAGE_TOKEN)
        self.before = self._ids(before)
        # What stands between the picture and the question's own prompt
        self.after = self._ids(after.removesuffix(TEXT_PROMPT))

    @property
    def opened(self) -> int:
        """Return the number of tokens before the first question."""
        return len(self.before) + IMAGE_TOKENS + len(self.after)

    def pack(self, rows: Sequence[Sequence[Line]]) -> Packed:
        """Return one picture's lines a row; image tokens stand behind `before`, as the end token for now."""
        opened = self.opened
        encoded = [
            [
                (
                    (*self._ids(line.before), *self._ids(TEXT_PROMPT.format(line.question))),
                    (*self._ids(f" {line.answer}"), self.end),
                )
                for line in row
            ]
            for row in rows
        ]
        n = max(opened + sum(len(prompt) + len(answer) for prompt, answer in row) for row in encoded)
        n = -(-n // 8) * 8
        ids = torch.full((len(rows), n), self.end)
        ids[:, : len(self.before)] = torch.tensor(self.before)
        ids[:, opened - len(self.after) : opened] = torch.tensor(self.after)
        positions = torch.arange(n).repeat(len(rows), 1)
        segment = torch.full((len(rows), n), -1)
        segment[:, :opened] = 0
        sees_image = torch.zeros(len(rows), n, dtype=torch.bool)
        picked: list[int] = []
        labels: list[int] = []
        owner: list[int] = []
        lines: list[Line] = []
        for r, row in enumerate(encoded):
            at = opened
            for s, (prompt, answer) in enumerate(row, start=1):
                length = len(prompt) + len(answer)
                line = rows[r][s - 1]
                ids[r, at : at + length] = torch.tensor((*prompt, *answer))
                start = opened if line.with_image else 0
                positions[r, at : at + length] = torch.arange(start, start + length)
                segment[r, at : at + length] = s
                sees_image[r, at : at + length] = line.with_image
                last = at + len(prompt) - 1
                picked += range(r * n + last, r * n + last + len(answer))
                labels += answer
                owner += [len(lines)] * len(answer)
                lines.append(line)
                at += length
        same = segment[:, :, None] == segment[:, None, :]
        picture = (segment == 0)[:, None, :] & sees_image[:, :, None]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        mask = ((same | picture) & causal)[:, None]
        return Packed(ids, mask, positions, torch.tensor(picked), torch.tensor(labels), torch.tensor(owner), lines)
