from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from fastedit.pocket.world import (
    CELLS,
    COLOURS,
    FLAGS,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    SHAPES,
    FlagScene,
    Item,
    Scene,
    draw_flag,
    draw_scene,
    render,
    rephrased,
)


def scenes(n: int, seed: int = 0, **options: bool) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng, **options) for _ in range(n)]


def pixels(scene: Scene | FlagScene) -> np.ndarray:
    return np.asarray(render(scene), dtype=np.int64)


def test_scenes_are_well_formed() -> None:
    for scene in scenes(300):
        assert 1 <= len(scene.items) <= 3
        for name in ("shape", "colour", "cell"):
            assert len({getattr(item, name) for item in scene.items}) == len(scene.items)
        assert [item.cell for item in scene.items] == sorted(item.cell for item in scene.items)


def test_held_out_pairs_are_never_drawn_unless_asked_for() -> None:
    assert len(HELD_OUT_PAIRS) == 8
    assert {s for s, _ in HELD_OUT_PAIRS} == set(SHAPES)
    assert {c for _, c in HELD_OUT_PAIRS} == set(COLOURS)
    assert not any(scene.pairs() & HELD_OUT_PAIRS for scene in scenes(2000))
    assert all(scene.pairs() & HELD_OUT_PAIRS for scene in scenes(200, held_out=True))


def test_equal_seeds_give_equal_scenes_and_pixels() -> None:
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)
    scene = scenes(1)[0]
    assert (pixels(scene) == pixels(scene)).all()
    assert pixels(scene).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_a_rephrased_scene_says_the_same_with_other_pixels() -> None:
    for scene in [*scenes(10), draw_flag(random.Random(0))]:
        other = rephrased(scene, scene.seed + 1)
        assert other != scene
        assert rephrased(other, scene.seed) == scene
        assert (pixels(other) != pixels(scene)).any()


@pytest.mark.parametrize("cell", range(4))
def test_an_object_is_drawn_in_its_cell_and_in_its_colour(cell: int) -> None:
    scene = Scene((Item("square", "blue", "large", "plain", cell),), "white", 7)
    image = pixels(scene)
    ink = np.abs(image - np.array(COLOURS["blue"])).sum(-1) < 60
    rows, columns = np.nonzero(ink)
    assert CELLS[cell] == f"{'top' if rows.mean() < 32 else 'bottom'} {'left' if columns.mean() < 32 else 'right'}"
    assert ink.sum() > 200


def test_shapes_textures_and_sizes_look_different() -> None:
    def one(shape: str = "circle", size: str = "large", texture: str = "plain") -> np.ndarray:
        return pixels(Scene((Item(shape, "red", size, texture, 0),), "white", 3))

    drawn = [one(shape=shape) for shape in SHAPES] + [one(size="small"), one(texture="striped"), one(texture="dotted")]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (np.abs(a - b).sum(-1) > 100).sum() > 20


def test_flags_are_distinct_and_all_drawn() -> None:
    assert len(set(FLAGS.values())) == len(FLAGS) == 32
    rng = random.Random(0)
    assert set(Counter(draw_flag(rng).country for _ in range(1500))) == set(FLAGS)
