import copy
import io
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastedit.data import images as module
from fastedit.data.images import (
    RecordPath,
    check_image,
    image_digest,
    image_key,
    open_image,
    path_rule,
    resolve_image,
    store_image,
)
from fastedit.data.problems import ImageError, MissingImageError

REFUSED = {
    "/etc/passwd": "absolute",
    "//host/share": "absolute",
    "..": "must not leave the image root",
    "../x.png": "must not leave the image root",
    "a/../../x.png": "must not leave the image root",
    "a/..": "must not leave the image root",
    "a\\..\\x.png": "forward slashes",
    "\\\\host\\share": "forward slashes",
    "C:\\x.png": "drive or a URL",
    "c:x.png": "drive or a URL",
    "https://example.org/x.png": "drive or a URL",
    "file:///etc/passwd": "drive or a URL",
    "a\x00.png": "control characters",
    "a\nb.png": "control characters",
    "": "must not be empty",
    "  ": "must not be empty",
    "\ud800.png": "surrogates",
    "x" * 256: "255 in one part",
    "é" * 128: "255 in one part",
    "x/" * 600 + "y": "1024 bytes",
}


@pytest.mark.parametrize("path", REFUSED, ids=range(len(REFUSED)))
def test_paths_that_may_leave_the_root_are_refused(path: str, tmp_path: Path) -> None:
    assert REFUSED[path] in path_rule(path)
    with pytest.raises(ImageError, match="image path: must"):
        resolve_image(path, tmp_path)


@pytest.mark.parametrize(
    "path", ["x.png", "a/b/c.jpg", "m.010bnr/google_13.jpg", "a/./b.png", "..x/y..png", "été 1.png", "~/x"]
)
def test_other_paths_are_not(path: str) -> None:
    assert path_rule(path) == ""


def test_a_path_is_resolved_below_the_root(images: Callable[..., Path]) -> None:
    root = images("a/b.png")
    assert resolve_image("a/./b.png", root) == Path(os.path.realpath(root), "a/b.png")
    for absent in ("a/c.png", "a/b.png/c.png", "x/y/z.png"):
        with pytest.raises(MissingImageError, match="not found below the image root"):
            resolve_image(absent, root)
    with pytest.raises(ImageError, match="regular file"):
        resolve_image("a", root)


def test_links_are_followed_inside_and_refused_outside(images: Callable[..., Path], tmp_path: Path) -> None:
    root = images("a/b.png")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (1, 1)).save(secret)
    (root / "inside.png").symlink_to("a/b.png")
    (root / "outside.png").symlink_to(secret)
    (root / "up").symlink_to(tmp_path)
    (root / "round").symlink_to("round")
    (root / "dangling").symlink_to("nowhere.png")
    assert resolve_image("inside.png", root).name == "b.png"
    for path in ("outside.png", "up/secret.png", "up/images/../secret.png"):
        with pytest.raises(ImageError, match=r"symbolic link|'\.\.'"):
            resolve_image(path, root)
        with pytest.raises(ImageError):
            open_image(path, root)
    with pytest.raises(ImageError, match="cannot be followed"):
        resolve_image("round", root)
    with pytest.raises(MissingImageError):
        resolve_image("dangling", root)


def test_a_root_that_is_a_link_is_no_escape(images: Callable[..., Path], tmp_path: Path) -> None:
    root = images("b.png")
    (tmp_path / "link").symlink_to(root)
    assert open_image("b.png", tmp_path / "link").size == (4, 3)


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root-2").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "root-2" / "x.png")
    (tmp_path / "root" / "x.png").symlink_to(tmp_path / "root-2" / "x.png")
    with pytest.raises(ImageError, match="symbolic link"):
        resolve_image("x.png", tmp_path / "root")


@given(st.text(st.sampled_from(["a", "/", ".", "\\", ":", "\x00", " "]), max_size=12))
def test_no_accepted_path_names_a_place_outside(path: str) -> None:
    if not path_rule(path):
        assert os.path.normpath(f"/below/{path}").startswith("/below")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LA"])
