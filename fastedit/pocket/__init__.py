"""Embedded models, a rendered world and edit sets, so that everything runs without a download.

`model_path` gives a folder that AutoProcessor and AutoModelForImageTextToText load; `edit_set` gives edit requests with
their images in memory; `export` writes a set as MMEdit files. Importing this module imports neither torch nor
transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.pocket.names import MODELS, SETS

if TYPE_CHECKING:
    from fastedit.requests import EditRequest

__all__ = ["MODELS", "SETS", "available", "edit_set", "export", "model_card", "model_path", "write_set"]

_ASSETS = Path(__file__).parent / "assets"
CARD = "model_card.json"


def model_path(name: str) -> Path:
    """Return the folder of an embedded model: shipped, cached, or else trained now (10 to 20 minutes on one core).

    For "pocket-qwen2vl" the processor class that needs no torchvision is registered with AutoProcessor on the way.

    Raises:
        ValueError: unknown name.
    """
    _known("model_path", "name", name, MODELS)
    if name == "pocket-qwen2vl":
        from fastedit.pocket.qwen_processor import register

        register()
    found = _found(name)
    if found is not None:
        return found
    from fastedit.pocket.factory.release import build

    return build(name, _cache() / name)


def available() -> tuple[str, ...]:
    """Return the names of the models that are shipped or cached, so that `model_path` trains nothing."""
    return tuple(name for name in MODELS if _found(name) is not None)


def model_card(name: str) -> dict[str, Any]:
    """Return what is known of an embedded model: accuracies per kind of question, sizes, seed, how to reproduce it."""
    card: dict[str, Any] = json.loads((model_path(name) / CARD).read_text(encoding="utf-8"))
    return card


def edit_set(
    name: str, split: str = "eval", limit: int | None = None, model: str = "pocket-llava"
) -> list[EditRequest]:
    """Return an embedded edit set, the same on every machine; images are PIL images, rendered here.

    Args:
        name: "pocket-vqa" or "pocket-caption".
        split: "train" (2,000 records) or "eval" (1,000, 200 of them tagged "hard").
        limit: only the first so many.
        model: whose right answers the records are made of: this model answers every unedited question of every
            record rightly, and its answer to the edit prompt is the recorded prediction.
    Raises:
        ValueError: unknown name, split or model, or a negative limit.
    """
    _known("edit_set", "name", name, SETS)
    _known("edit_set", "split", split, ("train", "eval"))
    _known("edit_set", "model", model, MODELS)
    if limit is not None and limit < 0:
        raise ValueError(f"edit_set: limit must not be negative (got limit={limit})")
    from fastedit.pocket.requests import requests

    return requests(name, split, limit, model_path(model))


def export(name: str, split: str, folder: str | os.PathLike[str], *, limit: int | None = None) -> Path:
    """Write an edit set as an MMEdit JSON list with PNG images below `folder`/images; returns the JSON's path.

    The 11 fields are MMEdit's. Text-locality questions are written without the prefix "nq question: ", because they
    are not from NaturalQuestions. `portability`, `probes`, `tags` and `id` stand beside them.
    """
    return write_set(edit_set(name, split, limit), f"{name.replace('-', '_')}_{split}.json", folder)


def write_set(edits: Sequence[EditRequest], file: str, folder: str | os.PathLike[str]) -> Path:
    """Write requests as an MMEdit JSON list `file` in a folder, with PNG images below `images`; returns its path."""
    from fastedit.data.mmedit import write_mmedit

    root = Path(folder)
    (root / "images").mkdir(parents=True, exist_ok=True)
    path = root / file
    write_mmedit(list(edits), path, images=root / "images")
    return path


def _found(name: str) -> Path | None:
    folders = (_ASSETS / name, _cache() / name)
    return next((folder for folder in folders if (folder / CARD).is_file()), None)


def _cache() -> Path:
    home = os.environ.get("FASTEDIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastedit"
    return Path(home).expanduser() / "pocket"


def _known(where: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{where}: {argument} must be one of {', '.join(allowed)} (got {argument}={value!r})")
