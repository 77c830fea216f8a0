"""Many stored deltas as one stack, of which only those that act are read: memory is that of what a router looks at."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas.base import DeltaSpec, EditDelta, StackedDelta
from fastedit.deltas.rows import Rows, TokenSpans

#: Bytes of deltas that were read and are kept for the next rows that they act on.
KEPT_BYTES = 256 << 20


class MappedDeltas(Protocol):
    """A sequence of deltas in storage, unchanging: ``deltas[i]`` reads one and checks it, in any thread.

    It can be referred to weakly and hashed by identity; iterating it reads all in order.
    """

    @property
    def is_mapped(self) -> bool:
        """True."""

    @property
    def ids(self) -> Sequence[str]:
        """``EditDelta.id`` of each, known without reading them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EditDelta: ...

    def __iter__(self) -> Iterator[EditDelta]: ...


class MappedStack:
    """What the stack of all the deltas is to the bit, for application: parts are read when rows are routed to them.

    In memory are the ``fixed`` tensors and the texts of all, and of the parts those that were read last, at most
    ``kept_bytes`` of them and what acts in running calls. A stack of the same deltas and more is made from an earlier
    one, whose rows it shares: only the new ones are read.

    Args:
        deltas: of one spec, each acting alone where a router sends a row to it.
        empty: from a spec, size, dtype and device to the stack of its kind (``fastedit.deltas.kinds.new_stack``).
        device, dtype: of the stack; dtype None is that of the first delta.
        check: is called with the number of each delta that is read for the first time, and the delta.
        earlier: a stack of some of these deltas. kept_bytes: see above.
    Raises:
        ValueError: specs differ, a part is missing, or what ``check`` raises.
    """

    is_mapped = True
    trainable = False

    def __init__(
        self,
        deltas: Sequence[EditDelta],
        empty: Callable[..., Any],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        check: Callable[[int, EditDelta], None] | None = None,
        earlier: MappedStack | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.deltas = deltas
        first = deltas[0]
        self.spec: DeltaSpec = first.spec
        self.dtype = dtype or next((part.dtype for part in first.tensors.values()), torch.float32)
        self.device = torch.device(device)
        self._empty = empty
        #: Says what there is of a delta; acts itself where an edit has no part of its own.
        self.plain: Any = self._stack(0)
        self.row_roles: tuple[int, ...] = ()
        self.earlier: Sequence[StackedDelta] = ()
        self.flat = self.grad = torch.empty(len(deltas), 0, dtype=self.dtype, device=self.device)
        like = earlier is not None and (earlier.spec, earlier.dtype, earlier.device) == (
            self.spec, self.dtype, self.device,
        )  # fmt: skip
        known = earlier if like else None
        self._recent: _Recent = known._recent if known is not None else _Recent(kept_bytes)
        self.ids, self.texts, self._rows = self._gathered(check, known)
        #: By name, (B, ...): views of rows that stacks made from each other share.
        self.fixed: dict[str, Tensor] = self._rows.first(len(self.ids))
        self._model: EditableModel | None = None
        self._of_thread = threading.local()

    @property
    def size(self) -> int:
        """B."""
        return len(self.ids)

    @property
    def shared_rows(self) -> object:
        """Equal for stacks whose ``fixed`` are the first rows of the same tensors, which are written once."""
        return self._rows

    @property
    def key(self) -> str:
        """SHA-256 over the ids of all deltas."""
        return ids_key(self.ids)

    def part_names(self) -> list[str]:
        """Names of the parts."""
        names: list[str] = self.plain.part_names()
        return names

    def bind(self, model: EditableModel) -> None:
        """Take from the model what the kind needs of it."""
        self._model = model
        self.plain.bind(model)

    def reader(self, site: int) -> str | None:
        """See `StackedDelta`."""
        name: str | None = self.plain.reader(site)
        return name

    def extra_loss(self) -> Tensor | None:
        """None: nothing is fitted."""
        return None

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor) -> Tensor:
        """Change (tokens, d_out) of the output of site number ``site``; reads the deltas of the rows' edits."""
        if not self.plain.shapes:
            change: Tensor = self.plain.delta(site, x, rows, output)
            return change
        spans = rows if isinstance(rows, TokenSpans) and rows.edits is not None else self._alone(rows, x.shape[0])
        assert spans.edits is not None
        return self.acting(spans.edits).delta(site, x, spans, output)  # type: ignore[no-any-return]

    def acting(self, edits: tuple[int, ...]) -> Any:
        """The stack of some deltas, kept in this thread until it needs others: steps of an answer have the same."""
        kept = getattr(self._of_thread, "acting", None)
        if kept is not None and kept[0] == edits:
            return kept[1]
        self._of_thread.acting = None
        stacked = self._stack(len(edits))
        stacked.copy_from([self._read(edit) for edit in edits])
        if self._model is not None:
            stacked.bind(self._model)
        self._of_thread.acting = edits, stacked
        return stacked

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """The delta itself; names are those that it was stored under."""
        return self._read(index)

    def _stack(self, size: int) -> Any:
        return self._empty(self.spec, size, dtype=self.dtype, device=self.device, trainable=False)

    def _alone(self, rows: Rows | TokenSpans, tokens: int) -> TokenSpans:
        """Spans of the edits that have tokens."""
        offsets = rows.token_offsets(tokens, self.size)
        edits = tuple(edit for edit, (start, end) in enumerate(pairwise(offsets)) if end > start)
        bounds = [0, *(offsets[edit + 1] for edit in edits)]
        if isinstance(rows, TokenSpans):
            return TokenSpans(bounds, rows.live, rows.order, rows.layout, edits)
        return TokenSpans(bounds, edits=edits)

    def _read(self, number: int) -> EditDelta:
        """One delta, as it was when the stack was made.

        Raises:
            ValueError: another one is there now.
        """
        wanted = self.ids[number]
        delta = self._recent.get(wanted)
        if delta is None:
            delta = self.deltas[number]
            if delta.id != wanted:
                raise ValueError(
                    f"deltas: stored deltas stay as they were while they act (got another content of delta {number}, "
                    f"id={delta.request_id!r:.80})"
                )
            self._recent.put(wanted, delta)
        return delta

    def _gathered(
        self, check: Callable[[int, EditDelta], None] | None, earlier: MappedStack | None
    ) -> tuple[list[str], list[Mapping[str, str]], _Rows]:
        """Ids and texts of all deltas, and their fixed rows; what an earlier stack has is not read again."""
        said = getattr(self.deltas, "ids", None)
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in self.plain.fixed.items()}
        before: list[str] = [] if earlier is None or said is None else earlier.ids
        same = 0
        while same < min(len(before), len(said or ())) and (said or ())[same] == before[same]:
            same += 1
        moved: dict[str, int] = {} if same == len(before) else {each: n for n, each in enumerate(before)}
        if earlier is not None and said is not None and same == len(before):
            rows = earlier._rows.grown(same, len(said))
        else:
            rows = _Rows(shapes, len(self.deltas), self.dtype, self.device)
        moved_from: list[int] = []
        moved_to: list[int] = []
        ids, texts = before[:same], [] if earlier is None else earlier.texts[:same]
        for number, delta in self._remaining(same, said, moved):
            if isinstance(delta, int):
                assert earlier is not None
                moved_to.append(number)
                moved_from.append(delta)
                ids.append(before[delta])
                texts.append(earlier.texts[delta])
                continue
            if delta.spec != self.spec:
                raise ValueError(
                    f"stack: deltas share one spec (delta {number} has {delta.spec}, delta 0 has {self.spec})"
                )
            if check is not None:
                check(number, delta)
            rows.write(number, delta)
            ids.append(delta.id)
            texts.append(delta.texts)
        if earlier is not None and rows is not earlier._rows:
            rows.take(earlier._rows, [*range(same), *moved_from], [*range(same), *moved_to])
        return ids, texts, rows

    def _remaining(
        self, same: int, said: Sequence[str] | None, moved: Mapping[str, int]
    ) -> Iterator[tuple[int, EditDelta | int]]:
        """By number from ``same`` on a delta that is read, or the earlier number of one that is known."""
        if said is None or (not same and not moved):
            # In order, with one opening of each file
            yield from enumerate(self.deltas)
            return
        for number in range(same, len(self.deltas)):
            earlier = moved.get(said[number])
            yield number, self.deltas[number] if earlier is None else earlier


