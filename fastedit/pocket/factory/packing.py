"""Many questions about one image in one training row: the same computation as one row each, the image paid once.

A row is [image prefix][question answer]...[caption][fact]...; a 4-D mask lets a question see the image prefix and
itself, a fact only itself, and positions restart in every segment.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.models import IMAGE_TOKENS, Wiring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One segment: a prompt and the answer to be given; `kind` is only for accounting."""

    kind: str
    prompt: str
    answer: str
    with_image: bool = True


@dataclasses.dataclass
class Packed:
    """R rows of N tokens. Image tokens are the IMAGE_TOKENS after `image_at`; `picked` indexes (R * N)."""

    ids: Tensor  # (R, N) long
    mask: Tensor  # (R, 1, N, N) float, additive
    positions: Tensor  # (3, R, N) long
    image_at: int
    picked: Tensor  # (T,) long: positions that predict an answer token
    labels: Tensor  # (T,) long
    owner: Tensor  # (T,) long: index into `lines` of the segment
    lines: list[Line]


class Packer:
    """Turns rows of lines into tensors for one family."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, wiring: Wiring) -> None:
        self.wiring = wiring
        self.pad, self.end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        self._word: Callable[[str], tuple[int, ...]] = functools.cache(
            lambda word: tuple(tokenizer(word, add_special_tokens=False).input_ids)
        )
        image, self.next_position = wiring.image_positions(len(wiring.before))
        self.image_positions = image

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids; words are split at single spaces, which the tokenizer never crosses."""
        return [token for word in text.split(" ") for token in self._word(word)]

    def cost(self, line: Line) -> int:
        """Return the number of tokens the line takes in a row."""
        prefix = 0 if line.with_image else len(self.wiring.text_prefix)
        return prefix + len(self.encode(line.prompt)) + len(self.wiring.answer) + len(self.encode(line.answer)) + 1

    def pack(self, rows: Sequence[Sequence[Line]]) -> Packed:
        """Pack one image's lines per row."""
        wire = self.wiring
        opened = len(wire.before) + IMAGE_TOKENS + len(wire.after)
        first = self.next_position
        lengths = [opened + sum(self.cost(line) for line in row) for row in rows]
        n = -(-max(lengths) // 8) * 8
        ids = torch.full((len(rows), n), self.pad)
        positions = torch.zeros(3, len(rows), n, dtype=torch.long)
        segment = torch.full((len(rows), n), -1)
        sees_image = torch.zeros(len(rows), n, dtype=torch.bool)
        before = list(wire.before)
        at = [(i,) * 3 for i in range(len(before))] + self.image_positions
        at += [(first + i,) * 3 for i in range(len(wire.after))]
        text_start = first + len(wire.after)
        picked: list[int] = []
        labels: list[int] = []
        owner: list[int] = []
        lines: list[Line] = []
        for r, row in enumerate(rows):
            tokens = before + [self.pad] * IMAGE_TOKENS + list(wire.after)
            where = [p[0] for p in at]
            segments = [0] * opened
            views = [True] * opened
            for s, line in enumerate(row, start=1):
                prompt = (
                    ([] if line.with_image else list(wire.text_prefix)) + self.encode(line.prompt) + list(wire.answer)
                )
                answer = [*self.encode(line.answer), self.end]
                start, last = len(tokens), len(tokens) + len(prompt) - 1
                picked += range(r * n + last, r * n + last + len(answer))
                labels += answer
                owner += [len(lines)] * len(answer)
                lines.append(line)
                tokens += prompt + answer
                offset = text_start if line.with_image else 0
                where += range(offset, offset + len(tokens) - start)
                segments += [s] * (len(tokens) - start)
                views += [line.with_image] * (len(tokens) - start)
            ids[r, : len(tokens)] = torch.tensor(tokens)
            positions[:, r, : len(where)] = torch.tensor(where)
            segment[r, : len(segments)] = torch.tensor(segments)
            sees_image[r, : len(views)] = torch.tensor(views)
        positions[:, :, : len(at)] = torch.tensor(at).T[:, None]
        same = segment[:, :, None] == segment[:, None, :]
        prefix = (segment == 0)[:, None, :] & sees_image[:, :, None]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.zeros(len(rows), 1, n, n).masked_fill_(~((same | prefix) & causal)[:, None], -1e9)
        return Packed(
            ids, mask, positions, len(before), torch.tensor(picked), torch.tensor(labels), torch.tensor(owner), lines
        )


def forward(model: PreTrainedModel, wiring: Wiring, packed: Packed, pixels: Tensor) -> Tensor:
    """Return the logits (T, V) at the picked positions."""
    embeddings: torch.nn.Embedding = model.get_input_embeddings()
    embeds = embeddings(packed.ids)
    images = wiring.embed_images(model, pixels).to(embeds.dtype)
    a, b = packed.image_at, packed.image_at + IMAGE_TOKENS
    embeds = torch.cat([embeds[:, :a], images, embeds[:, b:]], dim=1)
    hidden = wiring.decode(model, embeds, packed.mask, packed.positions)
    return torch.nn.functional.linear(hidden.flatten(0, 1)[packed.picked], embeddings.weight)


def right_lines(logits: Tensor, packed: Packed) -> list[bool]:
    """Return for every line whether its whole answer, end token included, is what greedy decoding gives."""
    wrong = packed.owner[logits.argmax(-1) != packed.labels]
    right = torch.ones(len(packed.lines), dtype=torch.bool)
    right[wrong] = False
    return [bool(x) for x in right]


def fill(packer: Packer, lines: Sequence[Line], budget: int, rng: random.Random) -> list[Line]:
    """Return as many of the lines, in order, as fit into a row of `budget` tokens, then shuffled."""
    left = budget - len(packer.wiring.before) - IMAGE_TOKENS - len(packer.wiring.after)
    taken = []
    for line in lines:
        left -= packer.cost(line)
        if left < 0:
            break
        taken.append(line)
    rng.shuffle(taken)
    return taken
