"""The deltas of a sequence as one that acts, which takes up one edit after another without copying the earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.backbone import Site
from fastedit.deltas.base import DeltaSpec, EditDelta
from fastedit.deltas.company import grown
from fastedit.deltas.key_value import part_prefix, plain_neurons
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops.key_value import Activation

#: A chain of two thin products takes as long as one with the dense (d_out, d_in) matrix from about this share of the
#: rank on at which both have as many numbers, d_in d_out / (d_in + d_out): measured on a CPU with 4 to 128 tokens at
#: 128 x 352 and 512 x 1408, forward and gradient by the input.
CROSSING = 0.75
_LEAST_ROWS = 64

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True)
class Beneath:
    """What acts while an edit is made.

    Args:
        stacks: of deltas, each of one edit or of the sum of several, installed in this order.
        company: what identifies those deltas together (``fastedit.deltas.company``).
    """

    stacks: Sequence[Any] = ()
    company: tuple[str, ...] = ()


class GrowingSum:
    """Deltas that act always and add up, on a device: a stack of one that is never fitted, for ``installed``.

    Low-rank factors stand as rows of buffers that double when they are full, so n edits copy O(n) rows and not O(n^2).
    From ``CROSSING`` on they are summed into one dense matrix of their site, which takes up further ones in place; what
    acts then costs the same however long the sequence is. Neurons stand in such buffers too, and stay apart.

    Args:
        device: of the model.
    """

    size = 1

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.spec = DeltaSpec("full", ())
        #: Of those that act together, as ``company`` tells them.
        self.company: tuple[str, ...] = ()
        self.fixed: dict[str, Tensor] = {}
        self.texts: list[Mapping[str, str]] = [{}]
        self._sites: list[_LinearSum | _Neurons] = []

    def __len__(self) -> int:
        return int(self.company[0].partition(":")[0]) if self.company else 0

    def add(self, delta: EditDelta, delta_id: str | None = None) -> None:
        """Take up one more edit's delta; where that fails, memory running out, nothing has changed.

        Args:
            delta: of one edit, for which ``grows``. delta_id: of what it is a part of; its own if absent.
        Raises:
            ValueError: it has other sites, positions, activations or gates than those before it, or is of another kind.
        """
        spec = delta.spec
        acting = DeltaSpec(_family(spec), spec.sites, _kept_options(spec))
        if not self._sites:
            self.spec = acting
            make: type[_LinearSum | _Neurons] = _Neurons if _is_neurons(spec) else _LinearSum
            self._sites = [make(site, self.device) for site in spec.sites]
        if acting != self.spec:
            detail = f"delta {len(self)} has {spec}, not {self.spec}"
            raise ValueError(f"sequence: deltas that add up share kind, sites, positions and activation ({detail})")
        # All that takes memory comes first
        staged = [site.staged(delta) for site in self._sites]
        for site, values in zip(self._sites, staged, strict=True):
            site.add(values)
        self.company = grown(self.company, delta.id if delta_id is None else delta_id)

    def bind(self, _model: Any) -> None:
        """Nothing is needed of the model."""

    def reader(self, _site: int) -> str | None:
        """Neurons read what the feed-forward block reads; a linear change its site's own input."""
        return "up" if self.spec.kind == "key_value" else None

    def delta(self, site: int, x: Tensor, _rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change (tokens, d_out) of the output of site number ``site`` for x (tokens, d_in), differentiable in x."""
        return self._sites[site].change(x)

    @property
    def n_bytes(self) -> int:
        """Size of all buffers in bytes, room for later edits included."""
        return sum(site.n_bytes for site in self._sites)


def grows(delta: EditDelta) -> bool:
    """Whether a delta can be taken up by a ``GrowingSum``: it acts always, by linear maps or neurons alone."""
    spec = delta.spec
    return (
        _family(spec) in ("full", "key_value") and spec.options.get("router") is None and "template" not in delta.texts
    )


def sum_bytes(spec: DeltaSpec, edits: int, element: int) -> int:
    """Most bytes that a ``GrowingSum`` of so many deltas of a spec takes, in elements of so many bytes.

    Buffers are at most twice as large as what is in them, and there once more while they are copied.
    """
    total = 0
    for site in spec.sites:
        if spec.kind == "low_rank":
            dense, width = site.d_in * site.d_out, site.d_in + site.d_out
            rows = min(edits * int(spec.options["rank"]), _crossing(site))
            total += max(3 * max(rows, _LEAST_ROWS) * width, dense if rows == _crossing(site) else 0)
        elif spec.kind == "full":
            total += site.d_in * site.d_out
        elif _is_neurons(spec):
            maps = 2 if spec.options.get("gate", False) else 1
            rows = max(edits * int(spec.options.get("n", 0)), _LEAST_ROWS)
            total += 3 * rows * (maps * (site.d_out + 1) + site.d_out)
    return total * element


def _is_neurons(spec: DeltaSpec) -> bool:
    # Of an attention memory what is left without its entries
    return spec.kind in ("key_value", "attention_memory") and all(site.name == "down" for site in spec.sites)


def _family(spec: DeltaSpec) -> str:
    """The kind that deltas of a spec add up to."""
    if _is_neurons(spec):
        return "key_value"
    return "full" if spec.kind == "low_rank" else spec.kind


def _kept_options(spec: DeltaSpec) -> dict[str, Any]:
    """The options that say how and where a delta acts, however it was fitted."""
    options: dict[str, Any] = {"positions": spec.positions} if spec.positions != "all" else {}
    if _is_neurons(spec):
        options["activation"] = spec.options.get("activation", "relu")
        options["gate"] = bool(spec.options.get("gate", False))
    return options


def _crossing(site: Site) -> int:
    """The rank from which on factors are summed into a dense matrix."""
    return max(1, math.ceil(CROSSING * site.d_in * site.d_out / (site.d_in + site.d_out)))


class _GrowingRows:
    """Rows (count, width) at the front of a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self.count = 0
        self._buffer: Tensor | None = None

    def reserve(self, rows: Tensor) -> None:
        """Make room for these (k, width)."""
        needed = self.count + len(rows)
        if self._buffer is None or len(self._buffer) < needed:
            capacity = max(needed, _LEAST_ROWS, 0 if self._buffer is None else 2 * len(self._buffer))
            wider = rows.new_empty(capacity, *rows.shape[1:])
            if self._buffer is not None:
                wider[: self.count] = self._buffer[: self.count]
            self._buffer = wider

    def append(self, rows: Tensor) -> None:
        """Put rows behind the others, where room was made."""
        assert self._buffer is not None
        self._buffer[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    @property
    def live(self) -> Tensor:
        """(count, width), a view."""
        assert self._buffer is not None
        return self._buffer[: self.count]

    @property
    def n_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()


class _LinearSum:
    """The sum of linear changes of a site: rows of factors, or one dense matrix."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self.name, self.device = f"{site.layer}.{site.name}", device
        self.crossing = _crossing(site)
        self.down, self.up = _GrowingRows(), _GrowingRows()
        self.dense: Tensor | None = None

    def staged(self, delta: EditDelta) -> dict[str, Tensor]:
        """A delta's part of the site, on the device: "dense" (d_out, d_in), or "down" (r, d_in) and "up" (r, d_out)."""
        if delta.spec.kind == "full":
            matrix = delta.tensors[f"{self.name}:delta"].to(self.device)
            if self.dense is None:
                self.dense = self._summed(matrix.new_zeros(matrix.shape))
            return {"dense": matrix}
        down = delta.tensors[f"{self.name}:down"].to(self.device).T
        up = delta.tensors[f"{self.name}:up"].to(self.device) * float(delta.spec.options.get("scale", 1.0))
        if self.dense is None and self.down.count + len(down) >= self.crossing:
            self.dense = self._summed(down.new_zeros(up.shape[1], down.shape[1]))
        if self.dense is None:
            self.down.reserve(down)
            self.up.reserve(up)
        return {"down": down, "up": up}

    def _summed(self, dense: Tensor) -> Tensor:
        """The rows so far added to a matrix (d_out, d_in); they are not needed any more."""
        if self.down.count:
            dense.addmm_(self.up.live.T, self.down.live)
        self.down, self.up = _GrowingRows(), _GrowingRows()
        return dense

    def add(self, staged: Mapping[str, Tensor]) -> None:
        """Take up what was staged."""
        if self.dense is None:
            self.down.append(staged["down"])
            self.up.append(staged["up"])
        elif "dense" in staged:
            self.dense.add_(staged["dense"])
        else:
            self.dense.addmm_(staged["up"].T, staged["down"])

    def change(self, x: Tensor) -> Tensor:
        """x (T, d_in) through all of them: (T, d_out)."""
        if self.dense is not None:
            return x.to(self.dense.dtype) @ self.dense.T
        down = self.down.live
        return x.to(down.dtype) @ down.T @ self.up.live

    @property
    def n_bytes(self) -> int:
        dense = 0 if self.dense is None else self.dense.numel() * self.dense.element_size()
        return dense + self.down.n_bytes + self.up.n_bytes


class _Neurons:
    """Neurons of all edits at a site, a row each."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self.site, self.prefix, self.device = site, part_prefix(site), device
        self.parts: dict[str, _GrowingRows] = {}
        self.activation: Activation = "relu"

    def staged(self, delta: EditDelta) -> dict[str, Tensor]:
        """Its neurons on the device, a row each, without those parts of the names that say where."""
        self.activation = delta.spec.options.get("activation", "relu")
        plain = plain_neurons(delta, (self.site,))
        staged = {}
        for name, tensor in plain.items():
            part = name.removeprefix(self.prefix)
            rows = tensor.to(self.device)
            staged[part] = rows.T if part.endswith("keys") else rows
            self.parts.setdefault(part, _GrowingRows()).reserve(staged[part])
        return staged

    def add(self, staged: Mapping[str, Tensor]) -> None:
        """Take up what was staged."""
        for part, rows in staged.items():
            self.parts[part].append(rows)

    def change(self, x: Tensor) -> Tensor:
        """What all neurons add for x (T, d): (T, d)."""
        live = {part: rows.live for part, rows in self.parts.items()}
        x = x.to(live["keys"].dtype)
        entering = torch.addmm(live["bias"], x, live["keys"].T)
        act = _ACTIVATIONS[self.activation]
        if "gate_keys" in live:
            return (act(torch.addmm(live["gate_bias"], x, live["gate_keys"].T)) * entering) @ live["values"]
        return act(entering) @ live["values"]

    @property
    def n_bytes(self) -> int:
        return sum(rows.n_bytes for rows in self.parts.values())
