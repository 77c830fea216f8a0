"""Opening, hashing and caching of images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastedit.backbone import load
from fastedit.backbone.caches import SpillCache
from fastedit.backbone.images import ImageReader, content_hash, open_image
from fastedit.data.problems import ImageError
from fastedit.requests import Query
from tests.backbone.padded import prefix, tail

from .conftest import largest_gap, picture

TOWERS = {
    "random:llava-tiny": "model.vision_tower",
    "random:blip2-tiny": "vision_model",
    "random:qwen3vl-tiny": "model.visual",
}


@pytest.mark.parametrize("name", list(TOWERS))
def test_the_tower_runs_once_per_distinct_image(name: str, count_calls) -> None:
    model = load(name)
    calls = count_calls(model.hf.get_submodule(TOWERS[name]))
    rows = [Query("what?", picture(0)), Query("is it red?", picture(0)), Query("what?", None)]
    encoded = model.encode(rows, answers=False)
    first = tail(model, prefix(model, encoded, 1))
    assert len(calls) == 1
    again = tail(model, prefix(model, model.encode(rows[::-1], answers=False), 2)).flip(0)
    model.generate(rows, max_new_tokens=2)
    assert len(calls) == 1
    assert largest_gap(first[encoded.attention_mask], again[encoded.attention_mask]) < 1e-5
    # Two new ones: one more call for both.
    prefix(model, model.encode([Query("what?", picture(seed)) for seed in (0, 1, 2)], answers=False), 0)
    assert len(calls) == 2
    assert len(model.image_features) == 3


def test_without_a_budget_nothing_is_kept_and_results_stay(count_calls) -> None:
    model, other = load("random:llava-tiny", image_cache_mib=0), load("random:llava-tiny")
    calls = count_calls(model.hf.model.vision_tower)
    encoded = model.encode([Query("what?", picture(0))], answers=False)
    hidden = [prefix(model, encoded, 1).hidden for _ in range(2)]
    assert len(calls) == 2
    assert len(model.image_features) == 0
    assert torch.equal(hidden[0], prefix(other, other.encode([Query("what?", picture(0))], answers=False), 1).hidden)


def test_the_least_recently_used_goes_first() -> None:
    cache: SpillCache[str] = SpillCache(10, 0, len, lambda text, _to: text)
    cache.put("a", "xxxx", device=torch.device("cpu"))
    cache.put("b", "xxxx", device=torch.device("cpu"))
    assert cache.get("a") == "xxxx"
    cache.put("c", "xxxx", device=torch.device("cpu"))
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert cache.held_bytes == 8
    cache.put("a", "x", device=torch.device("cpu"))
    assert cache.held_bytes == 5
    cache.put("huge", "x" * 11, device=torch.device("cpu"))
    assert "huge" not in cache
    assert len(cache) == 2
    cache.clear()
    assert (len(cache), cache.held_bytes) == (0, 0)


def test_equal_pixels_have_equal_keys_whatever_the_source(tmp_path: Path) -> None:
    runs = []

    def preprocess(image: Image.Image) -> tuple[dict[str, torch.Tensor], int]:
        runs.append(image.size)
        return {"pixel_values": torch.zeros(1, 3, 2, 2)}, 4

    reader = ImageReader(preprocess, 1 << 20)
    image = picture(3)
    image.save(tmp_path / "one.png")
    image.save(tmp_path / "two.bmp")
    sources = [image, tmp_path / "one.png", str(tmp_path / "two.bmp"), tmp_path / "one.png"]
    assert len({reader.read(source).key for source in sources}) == 1
    assert len(runs) == 1
    # A file that has changed is read again.
    picture(4).save(tmp_path / "one.png")
    os.utime(tmp_path / "one.png", ns=(1, 1))
    assert reader.read(tmp_path / "one.png").key == content_hash(picture(4))
    assert len(runs) == 2
    reader.clear()
    reader.read(image)
    assert len(runs) == 3


def test_sizes_and_tokens_are_known_without_keeping_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def preprocess(image: Image.Image) -> tuple[dict[str, torch.Tensor], int]:
        seen.append(image.size)
        if image.width > 90:
            raise ValueError("too wide")
        return {"pixel_values": torch.zeros(1, 3, 2, 2)}, image.width

    reader = ImageReader(preprocess, 1 << 20)
    picture(3, 40, 70).save(tmp_path / "one.png")
    assert reader.size(tmp_path / "one.png") == reader.size(picture(3, 40, 70)) == (70, 40)
    assert reader.held_bytes == 0
    assert [reader.tokens((70, 40)), reader.tokens((70, 40)), seen] == [70, 70, [(70, 40)]]
    with pytest.raises(ImageError, match=r"the processor refuses it, too wide \(got 95 x 40\)"):
        reader.tokens((95, 40))
    with pytest.raises(ImageError, match="too wide"):
        reader.read(picture(3, 40, 95))
    # A file that is known is not decoded again, one that has changed is
    monkeypatch.setattr("fastedit.backbone.images.check_image", lambda source: pytest.fail("was decoded"))
    other = ImageReader(preprocess, 1 << 20)
    other.take_sizes(reader)
    assert reader.size(str(tmp_path / "one.png")) == other.size(tmp_path / "one.png") == (70, 40)
    monkeypatch.undo()
    picture(4, 30, 60).save(tmp_path / "one.png")
    os.utime(tmp_path / "one.png", ns=(1, 1))
    assert reader.size(tmp_path / "one.png") == (60, 30)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        picture(0).convert(mode).save(tmp_path / f"{mode}.png")
        assert open_image(tmp_path / f"{mode}.png").mode == "RGB"
    assert content_hash(picture(0, 40, 70)) != content_hash(picture(0, 70, 40))
