"""Images: opening, content hashes, and caches of pixels and features under a memory budget."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from fastedit.data.images import check_image, image_key, locate, open_image
from fastedit.data.problems import ImageError
from fastedit.visuals import Video, image_places, images_of, visual_key

from .caches import SpillCache
from .several import Several, joined, joined_key
from .states import ImageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastedit.visuals import ImageSource, VisualSource

Value = TypeVar("Value")
#: Real path, bytes and time of change of a file.
Stamp = tuple[str, int, int]


class ImageReader:
    """Opens images and runs the processor on each distinct one once.

    Args:
        preprocess: from an RGB image to its tensors, its number of image tokens and, for some models, those tokens.
        budget_bytes: memory for preprocessed images.
        several: what the model takes besides one image; None is one alone.
    """

    def __init__(
        self, preprocess: Callable[[Image], tuple[Any, ...]], budget_bytes: int, several: Several | None = None
    ) -> None:
        self._preprocess, self._several = preprocess, several
        # On the host, so that there is nowhere to move them: what does not fit is dropped
        self._inputs: SpillCache[ImageInputs] = SpillCache(budget_bytes, 0, _inputs_bytes, lambda inputs, _to: inputs)
        # Content hash and size by (path, bytes, time of change), so that a known file is not decoded again.
        self._known_files: dict[Stamp, str] = {}
        self._sizes: dict[Stamp, tuple[int, int]] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._shapes: dict[Hashable, ImageInputs] = {}

    def read(self, visual: VisualSource) -> ImageInputs:
        """Return what a question is about, preprocessed.

        Raises:
            FileNotFoundError, ValueError: no such file, not an image, one that the processor does not take, or more
                than the model takes. Names the element of a list.
        """
        reason = self.refusal(visual)
        if reason:
            raise ImageError(f"image: {reason}")
        if not isinstance(visual, (list, tuple, Video)):
            return self._one(cast("ImageSource", visual))
        if not isinstance(visual, Video) and self._apart:
            parts = [_named(place, source, self._one) for place, source in image_places(visual)]
            return joined(joined_key(visual, [part.key for part in parts]), parts)
        return self._whole(visual)

    def refusal(self, visual: VisualSource) -> str:
        """Return why the model does not take an image, a list or a video; "" where it does. Nothing is opened."""
        return "" if self._several is None else self._several.refusal(visual)

    @property
    def _apart(self) -> bool:
        """Whether each image of a list is prepared by itself."""
        return self._several is None or self._several.apart

    def _whole(self, visual: VisualSource) -> ImageInputs:
        """A list or a video that is prepared as a whole."""
        stamps = [_file_stamp(source) for source in images_of(visual)]
        keys = ["" if stamp is None else self._known_files.get(stamp, "") for stamp in stamps]
        inputs = self._inputs.get(joined_key(visual, keys)) if all(keys) else None
        if inputs is not None:
            return inputs
        images = [_named(place, source, open_image) for place, source in image_places(visual)]
        keys = [content_hash(image) for image in images]
        for stamp, known, image in zip(stamps, keys, images, strict=True):
            if stamp is not None:
                self._known_files[stamp], self._sizes[stamp] = known, image.size
        key = joined_key(visual, keys)
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = replace(self._processed_together(visual, images, keys), key=key)
            self._inputs.put(key, inputs, device=torch.device("cpu"))
        return inputs

    def _one(self, source: ImageSource) -> ImageInputs:
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

    def identity(self, visual: VisualSource | None) -> str:
        """Return what tells an image from others in this process: that of a file changes with the file, "" is none."""
        return "" if visual is None else visual_key(visual, _identity)

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

    def shape(self, visual: VisualSource, sizes: Sequence[tuple[int, int]]) -> ImageInputs:
        """Return the tokens that a list or a video takes, without pixels; it is not opened.

        Args:
            visual: of which only the kind is looked at. sizes: width and height of its images.
        Raises:
            ValueError: the processor does not take images of these shapes.
        """
        from PIL import Image

        key = (getattr(visual, "fps", None), *sizes)
        if key not in self._shapes:
            if not isinstance(visual, Video) and self._apart:
                made = joined("", [ImageInputs("", {}, self.tokens(size)) for size in sizes])
            else:
                images = [Image.new("RGB", size) for size in sizes]
                made = self._processed_together(visual, images, [str(number) for number in range(len(sizes))])
            bare = tuple(replace(part, tensors={}) for part in made.parts)
            self._shapes[key] = replace(made, tensors={}, parts=bare)
        return self._shapes[key]

    def smallest(self, visual: VisualSource) -> ImageInputs:
        """Return what stands for a list or a video that is not looked at: a token for each placeholder."""
        one = ImageInputs("", {}, 1, video=isinstance(visual, Video))
        return one if one.video else joined("", [one] * len(images_of(visual)))

    def _processed_together(self, visual: VisualSource, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        assert self._several is not None
        try:
            return self._several.together(visual, images, keys)
        except ValueError as error:
            got = ", ".join("{} x {}".format(*image.size) for image in images[:8])
            raise ImageError(f"image: the processor refuses them, {error} (got {got})") from error

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


def _identity(source: ImageSource) -> str:
    stamp = _file_stamp(source)
    return image_key(source) if stamp is None else "file:{}:{}:{}".format(*stamp)


def _named(place: str, source: ImageSource, read: Callable[[ImageSource], Value]) -> Value:
    """Read one of several images; what is wrong with it says which one it is."""
    try:
        return read(source)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{place.lstrip('.')}: {error}") from error


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
    # Tensors of parts share the memory of those of the whole
    held = inputs.looked_at
    return sum(part.numel() * part.element_size() for each in held for part in each.tensors.values())
