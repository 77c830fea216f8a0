"""Which edits go to a worker together."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from math import ceil

from fastedit.data.images import image_key
from fastedit.requests import EditRequest, images_of


def image_keys(edit: EditRequest) -> list[str]:
    """What identifies each image that an edit asks about, each once."""
    shown = [edit.image, edit.image_rephrase, edit.image_locality_image]
    shown += [query.image for query in (*edit.portability, *edit.paraphrases)]
    shown += [probe.image for probe in edit.probes]
    return list(dict.fromkeys(image_key(source) for visual in shown for source in images_of(visual)))


def shards(edits: Sequence[EditRequest], numbers: Sequence[int], workers: int, most: int) -> list[list[int]]:
    """Split edits so that those that share images stand together and all workers are done at about the same time.

    Edits follow one another as a walk over shared images reaches them, the rarest image first; an image is looked at by
    two shards at most where no more than ``most`` edits share it and nothing else.

    Args:
        edits: of the run. numbers: those to split, not empty. workers: how many there are. most: edits of a shard.
    Returns:
        Lists of numbers, as many as a multiple of ``workers`` where there are enough edits; sizes differ by one.
    """
    order = _by_images(edits, numbers)
    count = min(len(order), workers * ceil(len(order) / (workers * most)))
    ends = [round(len(order) * part / count) for part in range(count + 1)]
    return [order[start:end] for start, end in itertools.pairwise(ends)]


def _by_images(edits: Sequence[EditRequest], numbers: Sequence[int]) -> list[int]:
    """The numbers in an order in which edits that share images are near each other."""
    keys = {number: image_keys(edits[number]) for number in numbers}
    sharing: dict[str, list[int]] = defaultdict(list)
    for number, listed in keys.items():
        for key in listed:
            sharing[key].append(number)
    order: dict[int, None] = {}
    for first in numbers:
        reached = deque([first])
        while reached:
            number = reached.popleft()
            if number in order:
                continue
            order[number] = None
            for key in sorted(keys[number], key=lambda key: len(sharing[key])):
                reached += [other for other in sharing.pop(key, ()) if other not in order]
                sharing[key] = []
    return list(order)
