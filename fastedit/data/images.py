"""Image sources: which paths are accepted, how files are opened, and what identifies an image.

A record's path comes from a file that may be anybody's. It is text relative to an image root, and whatever it
says, nothing outside that root is opened. Every image of the package is opened here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fastedit.data.pixels import to_rgb
from fastedit.data.problems import ImageError, MissingImageError, shorten
from fastedit.visuals import ImageSource, VisualSource, visual_key

if TYPE_CHECKING:
    from PIL.Image import Image

#: What Pillow may try on a file; its other decoders are rarer and less tested against hostile input.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
#: Largest image file, in bytes, and largest image, in pixels (8,192 x 8,192).
MAX_IMAGE_BYTES = 128 * 2**20
MAX_PIXELS = 2**26
#: Longest side over the shortest. Processors scale the shorter side to a fixed length: without a limit a line of a
#: few thousand pixels becomes gigabytes.
MAX_RATIO = 200
#: Longest path of a record and of one of its parts, in UTF-8 bytes (file systems stop at 255 a part).
MAX_PATH_BYTES = 1024
MAX_PART_BYTES = 255

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def path_rule(path: str) -> str:
    """Return the rule that a record's image path breaks, or "". Only the text is looked at."""
    if not path.strip():
        return "must not be empty"
    if any("\ud800" <= character <= "\udfff" for character in path):
        return "must be valid Unicode, without lone surrogates"
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        return "must not hold control characters"
    if path.startswith("/"):
        return "must be relative to the image root, not absolute"
    if _SCHEME.match(path):
        return "must be relative to the image root, not a drive or a URL"
    if "\\" in path:
        return "must use forward slashes"
    parts = path.split("/")
    if ".." in parts:
        return "must not leave the image root by '..'"
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"must not be longer than {MAX_PATH_BYTES} bytes, or {MAX_PART_BYTES} in one part"
    return ""


class RecordPath(str):
    """The text of an image path in a record that was read without an image root.

    It is opened below the working folder and nowhere else, where a path that a caller made is opened as it is.
    """

    __slots__ = ()


class RealPath(type(Path())):  # type: ignore[misc]
    """Where a record's image was found below its root, links followed; links that come to lie there later are not."""


def resolve_image(path: str, root: str | os.PathLike[str]) -> RealPath:
    """Return the real path of a record's image below `root`, which must exist as a regular file.

    Symbolic links are followed to the end and may not lead out of the root.

    Raises:
        MissingImageError: there is no such file.
        ImageError: the path is refused. Message: "image path: rule (got path=...)".
    """
    got = f"(got path={shorten(path)})"
    rule = path_rule(path)
    if rule:
        raise ImageError(f"image path: {rule} {got}")
    base = os.path.realpath(root)
    try:
        real = os.path.realpath(Path(base, path), strict=True)
        mode = Path(real).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingImageError(f"image path: not found below the image root {got}") from error
    except OSError as error:
        raise ImageError(f"image path: cannot be followed, {error.strerror} {got}") from error
    if not Path(real).is_relative_to(base):
        raise ImageError(f"image path: must not leave the image root by a symbolic link {got}")
    if not stat.S_ISREG(mode):
        raise ImageError(f"image path: must be a regular file {got}")
    return RealPath(real)


