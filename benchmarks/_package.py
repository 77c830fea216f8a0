"""Import this first in a script of this folder: it makes the folder importable as ``benchmarks``, and nothing else.

Python puts a script's own folder on the path. There, ``kernels.py`` and others would shadow packages of the same name
that transformers and bitsandbytes look for, as the folder ``kernels`` in the repository's root would.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def make_importable() -> None:
    """Take the folder off the path and register it as a package; the root only where fastedit is not installed."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]
    if importlib.util.find_spec("fastedit") is None:
        sys.path.append(str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    if spec is None or spec.loader is None:
        raise ImportError("benchmarks: no __init__.py beside this script")
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)


make_importable()