def ids_key(ids: Sequence[str]) -> str:
    """SHA-256 over ids, in order."""
    digest = hashlib.sha256()
    for each in ids:
        digest.update(each.encode() + b"|")
    return digest.hexdigest()


class _Rows:
    """Fixed tensors of deltas with room for more behind them; stacks that grew from each other hold views of one.

    Args:
        shapes: name -> shape of a row. count: rows that will be written. dtype, device: of the rows.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype, device: torch.device, room: int = 0
    ) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.tensors = {
            name: torch.zeros(count + room, *shape, dtype=dtype, device=device) for name, shape in shapes.items()
        }
        self.used, self.capacity = count, count + room
        self._lock = threading.Lock()

    def first(self, count: int) -> dict[str, Tensor]:
        """Views of the first rows."""
        return {name: tensor[:count] for name, tensor in self.tensors.items()}

    def grown(self, count: int, size: int) -> _Rows:
        """These with place for ``size`` rows, where no other stack has grown from them yet and there is room.

        Else empty ones, which the first ``count`` are to be copied to.
        """
        with self._lock:
            if self.used == count and size <= self.capacity:
                self.used = size
                return self
        # An eighth more than is needed, so that growing one by one copies each row a few times in all
        return _Rows(self.shapes, size, self.dtype, self.device, room=size // 8 + 8)

    def take(self, source: _Rows, numbers: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows of another one."""
        taken, written = (torch.tensor(each, dtype=torch.long, device=self.device) for each in (numbers, targets))
        for name, tensor in self.tensors.items():
            tensor[written] = source.tensors[name][taken]

    def write(self, number: int, delta: EditDelta) -> None:
        """Write the row of a delta.

        Raises:
            ValueError: it has another shape.
        """
        for name, shape in self.shapes.items():
            tensor = delta.tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"stack: every delta has part {name!r} of shape {shape} (got {got} in delta {number})")
            self.tensors[name][number].copy_(tensor)


class _Recent:
    """Deltas that were read last, by id, of at most so many bytes together; for any number of threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.n_bytes = most_bytes, 0
        self._deltas: OrderedDict[str, EditDelta] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> EditDelta | None:
        """The delta, now the most recent one."""
        with self._lock:
            delta = self._deltas.get(key)
            if delta is not None:
                self._deltas.move_to_end(key)
            return delta

    def put(self, key: str, delta: EditDelta) -> None:
        """Keep a delta; the least recent ones make room for it."""
        with self._lock:
            if key in self._deltas:
                return
            self._deltas[key] = delta
            self.n_bytes += _bytes_of(delta)
            while self.n_bytes > self.most_bytes and self._deltas:
                self.n_bytes -= _bytes_of(self._deltas.popitem(last=False)[1])


def _bytes_of(delta: EditDelta) -> int:
    return sum(part.numel() * part.element_size() for part in delta.tensors.values())