def locate(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Path:
    """Return the path to open: the real one below the root for a record's path, else the source as it is.

    Raises:
        MissingImageError, ImageError: as `resolve_image` does.
    """
    if root is not None:
        return resolve_image(os.fspath(source), root)
    if isinstance(source, RealPath):
        return source
    if not isinstance(source, RecordPath):
        return Path(source)
    try:
        return resolve_image(source, Path.cwd())
    except ImageError as error:
        rule, _, got = str(error).partition(" (got ")
        raise type(error)(f"{rule}; the root is the working folder, as no images=... was given (got {got}") from error


def open_image(source: ImageSource, root: str | os.PathLike[str] | None = None, *, record: str = "") -> Image:
    """Return the image, fully decoded, in RGB; the file is closed.

    The first frame of an animation is taken. Orientation marks (EXIF) are not applied and transparency is
    dropped, as every editing toolkit does, so that scores stay comparable. Of 16 bits a channel the high 8 are taken.

    Args:
        source: a PIL image, or the path of a PNG, JPEG, WebP, BMP or GIF file.
        root: if given, `source` is a record's path and must stay below this folder; else it is opened as it is, a
            `RecordPath` below the working folder.
        record: name of the record, put before the message of an error.
    Returns:
        PIL image, mode "RGB"; a new one except where a PIL image already had that mode.
    Raises:
        MissingImageError, ImageError: "record: rule (got ...)".
    """
    try:
        with _opened(source, root) as image:
            rgb = to_rgb(image)
            # A file's image would keep its decoder
            return rgb.copy() if rgb is image and image is not source else rgb
    except ImageError as error:
        if not record:
            raise
        raise type(error)(f"{record}: {error}") from error


def check_image(source: ImageSource, root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """Return width and height of an image that `open_image` would return; nothing of it is kept.

    The whole file is decoded, a JPEG at an eighth of its size: that reads the same stream in a quarter of the time.

    Raises:
        MissingImageError, ImageError: as `open_image` does.
    """
    with _opened(source, root) as image:
        size: tuple[int, int] = image.size
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            image.draft(image.mode, (1, 1))
        if image.mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
            image.load()
        else:
            to_rgb(image)
        return size


@contextmanager
def _opened(source: ImageSource, root: str | os.PathLike[str] | None) -> Iterator[Image]:
    """A PIL image whose header is read and within the limits; whatever goes wrong with it inside is an ImageError."""
    from PIL import Image

    if not isinstance(source, (str, os.PathLike)):
        with _refused("image in memory"):
            _check_size(source, "image in memory")
            yield source
        return
    path = locate(source, root)
    with _refused(path.name), open_file(path) as stream, Image.open(stream, formats=FORMATS) as image:
        # The header is read, the pixels are not: too large an image is refused before it is unpacked.
        _check_size(image, path.name)
        yield image


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Inside the block what Pillow raises becomes an ImageError that names the image."""
    from PIL import Image, UnidentifiedImageError

    got = f"(got {name!r})"
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"image: must be one of {', '.join(FORMATS)} {got}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image: must not have more than {MAX_PIXELS} pixels {got}") from error
    except _DECODING_ERRORS as error:
        raise ImageError(f"image: cannot be decoded, {type(error).__name__}: {str(error)[:120]} {got}") from error


def open_file(path: Path) -> io.BufferedReader:
    """Open an image file for reading: a regular one within the limit, looked at only once it is open.

    Raises:
        MissingImageError, ImageError: "image: rule (got name)".
    """
    got = f"(got {path.name!r})"
    # Without blocking, so that a pipe in the place of a file is refused and not waited for
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingImageError(f"image: no such file {got}") from error
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"image: cannot be opened, {why} {got}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"image: must be a regular file {got}")
        if isinstance(path, RealPath) and not _is_still(path, status):
            raise ImageError(f"image: must not have become a symbolic link since it was found {got}")
        if status.st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"image: file must not be larger than {MAX_IMAGE_BYTES} bytes {got}")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _is_still(path: Path, status: os.stat_result) -> bool:
    """Whether what was opened is what lies at a path that no link leads through."""
    return os.path.realpath(path) == str(path) and os.path.samestat(path.lstat(), status)


#: What Pillow's decoders raise on damaged files, by format and version.
_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError, AttributeError,
    AssertionError, BufferError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


def _check_size(image: Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"image: must have at least one pixel (got {name!r} of {width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"image: must not have more than {MAX_PIXELS} pixels (got {name!r} of {width} x {height})")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"image: the longer side must be at most {MAX_RATIO} times the shorter (got {name!r} of {width} x {height})"
        )


def image_digest(source: ImageSource) -> str:
    """Return what identifies an image's content: "file:<sha256>" of the bytes, or "pixels:<sha256>" in memory.

    A path that cannot be read gives "path:<path>" instead.
    """
    if not isinstance(source, (str, os.PathLike)):
        image = open_image(source)
        digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
        digest.update(image.tobytes())
        return f"pixels:{digest.hexdigest()}"
    try:
        with open_file(locate(source)) as stream:
            return f"file:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except (OSError, ImageError):
        return f"path:{Path(source).as_posix()}"


def image_key(source: VisualSource) -> str:
    """Return a cheap identity inside one process, of lists and videos in order: paths as text, pixels in memory."""
    return visual_key(source, _one_key)


def _one_key(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return f"path:{PurePosixPath(source)}"
    return image_digest(source)


def store_image(source: ImageSource, root: str | os.PathLike[str] | None) -> str:
    """Return the path text that a record written below `root` has for this image; images in memory are saved there.

    Raises:
        ImageError: an image in memory without `root`, or a path that cannot be told relative to `root`.
    """
    if not isinstance(source, (str, os.PathLike)):
        if root is None:
            raise ImageError("image: an image in memory needs a folder to be saved in (got images=None)")
        name = image_digest(source).split(":", 1)[1][:32] + ".png"
        _save(source, Path(root, name))
        return name
    path = Path(source)
    if path.is_absolute():
        base = None if root is None else Path(os.path.realpath(root))
        real = Path(os.path.realpath(path))
        if base is None or not real.is_relative_to(base):
            raise ImageError(f"image: an absolute path must lie below the image folder (got {shorten(str(path))})")
        path = real.relative_to(base)
    rule = path_rule(path.as_posix())
    if rule:
        raise ImageError(f"image path: {rule} (got path={shorten(path.as_posix())})")
    return path.as_posix()


def _save(image: Image, path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: a run that is killed leaves no half image under the final name.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        open_image(image).save(temporary, format="PNG")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
