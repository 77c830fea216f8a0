"""From whatever an image is made of to 8-bit RGB: what has more than 8 bits is scaled, never clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastedit.data.problems import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

#: 16-bit greyscale in either byte order.
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def to_rgb(image: Image) -> Image:
    """Return an image in mode RGB, 8 bits a channel; the image itself where it is that already.

    Of 16 bits the high 8 stay, as Pillow's own readers have it for 16-bit colour. Transparency is dropped. Integers of
    32 bits (mode I) are 16-bit values, since files of 16 bits come in that mode; floats (mode F) are 0 to 1, or 0 to
    255 as Pillow converts to them. What lies outside, or may be either, is refused and not guessed.

    Raises:
        ImageError: numbers without a known range. What Pillow raises on an image that it cannot convert.
    """
    mode = image.mode
    if mode == "RGB":
        # One that was opened and not read yet is read now, where an error is expected
        image.load()
        return image
    if mode in _SIXTEEN_BIT:
        return _high_bytes(image)
    if mode == "I":
        return _of_integers(image)
    return _of_floats(image) if mode == "F" else image.convert("RGB")


def _high_bytes(image: Image) -> Image:
    """The upper 8 of 16 bits."""
    import numpy as np
    from PIL import Image

    grey = np.right_shift(np.asarray(image), 8).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _of_integers(image: Image) -> Image:
    low, high = _range(image)
    if low < 0 or high > 65535:
        raise ImageError(f"image: integers (mode I) must lie in 0 to 65535 (got {low:.0f} to {high:.0f})")
    if 0 < high <= 255 and image.format is None:
        raise ImageError(
            "image: integers (mode I) below 256 must be converted to mode 'L' if they are 8-bit, to 'I;16' if they are "
            f"16-bit (got {low:.0f} to {high:.0f})"
        )
    return _high_bytes(image)


def _of_floats(image: Image) -> Image:
    low, high = _range(image)
    if not (low >= 0 and high <= 255):
        raise ImageError(
            f"image: floats (mode F) must lie in 0 to 1 or in 0 to 255, scale them (got {low:.6g} to {high:.6g})"
        )
    scaled = image.point(lambda value: value * 255 + 0.5) if high <= 1 else image
    return scaled.convert("L").convert("RGB")


def _range(image: Image) -> tuple[float, float]:
    """Smallest and largest value; not a number where any is none."""
    import numpy as np

    values = np.asarray(image)
    return float(values.min()), float(values.max())
