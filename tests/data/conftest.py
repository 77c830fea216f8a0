"""Records and folders that the reader tests share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

#: Third-party files, beside the repository where they are there at all.
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data with the public record files is absent")
    return SHARED


@pytest.fixture
def record() -> Callable[..., dict]:
    """Make a complete MMEdit record; every index has its own image and question."""

    def make(index: int = 0, **changes: object) -> dict:
        return {
            "src": f"How many buses are in picture {index}?",
            "pred": "no",
            "rephrase": f"What is the number of buses in picture {index}?",
            "alt": str(index + 2),
            "image": f"val2014/COCO_val2014_{index:012d}.jpg",
            "image_rephrase": f"val2014_image_rephrase/{index}.png",
            "loc": f"nq question: who wrote book {index}",
            "loc_ans": f"author {index}",
            "m_loc": f"val2014/COCO_val2014_{index + 500000:012d}.jpg",
            "m_loc_q": "What sport is this?",
            "m_loc_a": "motocross",
        } | changes

    return make


@pytest.fixture
def entity(record: Callable[..., dict]) -> Callable[..., dict]:
    """Make a complete VLKEB record."""

    def make(index: int = 0, **changes: object) -> dict:
        own = {
            "image": f"m.0{index}/google_1.jpg",
            "image_rephrase": f"m.0{index}/bing_2.jpg",
            "m_loc": "m.09/x.jpg",
            "loc": f"who wrote book {index}",
        }
        return record(index, **own | changes)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a value as JSON, a list of lines as JSON Lines, or bytes as they are."""

    def save(value: object, name: str = "edits.json") -> Path:
        path = tmp_path / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(line) + "\n" for line in value), encoding="utf-8")  # type: ignore[attr-defined]
        else:
            path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return save


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Path]:
    """Make an image root with the named files."""

    def make(*names: str) -> Path:
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3), (number, 10, 20)).save(root / name)
        return root

    return make
