"""What is wrong with the images of edits, looked at before any of them is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from fastedit.data.images import check_image
from fastedit.data.problems import SHOWN, Collector, ImageError, MissingImageError, Problem
from fastedit.data.reader import EditList
from fastedit.data.schema import IMAGE_FIELDS, MEMBER_FIELDS
from fastedit.requests import EditRequest, ImageSource
from fastedit.visuals import image_places


class EditProblems:
    """Collects the problems of some edits, each with the place that the edit came from.

    Args:
        edits: read from a file, or made in Python.
        name: of the list, for those made in Python: "edits" gives "edits[3] (id 'x')".
    """

    def __init__(self, edits: Sequence[EditRequest], name: str = "edits") -> None:
        read = edits if isinstance(edits, EditList) else EditList()
        self.edits, self._places, self._keys = edits, read.places, read.keys
        self._file, self._list = Collector(read.source), Collector(name)
        self.problems: list[Problem] = []

    def add(self, number: int, field: str, rule: str, value: object = None, *, missing: str = "") -> None:
        """Add a problem of edit `number`."""
        edit = self.edits[number]
        index, line = self._places.get(edit.id, (None, None))
        collector = self._list if index is None else self._file
        # An id that only says file and number says nothing more
        plain = index is not None and edit.id.endswith(f"#{index}")
        collector.add(
            rule,
            index=number if index is None else index,
            field=self._key(field),
            value=value,
            line=line,
            missing=missing,
            id="" if plain else edit.id,
            listed=index is None,
        )
        self.problems.append(collector.problems.pop())

    def _key(self, field: str) -> str:
        """A field by its key in the file; what stands behind it, as in "image[1]", stays."""
        name = field.partition("[")[0].partition(".")[0]
        return self._keys.get(field) or self._keys.get(name, name) + field[len(name) :]

    def add_error(self, number: int, field: str, error: ImageError, source: ImageSource) -> None:
        """Add what opening an image of edit `number` raised."""
        rule = str(error).removeprefix("image: ").removeprefix("image path: ").split(" (got ")[0]
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
        missing = path if isinstance(error, MissingImageError) else ""
        # Of a long path the end tells more
        shown = path if len(path) <= SHOWN else f"…{path[1 - SHOWN :]}"
        self.add(number, field, rule, shown or source, missing=missing)


def image_fields(edit: EditRequest) -> Iterator[tuple[str, ImageSource]]:
    """Yield every image of an edit with the field that it stands in."""
    for field in IMAGE_FIELDS:
        for place, source in image_places(getattr(edit, field)):
            yield field + place, source
    for name in MEMBER_FIELDS:
        for position, member in enumerate(getattr(edit, name)):
            for place, source in image_places(member.image):
                yield f"{name}[{position}].image{place}", source


def check_images(
    edits: Sequence[EditRequest],
    *,
    name: str = "edits",
    size: Callable[[ImageSource], tuple[int, int]] = check_image,
) -> list[Problem]:
    """Return what is wrong with the images of some edits: absent, refused, damaged. Every file is decoded once.

    Args:
        edits: of a file or made in Python.
        name: of a list made in Python, for the problems.
        size: what looks at an image, see `check_image`.
    Returns:
        Problems in order of the edits; an image that several fields of one edit share is told once.
    """
    found = EditProblems(edits, name)
    looked = ImageLooks(size)
    for number, edit in enumerate(edits):
        reported = set()
        for field, source in image_fields(edit):
            result = looked.at(source)
            if isinstance(result, ImageError) and looked.key(source) not in reported:
                reported.add(looked.key(source))
                found.add_error(number, field, result, source)
    return found.problems


class ImageLooks:
    """Sizes of images, or what is wrong with them, each image looked at once; no pixels are kept.

    Args:
        size: what looks at an image, see `check_image`.
    """

    def __init__(self, size: Callable[[ImageSource], tuple[int, int]] = check_image) -> None:
        self._size = size
        self._found: dict[object, tuple[int, int] | ImageError] = {}
        # An image in memory is known by its identity, and so must stay
        self._held: list[ImageSource] = []

    @staticmethod
    def key(source: ImageSource) -> object:
        """What tells images apart: the path, or the object in memory."""
        return (type(source), os.fspath(source)) if isinstance(source, (str, os.PathLike)) else id(source)

    def at(self, source: ImageSource) -> tuple[int, int] | ImageError:
        """Width and height, or why there are none."""
        key = self.key(source)
        if key not in self._found:
            self._held.append(source)
            try:
                self._found[key] = self._size(source)
            except ImageError as error:
                # A new one: the frames of what was raised hold pixels
                self._found[key] = type(error)(str(error))
        return self._found[key]
