"""What a classifier reads of a prompt: the states of its image's tokens and those of its text, pooled by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastedit.backbone import PackedState
from fastedit.backbone.packed import token_indices, token_rows
from fastedit.backbone.token_layout import token_layout


@dataclass(frozen=True)
class PromptTokens:
    """States of R prompts, padded with zeros at the end.

    Args:
        text: (R, N, d), tokens of the prompt that are not an image's. text_count: (R,), int64.
        image: (R, I, d), tokens of images. image_count: (R,), int64, 0 without an image.
    """

    text: Tensor
    text_count: Tensor
    image: Tensor
    image_count: Tensor

    def __len__(self) -> int:
        return int(self.text.shape[0])

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return sum(part.numel() * part.element_size() for part in (self.text, self.image))

    @torch.no_grad()
    def centre(self) -> Tensor:
        """(R, d), float32: the mean state of the image's tokens as a unit vector, zeros without an image.

        Nothing about it is learned: another rendering of the same scene is another point.
        """
        total = self.image.float().sum(1)
        return F.normalize(total, dim=1) * (self.image_count > 0)[:, None]

    def split(self) -> list[PromptTokens]:
        """The prompts one by one, without padding, copied."""
        made = []
        for row, (n, i) in enumerate(zip(self.text_count.tolist(), self.image_count.tolist(), strict=True)):
            here = slice(row, row + 1)
            made.append(
                PromptTokens(
                    self.text[here, :n].clone(), self.text_count[here], self.image[here, :i].clone(),
                    self.image_count[here],
                )
            )  # fmt: skip
        return made

    @staticmethod
    def cat(parts: Sequence[PromptTokens]) -> PromptTokens:
        """The prompts of all parts."""
        return PromptTokens(
            _joined([part.text for part in parts]),
            torch.cat([part.text_count for part in parts]),
            _joined([part.image for part in parts]),
            torch.cat([part.image_count for part in parts]),
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(R, N, d) of several, padded to the longest."""
    width = max(part.shape[1] for part in parts)
    out = parts[0].new_zeros(sum(len(part) for part in parts), width, parts[0].shape[2])
    start = 0
    for part in parts:
        out[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return out


@torch.no_grad()
def prompt_tokens(state: PackedState) -> PromptTokens:
    """The tokens of the prompts of a state; those behind them, of answers, are left out.

    Args:
        state: R rows on the frozen model with all their tokens; the first wanted token of a row ends its prompt.
    """
    hidden, device = state.hidden, state.hidden.device
    row = token_rows(state.counts, device)
    lengths = torch.tensor(token_layout(state).prompts, device=device)
    inside = token_indices(state, device) < lengths[row]
    image = torch.zeros_like(inside) if state.image is None else state.image & inside
    text = inside & ~image
    return PromptTokens(*_padded(hidden, row, text, len(state)), *_padded(hidden, row, image, len(state)))


def _padded(hidden: Tensor, row: Tensor, chosen: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Chosen tokens by row (R, N, d), and how many each row has."""
    owner = row[chosen]
    count = torch.zeros(rows, dtype=torch.long, device=row.device).index_add_(0, owner, torch.ones_like(owner))
    column = torch.arange(len(owner), device=row.device) - (count.cumsum(0) - count)[owner]
    width = int(count.max()) if rows else 0
    out = hidden.new_zeros(rows, width, hidden.shape[1])
    out[owner, column] = hidden[chosen]
    return out, count


class AttentionPool(nn.Module):
    """Tokens to one unit vector: learned queries look at them, what they see is mixed by a small network.

    Several queries, because a mean cannot tell which object has which colour, and no fixed number of tokens, because
    images of some models have any number of them.

    Args:
        width: d of the states. queries: how many. key: width of a query's keys and values. size: of the result.
        generator: of the first weights.
    """

    def __init__(self, width: int, queries: int, key: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.queries = nn.Parameter(torch.randn(queries, key, generator=generator) / key**0.5)
        self.keys = nn.Parameter(_drawn(key, width, generator))
        self.values = nn.Parameter(_drawn(key, width, generator))
        self.inner = nn.Parameter(_drawn(size, queries * key, generator))
        self.inner_bias = nn.Parameter(torch.zeros(size))
        self.outer = nn.Parameter(_drawn(size, size, generator))

    def forward(self, tokens: Tensor, count: Tensor) -> Tensor:
        """(R, size) of tokens (R, N, d), the first ``count`` (R,) of each row; rows without tokens give anything."""
        if tokens.shape[1] == 0:
            return self.outer.new_zeros(len(tokens), len(self.outer))
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:]) * self.scale
        seen = torch.arange(tokens.shape[1], device=tokens.device) < count.clamp(min=1)[:, None]
        scores = F.linear(F.linear(normed, self.keys), self.queries).masked_fill(~seen[..., None], -torch.inf)
        pooled = torch.einsum("rnk,rnv->rkv", scores.softmax(1), F.linear(normed, self.values))
        inner = F.gelu(F.linear(pooled.flatten(1), self.inner, self.inner_bias))
        unit: Tensor = F.normalize(F.linear(inner, self.outer), dim=1)
        return unit


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=generator) * 2 - 1).div(columns**0.5)
