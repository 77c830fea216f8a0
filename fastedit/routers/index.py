"""An index of stored vectors (hnswlib) that names the edits which may claim a prompt: fast, and not always all of them.

What it names is scored as ever, so that an edit never acts that exact search would not let act; one that it does not
name is missed. Vectors are known by their content, not by their place: what is stored several times is there once, an
edit that was taken back maps to nothing and never acts, and every version of the stored edits asks the same index.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Of hnswlib: links of a vector, how widely its place is looked for, and how widely an answer is.
LINKS, BUILD, SEARCH = 16, 100, 128
#: Vectors that are named for a prompt; most that are looked at where many of the index are of edits taken back.
NAMED, MOST_NAMED = 32, 256
#: Of the vectors in the index so many must be stored now; else it is made anew of those.
LEAST_SHARE = 0.5
#: Versions of stored edits whose labels are kept, and vectors that are looked at together.
VERSIONS, AT_ONCE = 4, 1 << 13

Labels = NDArray[np.int64]
_NONE: Labels = np.zeros(0, np.int64)


def hnswlib_module() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import hnswlib
    except ImportError as error:
        raise ImportError(
            "index: model.index_from needs hnswlib: pip install 'fastedit-mllm[index]' (got no module 'hnswlib')"
        ) from error
    return hnswlib


class VectorIndex:
    """Vectors by content, and those of them that lie nearest to a prompt's.

    Args:
        width: of the vectors. space: "ip" (largest inner product) or "l2" (smallest distance).
    """

    def __init__(self, width: int, space: str) -> None:
        self._module = hnswlib_module()
        self.width, self.space = width, space
        self._stored: WeakKeyDictionary[Any, dict[tuple[Hashable, int], _Stored]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._clear()

    def __len__(self) -> int:
        return len(self._labels)

    def _clear(self) -> None:
        self._labels: dict[bytes, int] = {}
        self._index = self._module.Index(space=self.space, dim=self.width)
        self._index.init_index(max_elements=1024, M=LINKS, ef_construction=BUILD, random_seed=0)
        self._stored.clear()

    def pairs(
        self, asked: Tensor, owner: Any, version: Hashable, count: int, vectors: Callable[[slice], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Pairs (row, edit) of prompts and stored edits whose vectors are near, sorted.

        Args:
            asked: (R, d). owner: of the stored vectors. version: of them; None where they are written once, and more
                come behind them.
            count: of edits that are stored now. vectors: gives those of some of them, (n, d).
        """
        with self._lock:
            stored = self._looked_up(owner, version, count, vectors)
            if len(stored.labels) < LEAST_SHARE * len(self):
                self._clear()
                stored = self._looked_up(owner, version, count, vectors)
            named = min(len(self), MOST_NAMED, -(-NAMED * len(self) // max(1, len(stored.labels))))
            if not named or not len(asked):
                nothing = torch.zeros(0, dtype=torch.long, device=asked.device)
                return nothing, nothing
            self._index.set_ef(max(SEARCH, named))
            threads = torch.get_num_threads()
            found, _ = self._index.knn_query(asked.float().cpu().numpy(), k=named, num_threads=threads)
        row, edit = stored.edits_of(found.astype(np.int64))
        return torch.from_numpy(row).to(asked.device), torch.from_numpy(edit).to(asked.device)

    def _looked_up(self, owner: Any, version: Hashable, count: int, vectors: Callable[[slice], Tensor]) -> _Stored:
        kept = self._stored.get(owner, {})
        found = kept.get((version, count))
        if found is None:
            known = [each for (other, _), each in kept.items() if other is None and version is None]
            longest = max(known, key=lambda each: len(each.of_edit), default=None)
            before = _NONE if longest is None else longest.of_edit[:count]
            labels = np.concatenate([before, self._labelled(len(before), count, vectors)])
            recent = dict(list(kept.items())[1 - VERSIONS :])
            found = _Stored(labels)
            self._stored[owner] = {**recent, (version, count): found}
        return found

    def _labelled(self, start: int, stop: int, vectors: Callable[[slice], Tensor]) -> Labels:
        """Labels of some stored vectors; those that are not known yet are taken in."""
        made = np.empty(stop - start, np.int64)
        for begin in range(start, stop, AT_ONCE):
            rows = np.ascontiguousarray(vectors(slice(begin, min(begin + AT_ONCE, stop))).float().cpu().numpy())
            new = []
            for number, row in enumerate(rows):
                content = hashlib.blake2b(row.data, digest_size=16).digest()
                label = self._labels.get(content)
                if label is None:
                    label = self._labels[content] = len(self._labels)
                    new.append(number)
                made[begin - start + number] = label
            if new:
                if len(self) > self._index.get_max_elements():
                    self._index.resize_index(len(self) + len(self) // 4)
                own = made[begin - start : begin - start + len(rows)]
                self._index.add_items(rows[new], own[new], num_threads=torch.get_num_threads())
        return made


class _Stored:
    """Labels of stored edits, and back.

    Args:
        of_edit: (B,) the label of each.
    """

    def __init__(self, of_edit: Labels) -> None:
        self.of_edit = of_edit
        self.labels, self._counts = np.unique(of_edit, return_counts=True)
        self._order = np.argsort(of_edit, kind="stable")
        self._start = np.cumsum(self._counts) - self._counts

    def edits_of(self, found: Labels) -> tuple[Labels, Labels]:
        """Pairs (row, edit), sorted, of labels (R, k): all edits that have one, of those that are stored."""
        place = np.searchsorted(self.labels, found).clip(max=len(self.labels) - 1)
        row, column = (self.labels[place] == found).nonzero()
        place = place[row, column]
        repeats = self._counts[place]
        offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        edit, row = self._order[np.repeat(self._start[place], repeats) + offset], np.repeat(row, repeats)
        by_row = np.lexsort((edit, row))
        return row[by_row], edit[by_row]
