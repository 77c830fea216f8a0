"""Edits that share images go to one worker."""

from __future__ import annotations

from collections import Counter

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.engine.parallel.shards import image_keys, shards
from tests.engine.conftest import picture


@pytest.mark.parametrize(("count", "workers", "most"), [(1, 4, 16), (5, 2, 1), (40, 3, 16), (400, 2, 16)])
def test_every_edit_is_in_one_shard_and_sizes_differ_by_one(count: int, workers: int, most: int) -> None:
    edits = [EditRequest(prompt=f"Question {n}?", target="x") for n in range(count)]
    made = shards(edits, range(count), workers, most)
    assert sorted(number for shard in made for number in shard) == list(range(count))
    sizes = {len(shard) for shard in made}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(made) % workers == 0 or len(made) == count


def test_edits_that_share_an_image_stand_together() -> None:
    pictures = [picture(seed) for seed in range(4)]
    edits = [EditRequest(prompt=f"Question {n}?", target="x", image=pictures[n % 4]) for n in range(16)]
    made = shards(edits, range(16), 2, 4)
    assert [{number % 4 for number in shard} for shard in made] == [{0}, {1}, {2}, {3}]


def test_few_images_of_the_embedded_set_are_looked_at_twice() -> None:
    edits = fastedit.read_edits("pocket-vqa")[:200]
    made = shards(edits, range(200), 2, 16)
    seen = Counter(key for shard in made for key in {key for number in shard for key in image_keys(edits[number])})
    assert sum(times > 1 for times in seen.values()) <= 0.05 * len(seen)
