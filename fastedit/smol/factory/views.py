"""Training pictures by the batch: cached bitmaps of icons, turned, scaled, tinted and put on grounds, in torch.

Drawing a scene as `fastedit.smol.scenes` does takes a millisecond a picture; here a batch of 128 takes a tenth of the
vision tower's step. Shares, sizes and tints are wider than those of the scenes, so that a scene is nothing new.
"""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import adaptive_avg_pool2d, affine_grid, avg_pool2d, grid_sample

from fastedit.smol.scenes import BACKGROUNDS, IMAGE_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

EDGE = IMAGE_SIZE
_LAYOUTS = {
    "one": ((0.5, 0.5),),
    "beside": ((0.25, 0.5), (0.75, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "corners": ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One icon in a picture: its row in the bitmaps, centre and edge as shares of the picture, degrees of its turn."""

    icon: int
    x: float
    y: float
    size: float
    turn: float


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """One picture: its layout, its layers in reading order, its ground's colour and that colour's name, if any."""

    layout: str
    layers: tuple[Layer, ...]
    ground: tuple[int, int, int]
    ground_name: str | None


def draw_view(rng: random.Random, icons: Sequence[int], layout: str | None = None) -> View:
    """Draw a picture of different icons, chosen from these rows."""
    layout = layout or rng.choices(tuple(_LAYOUTS), (0.46, 0.21, 0.21, 0.12))[0]
    centres = list(_LAYOUTS[layout])
    if layout == "corners":
        kept = sorted(rng.sample(range(4), rng.choice((3, 3, 4))))
        centres = [centres[at] for at in kept]
    chosen = rng.sample(icons, len(centres))
    layers = []
    for icon, (x, y) in zip(chosen, centres, strict=True):
        size = rng.uniform(0.5, 1.1) if layout == "one" else rng.uniform(0.36, 0.56)
        slack = max(0.02, 0.5 * (1.0 - size)) if layout == "one" else 0.05
        layers.append(
            Layer(icon, x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack), size, rng.uniform(-20, 20))
        )
    kind = rng.random()
    if kind < 0.65:
        name = "white" if kind < 0.15 else rng.choice(tuple(BACKGROUNDS))
        red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in BACKGROUNDS[name])
        return View(layout, tuple(layers), (red, green, blue), name)
    floor = rng.choice((20, 120, 120))
    red, green, blue = (rng.randint(floor, 255) for _ in range(3))
    return View(layout, tuple(layers), (red, green, blue), None)


class Painter:
    """Turns views into pixels.

    Args:
        bitmaps: (N, 160, 160, 4), uint8, RGBA with straight alpha.
    """

    def __init__(self, bitmaps: NDArray[np.uint8]) -> None:
        straight = torch.from_numpy(bitmaps.copy()).permute(0, 3, 1, 2)
        self._levels: dict[int, Tensor] = {}
        for factor in (2, 4):
            parts = []
            for chunk in torch.split(straight, 64):
                values = chunk.float() / 255
                values[:, :3] *= values[:, 3:]
                parts.append((avg_pool2d(values, factor) * 255).round().to(torch.uint8))
            self._levels[factor] = torch.cat(parts)

    def paint(self, views: Sequence[View], seed: int) -> tuple[Tensor, Tensor]:
        """Return pixels (R, 3, EDGE, EDGE), float32 in [-1, 1], and cover (R, 6, 6): which layer a patch shows, or -1.

        Args:
            views: what to show. seed: of tints and noise.
        """
        generator = torch.Generator().manual_seed(seed)
        flat = [(row, place, layer) for row, view in enumerate(views) for place, layer in enumerate(view.layers)]
        painted = self._layers([layer for _, _, layer in flat], generator)
        pixels = torch.tensor([view.ground for view in views]).float().div_(255)[:, :, None, None]
        pixels = pixels.repeat(1, 1, EDGE, EDGE)
        depth = max(len(view.layers) for view in views)
        cover = torch.zeros(len(views), depth + 1, 6, 6)
        cover[:, 0] = 0.12  # a patch that shows less of any icon is ground
        shares = adaptive_avg_pool2d(painted[:, 3:], 6)[:, 0]
        for wanted in range(depth):
            at = [number for number, (_, place, _) in enumerate(flat) if place == wanted]
            rows = torch.tensor([flat[number][0] for number in at])
            top = painted[at]
            pixels[rows] = pixels[rows] * (1 - top[:, 3:]) + top[:, :3]
            cover[rows, wanted + 1] = shares[at]
        gain = 1 + 0.12 * (2 * torch.rand(len(views), 3, 1, 1, generator=generator) - 1)
        light = 1 + 0.15 * (2 * torch.rand(len(views), 1, 1, 1, generator=generator) - 1)
        noise = 0.02 * torch.rand(len(views), 1, 1, 1, generator=generator)
        pixels = pixels * gain * light + noise * torch.randn(pixels.shape, generator=generator)
        return pixels.clamp_(0, 1).mul_(2).sub_(1), cover.argmax(1) - 1

    def _layers(self, layers: Sequence[Layer], generator: torch.Generator) -> Tensor:
        out = torch.empty(len(layers), 4, EDGE, EDGE)
        for factor, level in self._levels.items():
            at = [n for n, layer in enumerate(layers) if (layer.size > 0.6) == (factor == 2)]
            if not at:
                continue
            icons = level[[layers[n].icon for n in at]].float().div_(255)
            turn = torch.tensor([layers[n].turn for n in at]).deg2rad()
            size = torch.tensor([layers[n].size for n in at])
            centre = torch.tensor([[layers[n].x, layers[n].y] for n in at]) * 2 - 1
            cos, sin = turn.cos() / size, turn.sin() / size
            # From a place in the picture to a place in the bitmap, both in [-1, 1]
            matrix = torch.stack(
                [
                    torch.stack([cos, sin, -(cos * centre[:, 0] + sin * centre[:, 1])], 1),
                    torch.stack([-sin, cos, -(-sin * centre[:, 0] + cos * centre[:, 1])], 1),
                ],
                1,
            )
            grid = affine_grid(matrix, [len(at), 4, EDGE, EDGE], align_corners=False)
            out[at] = grid_sample(icons, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return out


class Pool:
    """Batches of which a share is new and the rest was shown some batches before; painted in a thread, in one order.

    Args:
        painter: of the pictures. icons: how many bitmaps there are. rows: of a batch. fresh: of them, new ones.
        size: pictures that are kept. seed: of everything.
    """

    def __init__(self, painter: Painter, icons: int, *, rows: int, fresh: int, size: int, seed: int) -> None:
        self._painter, self._icons, self._rows, self._fresh, self._size = painter, icons, rows, fresh, size
        self._rng = random.Random(f"pool:{seed}")
        self._light = torch.Generator().manual_seed(seed)
        self._ready: queue.Queue[tuple[list[View], Tensor, Tensor]] = queue.Queue(maxsize=3)
        threading.Thread(target=self._fill, daemon=True).start()

    def __iter__(self) -> Iterator[tuple[list[View], Tensor, Tensor]]:
        """Yield (views, pixels, cover) without end."""
        while True:
            yield self._ready.get()

    def _fill(self) -> None:
        rng, every = self._rng, range(self._icons)
        views: list[View] = []
        pixels = torch.empty(self._size, 3, EDGE, EDGE, dtype=torch.uint8)
        cover = torch.empty(self._size, 6, 6, dtype=torch.int64)
        at = 0
        while True:
            # While the pool is small, all are new
            new = self._fresh if len(views) > 8 * self._rows else self._rows
            drawn = [draw_view(rng, every) for _ in range(new)]
            painted, covered = self._painter.paint(drawn, rng.getrandbits(62))
            places = [(at + k) % self._size for k in range(new)]
            at += new
            for place, view in zip(places, drawn, strict=True):
                views[place : place + 1] = [view]
            pixels[places] = ((painted + 1) * 127.5).round().to(torch.uint8)
            cover[places] = covered
            chosen = places + rng.sample(range(len(views)), self._rows - new)
            light = 1 + 0.1 * (2 * torch.rand(len(chosen), 1, 1, 1, generator=self._light) - 1)
            shown = (pixels[chosen].float() * light).clamp_(0, 255).div_(127.5).sub_(1)
            self._ready.put(([views[place] for place in chosen], shown, cover[chosen]))
