"""What a step hands to torch: how many ops, which of them would make the host wait for a GPU, what is sent there.

It is told without a GPU: every tensor is taken for one of the device. An op counts as a wait where its result, or the
size of its result, is known to the host only once the device has computed it; as an upload where host values become a
tensor, which a GPU gets through memory that is not pinned: that waits as well.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Ops whose result the host reads, or whose result has a size that only the values tell.
_WAITS = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
        "bincount",
        "equal",
        "is_nonzero",
        "unique_dim",
    }
    | {"_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive", "argwhere"}
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
#: Functions that hand the values of a tensor to the host, and dispatch nothing that tells so; of others an op does.
_READS = frozenset({"tolist", "cpu", "numpy"})
#: Functions that make a tensor of host values.
_MAKES = frozenset({"tensor", "as_tensor", "from_numpy", "frombuffer"})
#: Metadata and views, which launch nothing.
_FREE = frozenset(
    {"view", "_unsafe_view", "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute", "detach"}
    | {"alias", "as_strided", "split", "split_with_sizes", "unbind", "narrow", "_reshape_alias", "unfold", "diagonal"}
    | {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "is_same_size", "lift_fresh"}
)


@dataclass(frozen=True)
class _Call:
    """An op with the shapes of its tensors, and the addresses of those that its part did not make."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    outside: tuple[int, ...]
    where: str


class Dispatches:
    """Counts what is handed to torch inside its block, by part.

    ``part`` names what runs now; set it as often as wanted. The backward pass is counted where it runs in the calling
    thread, as it does on the CPU.

    Attributes:
        ops: by part, how many ops launch something, by name.
        waits, uploads: by part, (op or function, where) of each.
    """

    def __init__(self) -> None:
        self.part: object = ""
        self.ops: dict[object, Counter[str]] = {}
        self.waits: dict[object, list[tuple[str, str]]] = {}
        self.uploads: dict[object, list[tuple[str, str]]] = {}
        self._calls: dict[object, list[_Call]] = {}
        self._made: dict[object, set[int]] = {}
        self._entered = ExitStack()

    def __enter__(self) -> Dispatches:
        self._entered.enter_context(_Functions(self))
        self._entered.enter_context(_Ops(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def count(self, part: object) -> int:
        """Ops of a part that launch something."""
        return sum(self.ops.get(part, Counter()).values())

    def differences(self, part: object, other: object) -> list[str]:
        """Why a recording of one part could not be replayed as the other: nothing, where it could.

        A CUDA graph replays the same ops on the same shapes, and reads what it did not make itself at the addresses
        where that was when it was recorded.
        """
        one, two = self._calls.get(part, []), self._calls.get(other, [])
        found = [] if len(one) == len(two) else [f"{len(one)} ops, {len(two)} ops"]
        for first, second in zip(one, two, strict=False):
            if (first.name, first.shapes) != (second.name, second.shapes):
                return [*found, f"{first.name} {first.shapes}, {second.name} {second.shapes} at {second.where}"]
            if first.outside != second.outside:
                found.append(f"{first.name} reads what lies elsewhere at {second.where}")
        return found

    def _before(self, func: Any, args: Any) -> list[int]:
        """Addresses of what an op reads that was not made in this part; the call is kept."""
        made = self._made.setdefault(self.part, set())
        tensors = [arg for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        outside = [_address(tensor) for tensor in tensors if tensor.numel() and _address(tensor) not in made]
        name, shapes = func._schema.name.partition("::")[2], tuple(tuple(tensor.shape) for tensor in tensors)
        where = _where() if outside else ""
        self._calls.setdefault(self.part, []).append(_Call(name, shapes, tuple(outside), where))
        return outside

    def _after(self, outside: list[int], out: Any) -> None:
        made = {_address(tensor) for tensor in tree_leaves(out) if isinstance(tensor, Tensor)}
        self._made[self.part] |= made - set(outside)

    def _note(self, into: dict[object, list[tuple[str, str]]], name: str) -> None:
        into.setdefault(self.part, []).append((name, _where()))

    def _op(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _WAITS or (name in _INDEXING and _by_mask(args)) or _repeats_by_counts(func, name, kwargs):
            self._note(self.waits, name)
        if name not in _FREE:
            self.ops.setdefault(self.part, Counter())[name] += 1


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, dispatches: Dispatches) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dispatches = dispatches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._dispatches._op(func, args, kwargs or {})
        outside = self._dispatches._before(func, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._dispatches._after(outside, out)
        return out


class _Functions(TorchFunctionMode):
    def __init__(self, dispatches: Dispatches) -> None:
        super().__init__()
        self._dispatches = dispatches

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        dispatches = self._dispatches
        if name in _READS:
            dispatches._note(dispatches.waits, name)
        if name in _MAKES and not isinstance(args[0], Tensor):
            dispatches._note(dispatches.uploads, name)
        if name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            dispatches._note(dispatches.uploads, name)
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _by_mask(args: tuple[Any, ...]) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _repeats_by_counts(func: Any, name: str, kwargs: Mapping[str, Any]) -> bool:
    if name != "repeat_interleave" or "Tensor" not in func._schema.overload_name:
        return False
    return kwargs.get("output_size") is None


def _has_list(index: Any) -> bool:
    parts: Iterable[Any] = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) for part in parts)


def _where() -> str:
    """The innermost line of the package, or of a test, that is at work."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.name != Path(__file__).name and ("fastedit" in path.parts or "tests" in path.parts):
            return f"{path.parent.name}/{path.name}:{frame.lineno} {frame.line}"
    return "elsewhere"
