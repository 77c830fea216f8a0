"""Whatever an image is made of becomes 8-bit RGB: scaled, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastedit.backbone.images import ImageReader
from fastedit.data.images import check_image, image_digest, open_image
from fastedit.data.pixels import to_rgb
from fastedit.data.problems import ImageError

#: A ramp over all 8-bit greys, and the same in 16 bits with a low byte that must not count.
GREY = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
DEEP = GREY.astype(np.uint16) * 256 + 37


def png16(samples: int, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, as Pillow itself cannot write it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = DEEP.shape
    pixels = np.repeat(DEEP[:, :, None], samples, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("samples", "colour_type"), [(1, 0), (3, 2), (2, 4), (4, 6)], ids=["L", "RGB", "LA", "RGBA"])
def test_16_bit_png_is_scaled_in_every_colour_type(tmp_path: Path, samples: int, colour_type: int) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png16(samples, colour_type))
    for image in (
        open_image(path),
        open_image(Image.open(path)),
        open_image(Image.open(io.BytesIO(path.read_bytes()))),
    ):
        assert image.mode == "RGB"
        assert (np.asarray(image) == GREY[:, :, None]).all()
    assert check_image(path) == (256, 4)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_16_bit_images_in_memory_are_scaled(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    values = DEEP.astype("<i4" if mode == "I" else order)
    image = Image.frombytes(mode, (256, 4), values.tobytes())
    assert (np.asarray(open_image(image)) == GREY[:, :, None]).all()
    assert image_digest(image) == image_digest(Image.fromarray(GREY))


def test_two_deep_images_are_two_images() -> None:
    low, high = (Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (1000, 60_000))
    assert image_digest(low) != image_digest(high)


def test_a_dark_deep_image_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 255, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() == 0


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_are_0_to_1_or_0_to_255(scale: int) -> None:
    image = Image.fromarray(GREY.astype(np.float32) / 255 * scale)
    assert np.abs(np.asarray(open_image(image)).astype(int) - GREY[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    ("mode", "values", "rule"),
    [
        ("F", [0.0, 65535.0], r"floats \(mode F\) must lie in 0 to 1 or in 0 to 255, scale them \(got 0 to 65535\)"),
        ("F", [-0.5, 1.0], "floats"),
        ("F", [float("nan"), 1.0], "floats"),
        ("F", [float("inf"), 1.0], "floats"),
        ("I", [-1, 70], r"integers \(mode I\) must lie in 0 to 65535 \(got -1 to 70\)"),
        ("I", [0, 65536], "integers"),
        ("I", [0, 200], r"below 256 must be converted to mode 'L' if they are 8-bit, to 'I;16' if they are 16-bit"),
    ],
)
def test_what_may_mean_anything_is_refused(mode: str, values: list[float], rule: str) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32 if mode == "F" else np.int32))
    for look in (open_image, check_image, image_digest):
        with pytest.raises(ImageError, match=rule):
            look(image)


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_8_bit_modes_are_as_pillow_converts_them(mode: str) -> None:
    image = Image.frombytes(mode, (8, 4), bytes(range(8 * 4 * len(Image.new(mode, (1, 1)).getbands())))[: 8 * 4 * 4])
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_black_is_black_in_every_mode() -> None:
    for mode in ("I", "F", "I;16", "L"):
        assert open_image(Image.new(mode, (3, 2))).getextrema() == ((0, 0),) * 3


def test_a_mode_without_a_conversion_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot be decoded, ValueError"):
        open_image(Image.new("La", (3, 2)))


def test_the_engine_reads_what_the_reader_reads(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(png16(1, 0))
    seen = []
    reader = ImageReader(lambda image: (seen.append(image.copy()) or {}, 1), 1 << 20)
    reader.read(tmp_path / "deep.png")
    assert (np.asarray(seen[0]) == GREY[:, :, None]).all()
