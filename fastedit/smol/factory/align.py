"""First stage: the vision tower learns to say what each image token shows, in the language model's own embeddings.

No decoder is run, which makes a picture a hundred times cheaper. Every image token that shows an icon must lie near the
mean of the embeddings of that icon's name (a country's, for a flag) and farther from all other names; a token that
shows the ground, near the ground's colour. Of the words for sides and for how many icons there are, it must be nearest
to the right ones, so that a question can find by its own words what it asks about. The language model's embeddings stay
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, normalize

from fastedit.smol.scenes import BACKGROUNDS

if TYPE_CHECKING:
    from torch import Tensor

    from fastedit.smol.factory.views import View

_SCALE = 24.0  # of the cosines before the softmax
_NEAR = 0.5  # weight of the cosine to the right name
_LENGTH = 0.2  # weight of the length
_WORD = 1.0  # weight of each group of words
#: Of each group a token of some layouts must be nearest to one.
WORDS = {"column": ("left", "right"), "row": ("top", "bottom"), "number": ("one", "two", "three", "four")}


def name_table(embedding: Tensor, tokenize: object, names: Sequence[str]) -> Tensor:
    """Return (N, d), float32: of each name the mean of its tokens' embeddings, a space before it.

    Args:
        embedding: (V, d) of the language model. tokenize: text -> token ids.
    """
    if not callable(tokenize):
        raise TypeError(f"name_table: tokenize must be callable (got tokenize={tokenize!r})")
    return torch.stack([embedding[torch.tensor(tokenize(f" {name}"))].float().mean(0) for name in names])


class Alignment:
    """The loss of the stage.

    Args:
        names: (N, d), of the icons in the order of the bitmaps. grounds: (G, d), of the colours in BACKGROUNDS.
        words: by group, (W, d), of the words in WORDS.
    """

    def __init__(self, names: Tensor, grounds: Tensor, words: Mapping[str, Tensor]) -> None:
        table = torch.cat([names, grounds])
        self._unit = normalize(table, dim=-1)
        self._length = float(table.norm(dim=-1).mean())
        self._words = {group: normalize(table, dim=-1) for group, table in words.items()}
        self._icons = len(names)
        self._ground = {name: len(names) + at for at, name in enumerate(BACKGROUNDS)}

    def targets(self, views: Sequence[View], cover: Tensor) -> Tensor:
        """Return (R, 36), int64: the row of the name that each image token must give, or -1."""
        rows = torch.full((len(views), max(len(view.layers) for view in views) + 1), -1)
        for row, view in enumerate(views):
            if view.ground_name is not None:
                rows[row, 0] = self._ground[view.ground_name]
            rows[row, 1 : len(view.layers) + 1] = torch.tensor([layer.icon for layer in view.layers])
        return rows.gather(1, cover.flatten(1) + 1)

    def sides(self, views: Sequence[View], cover: Tensor) -> dict[str, Tensor]:
        """Return by group (R, 36), int64: which of its words each image token must be nearest to, or -1."""
        depth = max(len(view.layers) for view in views) + 1
        rows = {group: torch.full((len(views), depth), -1) for group in WORDS}
        for row, view in enumerate(views):
            rows["number"][row, : len(view.layers) + 1] = len(view.layers) - 1
            for place, layer in enumerate(view.layers, start=1):
                if view.layout in ("beside", "corners"):
                    rows["column"][row, place] = int(layer.x > 0.5)
                if view.layout in ("above", "corners"):
                    rows["row"][row, place] = int(layer.y > 0.5)
        return {group: each.gather(1, cover.flatten(1) + 1) for group, each in rows.items()}

    def loss(self, tokens: Tensor, views: Sequence[View], cover: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of image tokens (R, 36, d), and shares of right tokens, right pictures and right words.

        A picture's answer is that of the mean of the tokens on its icon; pictures of several icons are not counted.
        """
        tokens, targets = tokens.float(), self.targets(views, cover)
        unit = normalize(tokens, dim=-1)
        logits = _SCALE * (unit @ self._unit.T)
        known = targets >= 0
        wanted = targets[known]
        loss = cross_entropy(logits[known], wanted)
        loss = loss + _NEAR * (1 - (unit[known] * self._unit[wanted]).sum(-1)).mean()
        loss = loss + _LENGTH * (tokens.norm(dim=-1) / self._length - 1).square().mean()
        share: dict[str, float] = {}
        for group, wanted in self.sides(views, cover).items():
            asked = wanted >= 0
            if asked.any():
                scores = _SCALE * (unit[asked] @ self._words[group].T)
                loss = loss + _WORD * cross_entropy(scores, wanted[asked])
                share[group] = float((scores.detach().argmax(-1) == wanted[asked]).float().mean())
        with torch.no_grad():
            best = logits[..., : self._icons].argmax(-1)
            shown = known & (targets < self._icons)
            single, right = 0, 0
            for row in range(len(targets)):
                icons = set(targets[row][shown[row]].tolist())
                if len(icons) == 1:
                    pooled = unit[row][shown[row]].mean(0) @ self._unit[: self._icons].T
                    single, right = single + 1, right + (int(pooled.argmax()) in icons)
            share["tokens"] = float((best == targets)[shown].float().mean())
            share["pictures"] = right / max(1, single)
        return loss, share
