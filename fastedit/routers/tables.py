"""What routers keep of stored vectors to search them faster, for as long as these are there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.routers.index import VectorIndex
from fastedit.routers.reduced import Reduced, short_dtype


class Tables:
    """Reduced vectors by the stacks that they are of; stacks that grew from each other share them.

    A stack that shares its rows with others says so (``shared_rows``): rows that two of them have are equal. Of others
    nothing holds beyond the tensor as it is now.
    """

    def __init__(self) -> None:
        self._indexes: dict[Hashable, VectorIndex] = {}
        self._of: WeakKeyDictionary[Any, dict[Hashable, Reduced | None]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def reduced(
        self, stacked: Any, name: str, stored: Tensor, *, centred: bool = False, exact: bool = False
    ) -> Reduced | None:
        """Reduced vectors for a first pass; None where the whole ones are as fast.

        Args:
            stacked: whose vectors they are. name: of the vectors there. stored: (B, d).
            centred: see ``Reduced``. exact: in the dtype of the stored ones.
        """
        if not Reduced.pays(stored):
            return None
        dtype = None if exact or stored.dtype != torch.float32 else short_dtype(stored.device)
        made = self._kept(stacked, name, stored, lambda: Reduced(stored, centred=centred, dtype=dtype))
        return made if made.is_close else None

    def pairs(
        self, key: Hashable, space: str, stacked: Any, asked: Tensor, parts: Sequence[tuple[Tensor, float]]
    ) -> tuple[Tensor, Tensor]:
        """Pairs (row, edit) that an index names, see ``VectorIndex.pairs``; one index for all versions.

        Args:
            key: of the index. stacked: whose vectors are stored. asked: (R, d), d of all parts together.
            parts: stored vectors (B, n) and what each is multiplied by, side by side.

        Raises:
            ImportError: hnswlib is not installed.
        """
        shared = getattr(stacked, "shared_rows", None)
        version = None if shared is not None else tuple((each.data_ptr(), each._version) for each, _ in parts)
        with self._lock:
            index = self._indexes.get(key)
            if index is None:
                index = self._indexes[key] = VectorIndex(asked.shape[1], space)
        return index.pairs(
            asked, stacked if shared is None else shared, version, len(parts[0][0]),
            lambda where: torch.cat([each[where] * factor for each, factor in parts], 1),
        )  # fmt: skip

    def _kept(self, stacked: Any, name: str, stored: Tensor, make: Callable[[], Reduced]) -> Reduced:
        shared = getattr(stacked, "shared_rows", None)
        key: Hashable = name if shared is not None else (name, stored.data_ptr(), len(stored), stored._version)
        with self._lock:
            kept = self._of.setdefault(stacked if shared is None else shared, {})
            found = kept.get(key)
            if found is None:
                if shared is None:
                    kept.clear()
                found = kept[key] = make()
            return found


def tables_of(model: EditableModel) -> Tables:
    """Those of a model."""
    if model.tables is None:
        model.tables = Tables()
    tables: Tables = model.tables
    return tables


def has_index(model: EditableModel, stored: int) -> bool:
    """Whether an index names candidates among so many stored edits (``EditableModel.index_from``)."""
    return model.index_from is not None and stored >= model.index_from
