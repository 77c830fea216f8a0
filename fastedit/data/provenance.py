"""A content hash of edits, for result files: equal edits give equal hashes wherever they were read from."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable

from fastedit.data.detect import canonical
from fastedit.data.images import image_digest
from fastedit.data.schema import IMAGE_FIELDS
from fastedit.requests import EditRequest, Probe, Query, Video

_VERSION = b"fastedit edits 1\n"


def fingerprint(edits: Iterable[EditRequest]) -> str:
    """Return the sha256, in hex, over the edits in order.

    Images count by content: the bytes of a file that can be read, the pixels of an image in memory; a path that
    cannot be read counts as its text. Ids do not count, so a renamed or re-exported file keeps its hash. Absent
    parts do not count either, so a field that is added to `EditRequest` later changes nothing.
    """
    digests: dict[str, str] = {}
    total = hashlib.sha256(_VERSION)
    for edit in edits:
        total.update(canonical(_plain(edit, digests)))
        total.update(b"\n")
    return total.hexdigest()


def _plain(value: object, digests: dict[str, str]) -> object:
    """Return the value as JSON types, images as digests."""
    if isinstance(value, (EditRequest, Query, Probe)):
        plain = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if field.name == "id" or part is None or part == () or part == "":
                continue
            image = field.name == "image" or field.name in IMAGE_FIELDS
            plain[field.name] = _visual(part, digests) if image else _plain(part, digests)
        return plain
    if isinstance(value, tuple):
        return [_plain(member, digests) for member in value]
    return value


def _visual(visual: object, digests: dict[str, str]) -> object:
    """An image as its digest; a list or a video as those of its images in order."""
    if isinstance(visual, Video):
        return {"video": [_image(frame, digests) for frame in visual.frames], "fps": visual.fps}
    if isinstance(visual, tuple):
        return [_image(image, digests) for image in visual]
    return _image(visual, digests)


def _image(source: object, digests: dict[str, str]) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = str(source)
        if path not in digests:
            digests[path] = image_digest(path)
        return digests[path]
    return image_digest(source)  # type: ignore[arg-type]
