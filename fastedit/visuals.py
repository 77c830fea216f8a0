"""What a question is about: an image, several images in order, or a video as its frames. Nothing is opened here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union, cast

if TYPE_CHECKING:
    from PIL.Image import Image

#: A path to an image file, or a PIL image that is already in memory.
ImageSource: TypeAlias = Union[str, "os.PathLike[str]", "Image"]

#: File names that a folder of frames is made of.
_FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True, slots=True)
class Video:
    """A video as its frames, which are taken as they are: none is left out, none is made up.

    Args:
        frames: one image a frame, in order; at least one.
        fps: frames per second of these frames, above 0; what tells models with timestamps when each was taken.
    Raises:
        TypeError, ValueError: "Video: rule (got name=...)".
    """

    frames: tuple[ImageSource, ...]
    fps: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", _image_list("Video", "frames", self.frames))
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)):
            raise TypeError(f"Video: fps must be a number (got fps={self.fps!r:.80})")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"Video: fps must be a finite number above 0 (got fps={self.fps!r})")
        object.__setattr__(self, "fps", float(self.fps))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], fps: float = 1.0) -> Video:
        """Return the video whose frames are the image files of a folder, in the order of their names.

        Raises:
            FileNotFoundError: no such folder, or none of its files is named like an image.
        """
        path = Path(folder)
        names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
        frames = tuple(path / name for name in names if name.lower().endswith(_FRAME_SUFFIXES))
        if not frames:
            raise FileNotFoundError(
                f"Video: folder must exist and hold image files, one a frame (got folder={os.fspath(folder)!r})"
            )
        return cls(frames, fps)


#: What an `image` field takes: one image, a list of images, or a video.
VisualSource: TypeAlias = ImageSource | Video | Sequence[ImageSource]


def checked_visual(owner: str, name: str, value: object) -> VisualSource | None:
    """Return what an image field holds: a list as a tuple, a list of one image as that image. Nothing is opened.

    Raises:
        TypeError, ValueError: "owner: rule (got name=...)", naming the element of a list.
    """
    if value is None or isinstance(value, Video):
        return value
    if isinstance(value, (list, tuple)):
        images = _image_list(owner, name, value)
        return images[0] if len(images) == 1 else images
    return _image(owner, name, value)


def images_of(visual: VisualSource | None) -> tuple[ImageSource, ...]:
    """Return the images of what a question is about, in order: none, one, those of a list, or a video's frames."""
    if visual is None:
        return ()
    if isinstance(visual, Video):
        return visual.frames
    return tuple(visual) if isinstance(visual, (list, tuple)) else (cast(ImageSource, visual),)


def image_places(visual: VisualSource | None) -> Iterator[tuple[str, ImageSource]]:
    """Yield every image with where it stands in its field: "", "[1]" in a list, ".frames[1]" in a video."""
    many = ".frames" if isinstance(visual, Video) else "" if isinstance(visual, (list, tuple)) else None
    for number, source in enumerate(images_of(visual)):
        yield "" if many is None else f"{many}[{number}]", source


def with_images(visual: VisualSource, change: Callable[[ImageSource], ImageSource]) -> VisualSource:
    """Return the same kind of thing with every image replaced by ``change(image)``, in order."""
    changed = tuple(change(source) for source in images_of(visual))
    if isinstance(visual, Video):
        return Video(changed, visual.fps)
    return changed if isinstance(visual, (list, tuple)) else changed[0]


def visual_key(visual: VisualSource, key: Callable[[ImageSource], str]) -> str:
    """Return what identifies an image, a list or a video where ``key`` identifies an image. The order counts."""
    if isinstance(visual, Video):
        return f"video:{visual.fps!r}:{[key(frame) for frame in visual.frames]!r}"
    if isinstance(visual, (list, tuple)):
        return f"images:{[key(image) for image in visual]!r}"
    return key(cast(ImageSource, visual))


def _image_list(owner: str, name: str, values: object) -> tuple[ImageSource, ...]:
    """Return the images of a list, refusing an empty one and whatever is no image in it."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{owner}: {name} must be a list of images (got type {type(values).__name__})")
    if not values:
        raise ValueError(f"{owner}: {name} must hold at least one image (got {name}={values!r})")
    return tuple(_image(owner, f"{name}[{number}]", value) for number, value in enumerate(values))


def _image(owner: str, name: str, value: object) -> ImageSource:
    """Return an image source, refusing a value that cannot be one."""
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if not isinstance(path, str):
            raise TypeError(f"{owner}: {name} must be a text path, not a bytes path (got {name}={value!r:.80})")
        if not path.strip():
            raise ValueError(f"{owner}: {name} must not be an empty path (got {name}={value!r:.80})")
        return value
    # PIL is not imported for this: an image is recognised by the two members that every reader uses.
    if not (hasattr(value, "convert") and hasattr(value, "size")):
        raise TypeError(f"{owner}: {name} must be a path or a PIL image (got type {type(value).__name__})")
    return cast(ImageSource, value)
