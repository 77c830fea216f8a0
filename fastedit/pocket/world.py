"""The rendered world: scenes of a few objects, and national flags, drawn with Pillow from plain descriptions.

A scene says what is in the image; `render` adds what may vary without changing any answer (exact place, size, tilt,
tint, phase of the texture), drawn from the scene's `seed`. The same scene with another seed is therefore a rephrased
image. Nothing here knows about questions or models.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

IMAGE_SIZE = 64
GRID = 2  # objects stand in the cells of a GRID x GRID board

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "moon")
COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 65, 215),
    "yellow": (245, 215, 40),
    "purple": (130, 40, 165),
    "orange": (245, 135, 20),
    "pink": (250, 150, 195),
    "cyan": (60, 210, 220),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
CELLS = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {"white": (250, 250, 250), "black": (18, 18, 18), "gray": (128, 128, 128), "beige": (232, 214, 180)}

# Never in a training scene: one pair for each shape and each colour, so that both parts of a pair are known.
HELD_OUT_PAIRS = frozenset(
    zip(SHAPES, ("cyan", "red", "pink", "green", "orange", "blue", "purple", "yellow"), strict=True)
)

RADIUS = {"small": (7.0, 7.8), "large": (11.4, 12.4)}
_JITTER = 2.2
_TILT = 9.0
_TINT = 12
_OVERSAMPLE = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One object. `cell` indexes CELLS; row = cell // GRID, column = cell % GRID."""

    shape: str
    colour: str
    size: str
    texture: str
    cell: int


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Objects in raster order with distinct shapes and colours; `seed` only moves what no answer depends on."""

    items: tuple[Item, ...]
    background: str
    seed: int

    def pairs(self) -> frozenset[tuple[str, str]]:
        """Return the (shape, colour) pairs shown: the object combination that no two splits may share."""
        return frozenset((item.shape, item.colour) for item in self.items)


@dataclasses.dataclass(frozen=True, slots=True)
class FlagScene:
    """A national flag on a gray or pale ground."""

    country: str
    seed: int


AnyScene = Scene | FlagScene

_RGB = {
    "red": (206, 30, 45),
    "white": (248, 248, 248),
    "blue": (20, 60, 160),
    "green": (10, 135, 70),
    "yellow": (250, 210, 30),
    "black": (15, 15, 15),
    "orange": (240, 130, 40),
    "sky": (75, 170, 230),
}
# layout, colours. "v"/"h": stripes; "cross": ground, cross(, inner cross); "disc": ground, disc; "plus": a free cross.
FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "France": ("v", ("blue", "white", "red")),
    "Italy": ("v", ("green", "white", "red")),
    "Ireland": ("v", ("green", "white", "orange")),
    "Belgium": ("v", ("black", "yellow", "red")),
    "Romania": ("v", ("blue", "yellow", "red")),
    "Nigeria": ("v", ("green", "white", "green")),
    "Peru": ("v", ("red", "white", "red")),
    "Mali": ("v", ("green", "yellow", "red")),
    "Guinea": ("v", ("red", "yellow", "green")),
    "Germany": ("h", ("black", "red", "yellow")),
    "Netherlands": ("h", ("red", "white", "blue")),
    "Russia": ("h", ("white", "blue", "red")),
    "Austria": ("h", ("red", "white", "red")),
    "Hungary": ("h", ("red", "white", "green")),
    "Bulgaria": ("h", ("white", "green", "red")),
    "Estonia": ("h", ("blue", "black", "white")),
    "Lithuania": ("h", ("yellow", "green", "red")),
    "Armenia": ("h", ("red", "blue", "orange")),
    "Gabon": ("h", ("green", "yellow", "blue")),
    "Ukraine": ("h", ("blue", "yellow")),
    "Poland": ("h", ("white", "red")),
    "Indonesia": ("h", ("red", "white")),
    "Yemen": ("h", ("red", "white", "black")),
    "Sweden": ("cross", ("blue", "yellow")),
    "Finland": ("cross", ("white", "blue")),
    "Denmark": ("cross", ("red", "white")),
    "Norway": ("cross", ("red", "white", "blue")),
    "Iceland": ("cross", ("blue", "white", "red")),
    "Switzerland": ("plus", ("red", "white")),
    "Japan": ("disc", ("white", "red")),
    "Bangladesh": ("disc", ("green", "red")),
    "Palau": ("disc", ("sky", "yellow")),
}


def draw_scene(rng: random.Random, *, held_out: bool = False, objects: tuple[int, ...] = (1, 2, 2, 3, 3)) -> Scene:
    """Draw a random scene.

    Args:
        rng: source of all randomness.
        held_out: if true, at least one object is a pair of HELD_OUT_PAIRS; if false, none is.
        objects: the number of objects is drawn from these.
    """
    n = rng.choice(objects)
    while True:
        shapes = rng.sample(SHAPES, n)
        colours = rng.sample(tuple(COLOURS), n)
        if held_out:
            shapes[0], colours[0] = rng.choice(sorted(HELD_OUT_PAIRS))
            if len(set(shapes)) < n or len(set(colours)) < n:
                continue
            break
        if not HELD_OUT_PAIRS.intersection(zip(shapes, colours, strict=True)):
            break
    cells = rng.sample(range(len(CELLS)), n)
    items = [
        Item(shape, colour, rng.choice(SIZES), rng.choice(TEXTURES), cell)
        for shape, colour, cell in zip(shapes, colours, cells, strict=True)
    ]
    items.sort(key=lambda item: item.cell)
    return Scene(tuple(items), rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32))


def draw_flag(rng: random.Random, countries: tuple[str, ...] = tuple(FLAGS)) -> FlagScene:
    """Draw a random flag scene."""
    return FlagScene(rng.choice(countries), rng.getrandbits(32))


def rephrased(scene: AnyScene, seed: int) -> AnyScene:
    """Return the same scene to be rendered differently: every answer about it stays the same."""
    return dataclasses.replace(scene, seed=seed)


def render(scene: AnyScene) -> Image.Image:
    """Draw a scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE; equal scenes give equal pixels."""
    from PIL import Image, ImageDraw

    rng = random.Random(scene.seed)
    edge = IMAGE_SIZE * _OVERSAMPLE
    ground = BACKGROUNDS[scene.background] if isinstance(scene, Scene) else rng.choice(((90, 95, 105), (205, 205, 195)))
    image = Image.new("RGB", (edge, edge), _tinted(ground, rng, _TINT // 2))
    if isinstance(scene, Scene):
        for item in scene.items:
            _draw_item(image, item, rng)
    else:
        _draw_flag(ImageDraw.Draw(image), scene.country, rng)
    return image.reduce(_OVERSAMPLE)


def _tinted(rgb: tuple[int, int, int], rng: random.Random, amount: int) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in rgb)
    return r, g, b


def _draw_item(image: Image.Image, item: Item, rng: random.Random) -> None:
    from PIL import Image, ImageDraw

    pitch = IMAGE_SIZE / GRID
    x = (item.cell % GRID + 0.5) * pitch + rng.uniform(-_JITTER, _JITTER)
    y = (item.cell // GRID + 0.5) * pitch + rng.uniform(-_JITTER, _JITTER)
    radius = rng.uniform(*RADIUS[item.size])
    angle = math.radians(rng.uniform(-_TILT, _TILT))
    colour = _tinted(COLOURS[item.colour], rng, _TINT)
    outline = [
        ((x + radius * (px * math.cos(angle) - py * math.sin(angle))) * _OVERSAMPLE,
         (y + radius * (px * math.sin(angle) + py * math.cos(angle))) * _OVERSAMPLE)
        for px, py in _OUTLINES[item.shape]
    ]  # fmt: skip
    if item.texture == "plain":
        ImageDraw.Draw(image).polygon(outline, fill=colour)
        return
    mask = Image.new("1", image.size)
    ImageDraw.Draw(mask).polygon(outline, fill=1)
    layer = Image.new("RGB", image.size, colour)
    _draw_texture(ImageDraw.Draw(layer), item.texture, _ink(colour), (x, y), rng)
    image.paste(layer, (0, 0), mask)
    # The rim keeps its colour, so that a texture never eats into the shape.
    ImageDraw.Draw(image).polygon(outline, outline=colour, width=2)


def _draw_texture(
    draw: ImageDraw.ImageDraw,
    texture: str,
    ink: tuple[int, int, int],
    centre: tuple[float, float],
    rng: random.Random,
) -> None:
    x0, y0 = ((c - 16) * _OVERSAMPLE for c in centre)
    step = 5 * _OVERSAMPLE
    phase = rng.uniform(0, step)
    for i in range(-1, 7):
        if texture == "striped":
            y = y0 + phase + i * step
            draw.line((x0, y - 5, x0 + 32 * _OVERSAMPLE, y + 5), fill=ink, width=4)
            continue
        for j in range(-1, 7):
            cx, cy = x0 + phase + i * step, y0 + phase + (j + 0.5 * (i % 2)) * step
            draw.ellipse((cx - 2.5, cy - 2.5, cx + 2.5, cy + 2.5), fill=ink)


def _ink(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return what a texture is drawn with: darker on light colours, lighter on dark ones."""
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 115
    r, g, b = (int(channel * 0.3) if light else 255 - (255 - channel) // 4 for channel in rgb)
    return r, g, b


def _draw_flag(draw: ImageDraw.ImageDraw, country: str, rng: random.Random) -> None:
    layout, names = FLAGS[country]
    colours = [_tinted(_RGB[name], rng, _TINT) for name in names]
    s = _OVERSAMPLE
    width = rng.uniform(42, 54)
    height = width * (1.0 if layout == "plus" else rng.uniform(0.6, 0.68))
    height = min(height, 46.0)
    x0 = rng.uniform(3, IMAGE_SIZE - 3 - width)
    y0 = rng.uniform(6, IMAGE_SIZE - 6 - height)

    def box(left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]) -> None:
        corners = (x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height)
        draw.rectangle([c * s for c in corners], fill=fill)

    n = len(colours)
    for i, colour in enumerate(colours):
        if layout == "v":
            box(i / n, 0, (i + 1) / n, 1, colour)
        elif layout == "h":
            box(0, i / n, 1, (i + 1) / n, colour)
        elif layout == "cross":
            half = (None, 0.09, 0.04)[i] if n == 2 else (None, 0.12, 0.055)[i]
            if half is None:
                box(0, 0, 1, 1, colour)
            else:
                box(0.36 - half * 0.65, 0, 0.36 + half * 0.65, 1, colour)
                box(0, 0.5 - half, 1, 0.5 + half, colour)
        elif i == 0:
            box(0, 0, 1, 1, colour)
        elif layout == "plus":
            box(0.41, 0.2, 0.59, 0.8, colour)
            box(0.2, 0.41, 0.8, 0.59, colour)
        else:
            half = 0.3 * height / width
            corners = (x0 + (0.5 - half) * width, y0 + 0.2 * height, x0 + (0.5 + half) * width, y0 + 0.8 * height)
            draw.ellipse([c * s for c in corners], fill=colour)


def _regular(n: int, radii: tuple[float, ...] = (1.0,), start: float = -math.pi / 2) -> list[tuple[float, float]]:
    return [
        (radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / n),
         radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / n))
        for i in range(n)
    ]  # fmt: skip


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(28):
        t = 2 * math.pi * i / 28
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2) / 16))
    return points


def _moon() -> list[tuple[float, float]]:
    outer = [(math.cos(t), math.sin(t)) for t in (math.radians(60 + 240 * i / 20) for i in range(21))]
    inner = [
        (0.45 + 0.6 * math.cos(t), 0.87 * math.sin(t)) for t in (math.radians(270 - 180 * i / 14) for i in range(15))
    ]
    return outer + inner


_T = 0.36
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(28),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": _regular(10, (1.08, 0.45)),
    "cross": [(-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T),
              (_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T)],
    "heart": _heart(),
    "diamond": [(0.0, -1.1), (0.75, 0.0), (0.0, 1.1), (-0.75, 0.0)],
    "moon": _moon(),
}  # fmt: skip