def test_images_in_memory_become_rgb(mode: str) -> None:
    assert open_image(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_the_five_formats_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert abs(image.getpixel((4, 3))[0] - 200) < 8  # type: ignore[index]


def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    for format in ("TIFF", "PPM", "ICO", "PDF"):
        path = tmp_path / "x.png"
        Image.new("RGB", (8, 6)).save(path, format=format)
        with pytest.raises(ImageError, match="must be one of PNG, JPEG, WEBP, BMP, GIF"):
            open_image(path)


def test_the_error_names_the_record(tmp_path: Path) -> None:
    with pytest.raises(MissingImageError, match=r"^vqa.json#3: image: no such file \(got 'x.png'\)"):
        open_image(tmp_path / "x.png", record="vqa.json#3")
    with pytest.raises(ImageError, match="must be a regular file"):
        open_image(tmp_path, record="vqa.json#3")


def test_large_images_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("was unpacked"))
    with pytest.raises(ImageError, match=r"must not have more than 67108864 pixels \(got 'bomb.png' of 9000 x 9000"):
        open_image(path)


def test_bombs_that_pillow_refuses_are_image_errors(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    # The header says 30,000 x 30,000; its checksum is that of the 13 bytes and the chunk's name.
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(ImageError, match="must not have more than 67108864 pixels"):
        open_image(path)


def test_large_files_are_refused(images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = images("a.png")
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ImageError, match="larger than 10 bytes"):
        open_image("a.png", root)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_image_errors_and_nothing_else(tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "x"
    refused = 0
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        Image.effect_noise((24, 24), 60).convert("RGB").save(buffer, format=format)
        for _ in range(120):
            data = bytearray(buffer.getvalue())
            for _ in range(generator.randint(1, 8)):
                data[generator.randrange(min(len(data), 200))] = generator.randrange(256)
            if generator.random() < 0.3:
                del data[generator.randrange(len(data)) :]
            path.write_bytes(data)
            try:
                assert open_image(path).mode == "RGB"
            except ImageError:
                refused += 1
    assert refused > 100


def test_content_identifies_an_image(images: Callable[..., Path]) -> None:
    root = images("a.png", "b.png")
    assert image_digest(root / "a.png").startswith("file:")
    assert image_digest(root / "a.png") != image_digest(root / "b.png")
    (root / "c.png").write_bytes((root / "a.png").read_bytes())
    assert image_digest(root / "a.png") == image_digest(root / "c.png")
    assert image_digest("no/such.png") == "path:no/such.png"
    assert image_digest("nul\x00.png") == "path:nul\x00.png"


def test_pixels_identify_an_image_in_memory() -> None:
    image = Image.new("L", (2, 6), 7)
    assert image_digest(image) == image_digest(image.convert("RGB"))
    # The same bytes in another shape are another image.
    assert image_digest(image) != image_digest(Image.new("L", (6, 2), 7))
    assert image_key(image) == image_digest(image)
    assert image_key("a/./b.png") == image_key(Path("a/b.png")) == "path:a/b.png"


def test_images_are_stored_once_and_found_again(tmp_path: Path) -> None:
    image = Image.effect_noise((5, 5), 50)
    name = store_image(image, tmp_path / "out")
    assert store_image(image.copy(), tmp_path / "out") == name
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert image_digest(open_image(name, tmp_path / "out")) == image_digest(image)


def test_stored_paths_are_relative_to_the_root(images: Callable[..., Path], tmp_path: Path) -> None:
    root = images("a/b.png")
    assert store_image(root / "a" / "b.png", root) == "a/b.png"
    assert store_image("a/b.png", None) == "a/b.png"
    with pytest.raises(ImageError, match="below the image folder"):
        store_image(tmp_path / "x.png", root)
    with pytest.raises(ImageError, match="below the image folder"):
        store_image(root / "a" / "b.png", None)
    with pytest.raises(ImageError, match="must not leave"):
        store_image("../x.png", root)
    with pytest.raises(ImageError, match="needs a folder"):
        store_image(Image.new("RGB", (1, 1)), None)


def test_a_path_of_a_record_stays_below_the_working_folder(
    images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = images("a.png")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (1, 1)).save(secret)
    (root / "out.png").symlink_to(secret)
    (root / "up").symlink_to(tmp_path)
    monkeypatch.chdir(root)
    assert open_image(RecordPath("a.png")).size == check_image(RecordPath("a.png")) == (4, 3)
    for path in ("out.png", "up/secret.png"):
        for look in (open_image, check_image):
            with pytest.raises(ImageError, match=r"must not leave the image root by a symbolic link; the root is the"):
                look(RecordPath(path))
        # The caller's own path is the caller's
        assert open_image(path).size == (1, 1)
        assert image_digest(RecordPath(path)) == f"path:{path}"
    with pytest.raises(ImageError, match="absolute"):
        open_image(RecordPath(str(secret)))
    with pytest.raises(
        MissingImageError, match=r"not found below the image root; the root is the working folder, as no"
    ):
        open_image(RecordPath("b.png"))


def test_a_path_of_a_record_is_text_that_can_be_copied() -> None:
    path = RecordPath("a/b.png")
    for twin in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert twin == "a/b.png"
        assert isinstance(twin, RecordPath)


def test_a_resolved_path_that_becomes_a_link_is_not_followed(images: Callable[..., Path], tmp_path: Path) -> None:
    root = images("a.png", "b/c.png")
    (tmp_path / "outside").mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (1, 1)).save(tmp_path / "outside" / name)
    file, nested = resolve_image("a.png", root), resolve_image("b/c.png", root)
    assert open_image(file).size == open_image(pickle.loads(pickle.dumps(nested))).size == (4, 3)
    (root / "a.png").unlink()
    (root / "a.png").symlink_to(tmp_path / "outside" / "a.png")
    (root / "b" / "c.png").unlink()
    (root / "b").rmdir()
    (root / "b").symlink_to(tmp_path / "outside")
    for path in (file, nested):
        for look in (open_image, check_image):
            with pytest.raises(ImageError, match="must not have become a symbolic link"):
                look(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="must be a regular file"):
        open_image(tmp_path / "pipe.png")
    assert image_digest(tmp_path / "pipe.png").startswith("path:")


def test_a_line_of_pixels_is_refused(tmp_path: Path) -> None:
    # A processor scales the shorter side to some hundred pixels
    Image.new("1", (60_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(
        ImageError, match=r"longer side must be at most 200 times the shorter \(got 'line.png' of 60000 x"
    ):
        open_image(tmp_path / "line.png")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "behind them"])
def test_a_small_chunk_that_unpacks_to_much_is_an_image_error(tmp_path: Path, kind: bytes, last: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    data = buffer.getvalue()
    place = data.index(b"IEND") - 4 if last else 33
    bomb = _png_chunk(kind, b"k\0\0" + zlib.compress(b"\0" * 50_000_000, 9))
    (tmp_path / "x.png").write_bytes(data[:place] + bomb + data[place:])
    for look in (open_image, check_image):
        with pytest.raises(ImageError, match="cannot be decoded, ValueError: Decompressed data too large"):
            look(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_frame_larger_than_its_animation_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, format="GIF")
    data = bytearray(buffer.getvalue())
    frame = data.index(b",", 13)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    (tmp_path / "x.gif").write_bytes(data)
    with pytest.raises(ImageError, match="must not have more than 67108864 pixels"):
        open_image(tmp_path / "x.gif")


def test_an_image_that_is_not_read_yet_is_read_here(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:600])
    for look in (open_image, check_image, image_digest):
        with pytest.raises(ImageError, match=r"cannot be decoded.*\(got 'image in memory'\)"):
            look(Image.open(path))
    closed = Image.open(io.BytesIO(b"".join([path.read_bytes()])))
    closed.close()
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image(closed)


def test_what_is_opened_keeps_no_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp")
    assert type(open_image(tmp_path / "x.webp")) is Image.Image


_BASES: list[bytes] = []


def _bases() -> list[bytes]:
    """Small files of every format, in several modes."""
    if not _BASES:
        noise = Image.effect_noise((24, 20), 60)
        turned = [noise.convert("RGB").rotate(90)]
        for format, mode, options in (
            ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "LA", {}), ("PNG", "1", {}), ("PNG", "I;16", {}),
            ("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}), ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("GIF", "P", {}),
            ("GIF", "P", {"save_all": True, "append_images": turned}),
            ("WEBP", "RGB", {"save_all": True, "append_images": turned}),
            ("PNG", "RGB", {"save_all": True, "append_images": turned}),
        ):  # fmt: skip
            buffer = io.BytesIO()
            noise.convert("RGB" if mode not in ("L", "I;16") else mode).convert(mode).save(
                buffer, format=format, **options
            )
            _BASES.append(buffer.getvalue())
    return _BASES


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_damage_gives_an_image_or_an_image_error_and_checking_knows_which(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(range(len(_bases()))).map(lambda number: _bases()[number])))
    for _ in range(data.draw(st.integers(0, 6))):
        # Headers are hit as often as all the rest
        place = data.draw(st.one_of(st.integers(0, min(99, len(damaged) - 1)), st.integers(0, len(damaged) - 1)))
        damaged[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    try:
        size = check_image(path)
    except ImageError:
        with pytest.raises(ImageError):
            open_image(path)
    else:
        image = open_image(path)
        assert image.mode == "RGB"
        assert image.size == size
