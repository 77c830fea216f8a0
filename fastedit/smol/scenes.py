"""Scenes of one to four icons on a plain ground: data, from which right answers follow, and how they are drawn.

A scene says what is shown where and on which ground; `placements` adds what may vary without changing any answer
(exact place, size, tilt, tint), drawn from the scene's `seed`, and `render` draws them. The same scene with another
seed is a rephrased image. Nothing here knows about questions or models.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from typing import TYPE_CHECKING

from fastedit.smol.concepts import FLAG, Concept, concepts
from fastedit.smol.icons import BITMAP_SIZE, bitmaps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

IMAGE_SIZE = 96
# Light enough that the icons' black outlines stand out.
BACKGROUNDS = {
    "white": (248, 248, 248),
    "gray": (160, 160, 160),
    "red": (236, 104, 100),
    "orange": (250, 178, 92),
    "yellow": (250, 232, 120),
    "green": (128, 205, 130),
    "blue": (122, 172, 240),
    "purple": (186, 142, 226),
    "pink": (252, 182, 208),
}
# cell: centre (x, y) and the largest edge of what stands in it, as fractions of the image
CELLS: dict[str, tuple[float, float, float]] = {
    "centre": (0.5, 0.5, 0.9),
    "left": (0.26, 0.5, 0.5),
    "right": (0.74, 0.5, 0.5),
    "top": (0.5, 0.26, 0.5),
    "bottom": (0.5, 0.74, 0.5),
    "top left": (0.27, 0.27, 0.5),
    "top right": (0.73, 0.27, 0.5),
    "bottom left": (0.27, 0.73, 0.5),
    "bottom right": (0.73, 0.73, 0.5),
}
PAIRS = (("left", "right"), ("top", "bottom"))
CORNERS = ("top left", "top right", "bottom left", "bottom right")
_OVERSAMPLE = 2
_SMALLEST = {True: 0.7, False: 0.84}  # of the largest edge: in the centre, elsewhere
_TILT = {True: 7.0, False: 16.0}  # degrees; flags are told apart by what is up and what is left
_TINT = {True: 0.05, False: 0.1}
_SHADE = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A concept, by its name, in one of CELLS."""

    name: str
    cell: str


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """What is shown, in reading order, on which of BACKGROUNDS; `seed` only moves what no answer depends on.

    Either one thing, two different ones side by side or one above the other, or two to four of a kind.
    """

    shown: tuple[Shown, ...]
    background: str
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of what is shown, in reading order."""
        return tuple(one.name for one in self.shown)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """How one bitmap is drawn.

    row: its row in `icon_bitmaps()`. x, y: its centre in pixels of the image. edge: of the bitmap, in pixels.
    angle: turn to the left, in degrees. tint: factors of red, green and blue.
    """

    row: int
    x: float
    y: float
    edge: float
    angle: float
    tint: tuple[float, float, float]


@functools.cache
def by_name() -> dict[str, tuple[int, Concept]]:
    """Return (row in `icon_bitmaps()`, concept) by the concept's name."""
    return {concept.name: (row, concept) for row, concept in enumerate(concepts())}


@functools.cache
def icon_bitmaps() -> NDArray[np.uint8]:
    """Return the bitmap of every concept, in the order of `concepts()`: (N, 160, 160, 4), uint8, RGBA."""
    return bitmaps([concept.code for concept in concepts()])


def draw_scene(rng: random.Random, names: tuple[str, ...], *, layout: str = "one") -> Scene:
    """Draw a random scene.

    Args:
        rng: source of all randomness.
        names: concepts to draw from.
        layout: "one", "pair" (two different ones) or "copies" (one to four of the same).
    Raises:
        ValueError: another layout.
    """
    if layout == "one":
        shown: tuple[Shown, ...] = (Shown(rng.choice(names), "centre"),)
    elif layout == "pair":
        cells = rng.choice(PAIRS)
        shown = tuple(Shown(name, cell) for name, cell in zip(rng.sample(names, 2), cells, strict=True))
    elif layout == "copies":
        count = rng.randint(1, 4)
        spots: tuple[str, ...] = ("centre",) if count == 1 else rng.choice(PAIRS) if count == 2 else CORNERS
        chosen = sorted(rng.sample(range(len(spots)), count))
        name = rng.choice(names)
        shown = tuple(Shown(name, spots[i]) for i in chosen)
    else:
        raise ValueError(f"draw_scene: layout must be one, pair or copies (got layout={layout!r})")
    return Scene(shown, rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32))


def rephrased(scene: Scene, seed: int) -> Scene:
    """Return the same scene to be rendered differently: every answer about it stays the same."""
    return dataclasses.replace(scene, seed=seed)


def placements(scene: Scene) -> tuple[tuple[int, int, int], tuple[Placement, ...]]:
    """Return the ground's colour and how each bitmap is placed on it; equal scenes give equal numbers."""
    rng = random.Random(scene.seed)
    r, g, b = (max(0, min(255, level + rng.randint(-_SHADE, _SHADE))) for level in BACKGROUNDS[scene.background])
    placed = []
    for one in scene.shown:
        row, concept = by_name()[one.name]
        flag = concept.kind == FLAG
        x, y, largest = CELLS[one.cell]
        edge = largest * rng.uniform(_SMALLEST[one.cell == "centre"], 1.0)
        slack = (largest - edge) / 2
        tint = [1 + rng.uniform(-_TINT[flag], _TINT[flag]) for _ in range(3)]
        placed.append(
            Placement(
                row,
                (x + rng.uniform(-slack, slack)) * IMAGE_SIZE,
                (y + rng.uniform(-slack, slack)) * IMAGE_SIZE,
                edge * IMAGE_SIZE,
                rng.uniform(-_TILT[flag], _TILT[flag]),
                (tint[0], tint[1], tint[2]),
            )
        )
    return (r, g, b), tuple(placed)


def affine(placement: Placement, scale: float) -> tuple[float, float, float, float, float, float]:
    """Return (a, b, c, d, e, f): pixel (x, y) of an image enlarged by `scale` shows bitmap point (ax+by+c, dx+ey+f)."""
    step = BITMAP_SIZE / (placement.edge * scale)
    turn = math.radians(placement.angle)
    a, b = step * math.cos(turn), -step * math.sin(turn)
    d, e = step * math.sin(turn), step * math.cos(turn)
    x, y, half = placement.x * scale, placement.y * scale, BITMAP_SIZE / 2
    return a, b, half - a * x - b * y, d, e, half - d * x - e * y


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE; equal scenes give equal pixels.

    Raises:
        ModuleNotFoundError: a package of the extra "smol" is not installed.
    """
    import numpy as np
    from PIL import Image

    ground, placed = placements(scene)
    edge = IMAGE_SIZE * _OVERSAMPLE
    image = Image.new("RGB", (edge, edge), ground)
    for one in placed:
        bitmap = np.array(icon_bitmaps()[one.row])
        tinted = np.rint(bitmap[..., :3] * np.asarray(one.tint)).clip(0, 255)
        bitmap[..., :3] = tinted.astype(np.uint8)
        # Colours are mixed by their alpha, so that the empty surroundings of an icon leave no rim.
        layer = Image.fromarray(bitmap).convert("RGBa")
        layer = layer.transform(
            (edge, edge), Image.Transform.AFFINE, affine(one, _OVERSAMPLE), Image.Resampling.BILINEAR
        ).convert("RGBA")
        image.paste(layer, (0, 0), layer)
    return image.reduce(_OVERSAMPLE)
