"""Which concepts the train split edits and which the eval split; the splits share none."""

from __future__ import annotations

import functools
import zlib

from fastedit.smol.concepts import FLAG, concepts


@functools.cache
def concepts_of(split: str, kind: str | None = None) -> tuple[str, ...]:
    """Return the names of a split's concepts, in a fixed order: a third are "eval", the others "train".

    Args:
        split: "train" or "eval".
        kind: only concepts of this kind; "icon": every kind but flags; None: all.
    """
    return tuple(
        concept.name
        for concept in concepts()
        if (zlib.crc32(concept.name.encode()) % 3 == 0) == (split == "eval")
        and (kind in (None, concept.kind) or (kind == "icon" and concept.kind != FLAG))
    )
