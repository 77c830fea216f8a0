"""Plain JSON Lines with our own names: one object a line, whose keys are the fields of `EditRequest`.

Only `prompt` and `target` must be there; an absent part is left out or null. A JSON list of the same objects is read
as well. `portability`, `probes`, `paraphrases`, `tags` and `id` are as in `fastedit.data.mmedit`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastedit.data.fields import Fields
from fastedit.data.mmedit import KEYS as MMEDIT_KEYS
from fastedit.data.schema import Schema, to_json, write_request, write_text
from fastedit.data.schema import read_request as _read
from fastedit.requests import EditRequest

SCHEMA = Schema("jsonl", {field: field for field in MMEDIT_KEYS}, strict=False, needs_image=False)


def read_request(fields: Fields, name: str) -> EditRequest | None:
    """Return the request of one record, or None after reporting what is wrong with it."""
    return _read(fields, SCHEMA, name)


def write_jsonl(
    edits: Iterable[EditRequest], path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None
) -> None:
    """Write requests as JSON Lines, absent parts left out; `read_edits(path)` gives them back.

    Args:
        edits: the requests. Paths are written relative to `images`; images in memory are saved there as PNG.
        path: the file, replaced as a whole.
        images: image root of the file.
    Raises:
        ImageError: an image in memory without `images`, or a path outside of it.
    """
    lines = [to_json(write_request(edit, SCHEMA, images)) + "\n" for edit in edits]
    write_text(path, "".join(lines))
