"""Pictures of a page: small, each once, bounded."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from fastedit import Video
from fastedit.report.pictures import PER_QUESTION, SIDE, Pictures, more_words
from tests.engine.conftest import picture


def images_in(style: str) -> dict[str, Image.Image]:
    found = re.findall(r"\.(p\d+)\{background-image:url\(data:image/\w+;base64,([A-Za-z0-9+/=]+)\)\}", style)
    return {name: Image.open(io.BytesIO(base64.b64decode(data))) for name, data in found}


def test_a_large_image_becomes_a_thumbnail_and_a_small_one_is_kept(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 600), "teal").save(tmp_path / "large.png")
    small = picture(1)
    pictures = Pictures()
    names = pictures.of([tmp_path / "large.png", small])
    images = images_in(pictures.style())
    assert [images[name].size for name in names] == [(SIDE, SIDE // 2), (64, 64)]
    assert images[names[1]].convert("RGB").tobytes() == small.tobytes()


def test_an_image_is_on_the_page_once() -> None:
    pictures = Pictures()
    assert pictures.of(picture(1)) == pictures.of(picture(1))
    assert pictures.style().count("background-image") == 1


def test_pictures_stay_within_their_bound() -> None:
    pictures = Pictures(most_bytes=40_000)
    for seed in range(10):
        pictures.of(picture(seed))
    assert 0 < len(images_in(pictures.style())) < 10
    assert pictures.left_out == 10 - len(images_in(pictures.style()))
    assert len(pictures.style()) < 41_000


def test_what_cannot_be_read_has_no_picture(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>404</html>")
    pictures = Pictures()
    assert pictures.of(tmp_path / "page.png") == []
    assert pictures.of(tmp_path / "absent.png") == []
    assert pictures.of(None) == []
    assert pictures.left_out == 2
    assert pictures.style() == ""
    assert more_words(tmp_path / "absent.png", []) == "picture not shown"


def test_a_video_shows_its_first_frames_and_says_how_many_more() -> None:
    video = Video([picture(seed) for seed in range(5)])
    pictures = Pictures()
    names = pictures.of(video)
    assert len(names) == PER_QUESTION
    assert more_words(video, names) == "+2"
