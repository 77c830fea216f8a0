"""Images: opening, content hashes, and caches of pixels and features under a memory budget."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastedit.data.images import check_image, image_key, locate, open_image
from fastedit.data.problems import ImageError

from .caches import SpillCache
from .states import ImageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastedit.requests import ImageSource

Value = TypeVar("Value")
#: Real path, bytes and time of change of a file.
Stamp = tuple[str, int, int]


class ImageReader:
    """Opens images and runs the processor on each distinct one once.

    Args:
        preprocess: from an RGB image to its tensors, its number of image tokens and, for some models, those tokens.
        budget_bytes: memory for preprocessed images.
    """

    def __init__(self, preprocess: Callable[[Image], tuple[Any, ...]], budget_bytes: int) -> None:
        self._preprocess = preprocess
        # On the host, so that there is nowhere to move them: what does not fit is dropped
        self._inputs: SpillCache[ImageInputs] = SpillCache(budget_bytes, 0, _inputs_bytes, lambda inputs, _to: inputs)
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
            self._inputs.put(key, inputs, device=torch.device("cpu"))
        return inputs

    def identity(self, source: ImageSource | None) -> str:
        """Return what tells an image from others in this process: that of a file changes with the file, "" is none."""
        if source is None:
            return ""
        stamp = _file_stamp(source)
        return image_key(source) if stamp is None else "file:{}:{}:{}".format(*stamp)

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
