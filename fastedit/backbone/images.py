"""Images: opening, content hashes, and caches of pixels and features under a memory budget."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastedit.data.images import check_image, locate, open_image
from fastedit.data.problems import ImageError

from .states import ImageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastedit.requests import ImageSource

Value = TypeVar("Value")
#: Real path, bytes and time of change of a file.
Stamp = tuple[str, int, int]


class BoundedCache(Generic[Value]):
    """Values by key; the least recently used are dropped once the sizes add up to more than the budget.

    Args:
        budget_bytes: largest sum of sizes; 0 keeps nothing.
        size: bytes of one value.
    """

    def __init__(self, budget_bytes: int, size: Callable[[Value], int]) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Value | None:
        """Return the value and mark it as used, or None."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: Value) -> None:
        """Keep a value, dropping others if there is no room; a value over the whole budget is not kept."""
        if key in self._values:
            self.held_bytes -= self._size(self._values.pop(key))
        size = self._size(value)
        if size > self.budget_bytes:
            return
        self._values[key] = value
        self.held_bytes += size
        while self.held_bytes > self.budget_bytes:
            _, dropped = self._values.popitem(last=False)
            self.held_bytes -= self._size(dropped)

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self.held_bytes = 0


class ImageReader:
    """Opens images and runs the processor on each distinct one once.

    Args:
        preprocess: from an RGB image to its tensors, its number of image tokens and, for some models, those tokens.
        budget_bytes: memory for preprocessed images.
    """

    def __init__(self, preprocess: Callable[[Image], tuple[Any, ...]], budget_bytes: int) -> None:
        self._preprocess = preprocess
        self._inputs: BoundedCache[ImageInputs] = BoundedCache(budget_bytes, _inputs_bytes)
        # Content hash and size by (path, bytes, time of change), so that a known file is not decoded again.
        self._known_files: dict[Stamp, str] = {}
        self._sizes: dict[Stamp, tuple[int, int]] = {}
        self._tokens: dict[tuple[int, int], int] = {}

    def read(self, source: ImageSource) -> ImageInputs:
        """Return the preprocessed image.

        Raises:
            FileNotFoundError, ValueError: no such file, not an image, or one that the processor does not take.
        """
        stamp = _file_stamp(source)
        if stamp is not None and stamp in self._known_files:
            known = self._inputs.get(self._known_files[stamp])
            if known is not None:
                return known
        image = open_image(source)
        key = content_hash(image)
        if stamp is not None:
            self._known_files[stamp], self._sizes[stamp] = key, image.size
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = ImageInputs(key, *self._processed(image))
            self._inputs.put(key, inputs)
        return inputs

    def size(self, source: ImageSource) -> tuple[int, int]:
        """Return width and height of an image that `read` can open; a file that is known is not decoded again.

        Raises:
            FileNotFoundError, ValueError: no such file, or not an image.
        """
        stamp = _file_stamp(source)
        if stamp is None:
            return check_image(source)
        if stamp not in self._sizes:
            self._sizes[stamp] = check_image(source)
        return self._sizes[stamp]

    def take_sizes(self, other: ImageReader) -> None:
        """Take over the sizes of files that another reader has looked at: they are not decoded for them again."""
        self._sizes.update(other._sizes)

    def tokens(self, size: tuple[int, int]) -> int:
        """Return how many tokens an image of this width and height takes.

        Raises:
            ValueError: the processor does not take images of this shape.
        """
        from PIL import Image

        if size not in self._tokens:
            self._tokens[size] = int(self._processed(Image.new("RGB", size))[1])
        return self._tokens[size]

    def _processed(self, image: Image) -> tuple[Any, ...]:
        try:
            return self._preprocess(image)
        except ValueError as error:
            width, height = image.size
            raise ImageError(f"image: the processor refuses it, {error} (got {width} x {height})") from error

    @property
    def held_bytes(self) -> int:
        """Size of the preprocessed images that are kept."""
        return self._inputs.held_bytes

    def clear(self) -> None:
        """Drop all preprocessed images."""
        self._inputs.clear()
        self._known_files.clear()
        self._sizes.clear()


def content_hash(image: Image) -> str:
    """Return the SHA-256 of size and RGB pixels."""
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _file_stamp(source: ImageSource) -> Stamp | None:
    """Identify the state of a file without reading it; None for images in memory and missing files."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        path = Path(os.path.realpath(locate(source)))
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (str(path), status.st_size, status.st_mtime_ns)


def _inputs_bytes(inputs: ImageInputs) -> int:
    return sum(part.numel() * part.element_size() for part in inputs.tensors.values())
