"""Where a run writes: tried before any work, and nobody else's until it is done."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastedit.backbone import EditableModel
from fastedit.deltas.kinds import new_stack
from fastedit.files import claim_file, claim_folder
from fastedit.methods import EditPlan

#: Files that say that a folder holds what came of a run.
RESULTS = ("scores.json", "comparison.json", "deltas.safetensors", "deltas-000000.safetensors")
# Of an edit, beside its tensors: its entry in the header of a file (and one for each part); its scores and answers
_ENTRY, _PART, _SCORES = 1_000, 120, 12_000


@contextmanager
def claim_output(
    folder: str | Path, *, overwrite: bool = False, expected_bytes: int | None = None, field: str = "output"
) -> Iterator[Path]:
    """Inside the block the folder is there and can be written to, and no other process claims it.

    It goes if it was made and stays empty.

    Args:
        folder: to write to. Nothing of an earlier run in it is changed here.
        overwrite: also where it holds what came of an earlier run.
        expected_bytes: that will be written; None is not known.
        field: what the folder is called where it is refused.
    Yields:
        The folder.
    Raises:
        ValueError: it is a file or lies in one, it cannot be written to, another process has claimed it, it holds an
            earlier run, or the disk has no room; says which.
    """
    with claim_folder(folder, field) as path:
        if not overwrite:
            _require_new(path, field)
        require_room(path, expected_bytes, field)
        yield path


@contextmanager
def claim_result(file: str | Path, *, expected_bytes: int | None = None, field: str = "output") -> Iterator[Path]:
    """The same for a file, which may be there: it will be replaced as a whole.

    Raises:
        ValueError: as ``claim_output``.
    """
    with claim_file(file, field) as path:
        require_room(path.parent, expected_bytes, field)
        yield path


def expected_output_bytes(model: EditableModel, plan: EditPlan, n_edits: int, *, evaluate: bool = True) -> int:
    """Bytes that a run writes: deltas, a page and, where it is scored, scores. An estimate, for a disk's room.

    Args:
        model: loaded. plan: of the method. n_edits: how many. evaluate: whether they are scored.
    """
    from fastedit.report import expected_page_bytes

    spec = plan.method.spec(model, plan.config)
    element = 8 if model.dtype == torch.float64 else 4
    shapes = new_stack(spec, 0, trainable=False).stored_shapes().values()
    scalars: int = sum(math.prod(shape) for shape in shapes)
    page = expected_page_bytes(n_edits if evaluate else 0)
    return page + n_edits * (scalars * element + _ENTRY + _PART * len(shapes) + (_SCORES if evaluate else 0))


def require_room(folder: Path, expected_bytes: int | None, field: str) -> None:
    """Refuse a disk that has less room than will be written.

    Raises:
        ValueError: names both.
    """
    if expected_bytes is None:
        return
    free = shutil.disk_usage(folder).free
    if expected_bytes > free:
        detail = f"{expected_bytes / 2**20:,.1f} MiB for {free / 2**20:,.1f} MiB in folder={str(folder)!r}"
        raise ValueError(f"{field}: the disk has room for what will be written (got {detail})")


def _require_new(folder: Path, field: str) -> None:
    found = next((name for name in RESULTS if (folder / name).exists()), None)
    if found is None and any((folder / "deltas").glob("deltas-??????.safetensors")):
        found = "deltas"
    if found is not None:
        raise ValueError(
            f"{field}: the folder holds no earlier run, or overwriting it is asked for with overwrite=True, on the "
            f"command line with --overwrite (got {found} in folder={str(folder)!r})"
        )
