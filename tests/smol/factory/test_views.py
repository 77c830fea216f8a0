"""Painted pictures show what their views say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fastedit.smol.factory.views import EDGE, Layer, Painter, Pool, View, draw_view

GROUND = (200, 100, 50)


@pytest.fixture(scope="module")
def painter() -> Painter:
    bitmaps = np.zeros((4, 160, 160, 4), np.uint8)
    bitmaps[0, ..., 0] = bitmaps[0, ..., 3] = 255  # a red square
    bitmaps[1, ..., 2] = bitmaps[1, ..., 3] = 255  # a blue one
    bitmaps[2, :80, :, 1] = bitmaps[2, :80, :, 3] = 255  # green above, nothing below
    return Painter(bitmaps)


def test_layers_stand_where_they_are_put(painter: Painter) -> None:
    view = View("beside", (Layer(0, 0.25, 0.5, 0.5, 0.0), Layer(1, 0.75, 0.5, 0.5, 0.0)), GROUND, None)
    pixels, cover = painter.paint([view], seed=0)
    assert pixels.shape == (1, 3, EDGE, EDGE)
    left, right, ground = pixels[0, :, 48, 24], pixels[0, :, 48, 72], pixels[0, :, 4, 48]
    assert left[0] > 0.5 > -0.8 > left[2]
    assert right[2] > 0.5 > -0.8 > right[0]
    assert ground[0] > ground[1] > ground[2]
    assert cover[0, 2].tolist() == [0, 0, 0, 1, 1, 1]
    assert cover[0, 0].tolist() == [-1] * 6


def test_a_quarter_turn_is_one(painter: Painter) -> None:
    pixels, _ = painter.paint([View("one", (Layer(2, 0.5, 0.5, 1.0, 90.0),), (0, 0, 0), None)], seed=0)
    green = pixels[0, 1] > 0
    halves = {"left": green[:, :40], "right": green[:, 56:]}
    assert sorted(float(half.float().mean()) for half in halves.values()) == pytest.approx([0, 1], abs=0.02)


def test_the_same_seed_paints_the_same(painter: Painter) -> None:
    views = [draw_view(random.Random(number), range(3)) for number in range(4)]
    first, second, third = (painter.paint(views, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(("layout", "count"), [("one", 1), ("beside", 2), ("above", 2)])
def test_layouts_have_so_many_different_icons(layout: str, count: int) -> None:
    view = draw_view(random.Random(0), range(9), layout)
    assert len({layer.icon for layer in view.layers}) == count


def test_a_pool_gives_batches_in_one_order(painter: Painter) -> None:
    pools = [iter(Pool(painter, 4, rows=4, fresh=2, size=60, seed=seed)) for seed in (0, 0, 1)]
    # While it is small all pictures are new, then half of them
    batches = [[next(pool)[1] for _ in range(12)] for pool in pools]
    assert batches[0][0].shape == (4, 3, EDGE, EDGE)
    assert all(torch.equal(first, second) for first, second in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
