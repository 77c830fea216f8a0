"""Alignment stage: the vision side learns to say what each image token shows, in the words of the language model.

No decoder is run. Every image token, root-mean-square normed, is scored against the word embeddings (trained along);
it must pick the shape, colour, size, texture, row, column and background of its quadrant, or the country of a flag.
Nothing is kept but the weights of the vision tower, the projector and the embeddings.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.easyvqa import EasyScene, easy_scenes
from fastedit.pocket.models import IMAGE_TOKENS, Wiring, to_pixels
from fastedit.pocket.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    FLAGS,
    GRID,
    SHAPES,
    SIZES,
    TEXTURES,
    FlagScene,
    Scene,
    draw_flag,
    draw_scene,
    render,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_EASY_SHAPES = ("circle", "rectangle", "triangle")
_EASY_COLOURS = ("red", "green", "blue", "yellow", "gray", "teal", "black", "brown")
WORDS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, "nothing"),
    "colour": (*COLOURS, "nothing"),
    "size": SIZES,
    "texture": TEXTURES,
    "row": ("top", "bottom"),
    "column": ("left", "right"),
    "background": tuple(BACKGROUNDS),
    "flag": tuple(FLAGS),
    "easy_shape": _EASY_SHAPES,
    "easy_colour": _EASY_COLOURS,
}
AnyImage = Scene | FlagScene | EasyScene


class Alignment:
    """The stage's loss for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, wiring: Wiring) -> None:
        self.wiring = wiring
        self.words = {name: torch.tensor([_one_token(tokenizer, w) for w in words]) for name, words in WORDS.items()}
        # Image token -> cell of the world: by place where tokens have one, four each where they are queries.
        by_place = [(i // 4) // 2 * GRID + (i % 4) // 2 for i in range(IMAGE_TOKENS)]
        self.cell = [i // 4 for i in range(IMAGE_TOKENS)] if wiring.name == "pocket-blip2" else by_place

    def targets(self, scenes: Sequence[AnyImage]) -> dict[str, Tensor]:
        """Return for every attribute (R, IMAGE_TOKENS), the index of the right word or -1."""
        out = {name: torch.full((len(scenes), len(CELLS)), -1) for name in WORDS}
        for r, scene in enumerate(scenes):
            if isinstance(scene, Scene):
                for name, words in _cell_words(scene).items():
                    out[name][r] = torch.tensor([WORDS[name].index(w) if w else -1 for w in words])
            elif isinstance(scene, FlagScene):
                out["flag"][r] = WORDS["flag"].index(scene.country)
            else:
                for _, answer in scene.questions:
                    for name in ("easy_shape", "easy_colour"):
                        if answer in WORDS[name]:
                            out[name][r] = WORDS[name].index(answer)
        return {name: cells[:, self.cell] for name, cells in out.items()}

    def loss(
        self, model: PreTrainedModel, pixels: Tensor, targets: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the summed cross-entropy and the share of right words per attribute."""
        tokens = self.wiring.embed_images(model, pixels).float()
        tokens = tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + 1e-6)
        table = model.get_input_embeddings().weight
        total, right = tokens.new_zeros(()), {}
        for name, ids in self.words.items():
            wanted = targets[name]
            if not (wanted >= 0).any():
                continue
            logits = (tokens @ table[ids].float().T).flatten(0, 1)
            total = total + torch.nn.functional.cross_entropy(logits, wanted.flatten(), ignore_index=-1)
            known = wanted.flatten() >= 0
            right[name] = float((logits.argmax(-1) == wanted.flatten())[known].float().mean())
        return total, right


def batches(alignment: Alignment, rows: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield fresh (pixels, targets) without end."""
    rng = random.Random(seed)
    while True:
        scenes: list[AnyImage] = []
        for _ in range(rows):
            share = rng.random()
            if share < 0.1:
                scenes.append(draw_flag(rng))
            elif share < 0.2:
                scenes.append(rng.choice(easy_scenes("train")))
            else:
                scenes.append(draw_scene(rng, objects=(2, 3, 3, 4)))
        images = [scene.image() if isinstance(scene, EasyScene) else render(scene) for scene in scenes]
        yield to_pixels(images), alignment.targets(scenes)


def _cell_words(scene: Scene) -> dict[str, list[str | None]]:
    items = {item.cell: item for item in scene.items}
    cells = [items.get(cell) for cell in range(len(CELLS))]
    return {
        "shape": [item.shape if item else "nothing" for item in cells],
        "colour": [item.colour if item else "nothing" for item in cells],
        "size": [item.size if item else None for item in cells],
        "texture": [item.texture if item else None for item in cells],
        "row": [cell.split()[0] for cell in CELLS],
        "column": [cell.split()[1] for cell in CELLS],
        "background": [scene.background] * len(CELLS),
    }


def _one_token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"Alignment: every word must be one token (got word={word!r}, tokens={len(ids)})")
    return int(ids[0])
