"""What a question is about: one image, several in order, or the frames of a video."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fastedit import EditRequest, Probe, Query, Video
from fastedit.visuals import image_places, images_of, visual_key, with_images


def test_a_list_is_kept_in_order_and_one_image_is_no_list() -> None:
    picture = Image.new("RGB", (2, 2))
    edit = EditRequest("a", "b", image=["x.png", picture, Path("y.png")])
    assert edit.image == ("x.png", picture, Path("y.png"))
    assert edit.query.image == edit.image
    assert EditRequest("a", "b", image=["x.png"]) == EditRequest("a", "b", image="x.png")
    assert Query("a", ["x", "y"]) != Query("a", ["y", "x"])
    assert hash(Query("a", ["x", "y"])) == hash(Query("a", ("x", "y")))
    assert Probe("near", "a", ["x", "y"]).query.image == ("x", "y")
    assert replace(edit, image=None).image is None
    assert repr(Query("a", ["x", "y"])) == "Query(prompt='a', image=('x', 'y'), answer=None, kind='')"


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ([], ValueError, r"Query: image must hold at least one image \(got image=\[\]\)"),
        (["a", 3], TypeError, r"Query: image\[1\] must be a path or a PIL image \(got type int\)"),
        (["a", b"x"], TypeError, r"Query: image\[1\] must be a path or a PIL image \(got type bytes\)"),
        (["a", " "], ValueError, r"Query: image\[1\] must not be an empty path"),
        (["a", ["b"]], TypeError, r"Query: image\[1\] must be a path or a PIL image \(got type list\)"),
        (["a", Video(["b"])], TypeError, r"Query: image\[1\] must be a path or a PIL image \(got type Video\)"),
        (("a", None), TypeError, r"Query: image\[1\] must be a path or a PIL image \(got type NoneType\)"),
    ],
)
def test_what_no_list_of_images_is_names_the_element(value: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Query("what?", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"frames": []}, ValueError, r"Video: frames must hold at least one image"),
        ({"frames": "folder"}, TypeError, r"Video: frames must be a list of images \(got type str\)"),
        ({"frames": ["a", ""]}, ValueError, r"Video: frames\[1\] must not be an empty path"),
        ({"frames": ["a"], "fps": 0}, ValueError, r"Video: fps must be a finite number above 0 \(got fps=0\)"),
        ({"frames": ["a"], "fps": float("nan")}, ValueError, "Video: fps must be a finite number above 0"),
        ({"frames": ["a"], "fps": "2"}, TypeError, r"Video: fps must be a number \(got fps='2'\)"),
        ({"frames": ["a"], "fps": True}, TypeError, "Video: fps must be a number"),
    ],
)
def test_what_no_video_is(fields: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Video(**fields)


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "c.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    video = Video.from_folder(tmp_path, fps=2)
    assert [frame.name for frame in video.frames] == ["a.PNG", "b.png", "c.jpg"]  # type: ignore[union-attr]
    assert video.fps == 2.0
    for folder in (tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(FileNotFoundError, match="Video: folder must exist and hold image files"):
            Video.from_folder(folder)


def test_images_their_places_and_their_keys() -> None:
    listed, video = ("x", "y"), Video(["x", "y"], 2)
    assert images_of(None) == ()
    assert images_of("x") == ("x",)
    assert images_of(listed) == images_of(video) == ("x", "y")
    assert list(image_places("x")) == [("", "x")]
    assert list(image_places(listed)) == [("[0]", "x"), ("[1]", "y")]
    assert list(image_places(video)) == [(".frames[0]", "x"), (".frames[1]", "y")]
    assert list(image_places(None)) == []
    doubled = [with_images(each, lambda image: f"{image}{image}") for each in ("x", listed, video)]
    assert doubled == ["xx", ("xx", "yy"), Video(("xx", "yy"), 2)]
    every = ["x", listed, ("y", "x"), ("x", "y", "y"), video, Video(["x", "y"], 3), Video(["y", "x"], 2)]
    assert len({visual_key(each, str) for each in every}) == len(every)
    assert visual_key("x", str) == "x"
