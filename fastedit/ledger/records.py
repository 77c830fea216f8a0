"""Edit requests as JSON: every field as it was given, images as files named by their content."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastedit.data.images import image_digest, locate, open_file, open_image
from fastedit.data.report import question_key
from fastedit.data.schema import IMAGE_FIELDS
from fastedit.files import replacing
from fastedit.ledger.database import DamagedLedger, sync_folder
from fastedit.requests import EditRequest, ImageSource, Probe, Query, Video, VisualSource, images_of

#: Folder of the images below that of the ledger.
IMAGES = "images"
_NAME = re.compile(r"[0-9a-f]{64}\.(png|jpg|jpeg|webp|bmp|gif|img)")
_MEMBERS: dict[str, type] = {"portability": Query, "probes": Probe, "paraphrases": Query}


class ImageStore:
    """The images that edits were made about, copied to files whose names are the SHA-256 of what is in them.

    A file's bytes are copied as they are; an image in memory becomes a PNG file of its RGB pixels.

    Args:
        folder: of the ledger.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / IMAGES
        # By path, size and time of a file, and by digest of an image in memory: a run asks about few images often
        self._names: dict[tuple[Any, ...], str] = {}
        self._is_new = False

    def name(self, source: ImageSource) -> str:
        """The name under which an image is stored; it is stored if it is new.

        Raises:
            ImageError: it cannot be read. OSError: it cannot be stored.
        """
        key = self._key(source)
        if key not in self._names:
            self._names[key] = self._stored(source)
        return self._names[key]

    def path(self, name: str) -> Path:
        """Where a stored image lies.

        Raises:
            DamagedLedger: no name of a stored image.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DamagedLedger(f"ledger: an image's name is its checksum (got {name!r:.80})")
        return self.folder / name

    def sync(self) -> None:
        """Put the names of new images on the disk."""
        if self._is_new:
            sync_folder(self.folder)
            self._is_new = False

    def forget(self) -> None:
        """Look again whether an image is stored before it is taken for stored."""
        self._names.clear()

    def problem(self, name: str) -> str:
        """What is wrong with a stored image; "" where nothing is."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{IMAGES}/{name}: cannot be read, {error.strerror}"
        return "" if digest == name[:64] else f"{IMAGES}/{name}: is not what was written (its checksum differs)"

    @staticmethod
    def _key(source: ImageSource) -> tuple[Any, ...]:
        if not isinstance(source, (str, os.PathLike)):
            return ("pixels", image_digest(source))
        path = locate(source)
        try:
            status = path.stat()
        except OSError:
            return ("path", str(path))
        return ("path", str(path), status.st_size, status.st_mtime_ns, status.st_ino)

    def _stored(self, source: ImageSource) -> str:
        if isinstance(source, (str, os.PathLike)):
            path = locate(source)
            with open_file(path) as file:
                content = file.read()
            ending = path.suffix.lower()
        else:
            buffer = io.BytesIO()
            open_image(source).save(buffer, format="PNG")
            content, ending = buffer.getvalue(), ".png"
        name = hashlib.sha256(content).hexdigest() + ending
        name = name if _NAME.fullmatch(name) else f"{name[:64]}.img"
        target = self.folder / name
        if not target.exists():
            if not self.folder.exists():
                self.folder.mkdir(exist_ok=True)
                sync_folder(self.folder.parent)
            with replacing(target) as out:
                out.write(content)
            self._is_new = True
        return name


def question_digest(request: EditRequest | Query) -> str:
    """What identifies a question about an image wherever both come from: the wording without case and outer marks, the
    pixels of the image."""
    shown = [_pixels(source) for source in images_of(request.image)]
    kind = "video" if isinstance(request.image, Video) else "images"
    return hashlib.sha256(f"{kind}{shown}\n{question_key(request.prompt)}".encode()).hexdigest()


def _pixels(source: ImageSource) -> str:
    return image_digest(open_image(source))


def to_record(request: EditRequest, images: ImageStore) -> dict[str, Any]:
    """A request as plain values; absent parts are left out.

    Raises:
        ImageError: an image cannot be read.
    """
    return _plain(request, images)


def from_record(record: Mapping[str, Any], images: ImageStore) -> EditRequest:
    """The request of a record, its images as paths of the stored files.

    Raises:
        DamagedLedger: no record of a request.
    """
    try:
        return EditRequest(**_fields(EditRequest, record, images))
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedLedger(f"ledger: a stored request is complete (got {error})") from error


def _plain(value: Any, images: ImageStore) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if part is None or part == () or (part == "" and field.name != "prediction"):
            continue
        if field.name == "image" or field.name in IMAGE_FIELDS:
            plain[field.name] = _visual(part, images)
        elif field.name in _MEMBERS:
            plain[field.name] = [_plain(member, images) for member in part]
        else:
            plain[field.name] = list(part) if isinstance(part, tuple) else part
    return plain


def _visual(visual: VisualSource, images: ImageStore) -> Any:
    names = [images.name(source) for source in images_of(visual)]
    if isinstance(visual, Video):
        return {"video": names, "fps": visual.fps}
    return names if isinstance(visual, (tuple, list)) else names[0]


def _fields(kind: type, record: Mapping[str, Any], images: ImageStore) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in record.items():
        if name == "image" or name in IMAGE_FIELDS:
            given[name] = _visual_of(value, images)
        elif name in _MEMBERS and kind is EditRequest:
            given[name] = tuple(_MEMBERS[name](**_fields(_MEMBERS[name], each, images)) for each in value)
        else:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def _visual_of(value: Any, images: ImageStore) -> VisualSource:
    if isinstance(value, dict):
        return Video(tuple(images.path(name) for name in value["video"]), value["fps"])
    if isinstance(value, list):
        return tuple(images.path(name) for name in value)
    return images.path(value)


def image_names(record: Mapping[str, Any]) -> list[str]:
    """Names of all the images of a record."""
    found: list[str] = []
    for name, value in record.items():
        if name == "image" or name in IMAGE_FIELDS:
            listed = value["video"] if isinstance(value, dict) else value if isinstance(value, list) else [value]
            found += listed
        elif name in _MEMBERS:
            for member in value:
                found += image_names(member)
    return found
