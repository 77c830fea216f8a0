"""Low-rank changes of a few layers that every edit chooses for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.options import LocalizedOptions, options_of
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import low_rank

#: Options of the spec that are widths of fixed tensors: what a router keeps of an edit.
MEMORY = ("entity", "relation", "image")


class LocalizedDelta(FlatStack):
    """k pairs of thin matrices per edit, each standing beside one of the sites: ``y += scale · (x @ down) @ up``.

    The sites are those that an edit may choose from. Which it chose is a fixed tensor, so edits with different layers
    share a stack, and an edit holds k pairs however many sites there are. Elsewhere it changes nothing, to the bit, and
    gets no gradient. ``down`` starts random and ``up`` at zero (LoRA, arXiv 2106.09685), from the same ``down`` for
    every edit; an edit that has chosen nothing changes nothing.

    Options of the spec: ``slots`` (k), ``rank``, ``scale``, ``seed``; widths of what a router keeps, by ``MEMORY``.
    Parts: ``down`` (B, k, d_in, r) and ``up`` (B, k, r, d_out).
    Fixed: ``layers`` (B, k), the number of a pair's site in the spec, from 1; 0 is none. And those of ``MEMORY``.

    Raises:
        ValueError: sites of different shapes, or no slots.
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        options: LocalizedOptions = options_of(spec, LocalizedOptions)
        slots, rank = options.slots, options.rank
        widths = {(site.d_in, site.d_out) for site in spec.sites}
        if len(widths) > 1:
            raise ValueError(f"localized: sites to choose from have one shape (got {sorted(widths)})")
        if not 1 <= slots <= len(spec.sites):
            raise ValueError(f"localized: slots is 1 to {len(spec.sites)}, the number of sites (got slots={slots})")
        ((d_in, self.d_out),) = widths
        fixed: dict[str, tuple[int, ...]] = {"layers": (slots,)}
        fixed |= {name: (width,) for name in MEMORY if (width := getattr(options, name)) is not None}
        super().__init__(
            spec,
            {"down": (slots, d_in, rank), "up": (slots, rank, self.d_out)},
            size,
            dtype=dtype,
            device=device,
            trainable=trainable,
            fixed=fixed,
        )
        self.scale = options.scale
        generator = torch.Generator().manual_seed(options.seed)
        # Uniform with variance 1 / (3 d_in), the usual initial state of LoRA's first factor
        drawn = (slots, d_in, rank) if size else (0,)
        draw = torch.rand(drawn, generator=generator, dtype=torch.float64) * 2 - 1
        self._drawn = (draw / math.sqrt(d_in)).to(self.flat)
        if size:
            self.parts["down"].copy_(self._drawn)
        self._chosen: list[list[tuple[int, int]]] | None = None
        #: Counts the times at which that was forgotten.
        self._version = 0

    def initial(self, name: str) -> Tensor | float:
        """The drawn first factors; zero for the second ones."""
        return self._drawn if name == "down" else 0.0

    def set(self, edit: int, values: Mapping[str, Tensor]) -> None:
        """Write parts or fixed tensors of one edit."""
        super().set(edit, values)
        self._forget()

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which has chosen nothing."""
        super().restart(edits)
        self._forget()

    def copy_from(self, deltas: Sequence[EditDelta]) -> None:
        """Fill row b from ``deltas[b]``."""
        super().copy_from(deltas)
        self._forget()

    def _forget(self) -> None:
        self._chosen = None
        self._version += 1

    def chosen(self, site: int) -> list[tuple[int, int]]:
        """(edit, slot) of the pairs that stand beside a site, edits rising.

        Raises:
            ValueError: an edit chose a site twice, or one that there is not.
        """
        if self._chosen is None:
            made: list[list[tuple[int, int]]] = [[] for _ in self.spec.sites]
            for edit, numbers in enumerate(self.fixed["layers"].tolist()):
                taken = [int(number) for number in numbers if number]
                if len(set(taken)) < len(taken) or any(not 1 <= number <= len(made) for number in taken):
                    raise ValueError(
                        f"localized: layers are numbers of different sites, 1 to {len(made)} (got layers={taken} "
                        f"of edit {edit})"
                    )
                for slot, number in enumerate(numbers):
                    if number:
                        made[int(number) - 1].append((edit, slot))
            self._chosen = made
        return self._chosen[site]

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change of site number ``site``'s output for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        # Half-precision tokens are taken as they are; sums and factors are float32 all the same
        narrow = x.dtype in (torch.bfloat16, torch.float16) and self.flat.dtype == torch.float32
        x = x if narrow else x.to(self.flat.dtype)
        found = self._acting(site, rows, x)
        if found is None:
            return x.new_zeros(x.shape[0], self.d_out)
        down, up = (self._pairs(name, found.edits, found.slots) for name in ("down", "up"))
        if found.tokens is None:
            return low_rank(x, down, up * self.scale, found.offsets)
        changed = low_rank(x.index_select(0, found.tokens), down, up * self.scale, found.offsets)
        return x.new_zeros(x.shape[0], self.d_out).index_copy(0, found.tokens, changed)

    def _acting(self, site: int, rows: Rows | TokenSpans, x: Tensor) -> _Acting | None:
        """The pairs that stand beside a site and have tokens, worked out once per batch; None without any."""
        memory = rows.memory if isinstance(rows, TokenSpans) else {}
        key = ("localized", self, self._version, site, x.device)
        if key not in memory:
            offsets = rows.token_offsets(x.shape[0], self.size)
            busy = [(edit, slot) for edit, slot in self.chosen(site) if offsets[edit + 1] > offsets[edit]]
            memory[key] = _acting(busy, offsets, x.device) if busy else None
        found: _Acting | None = memory[key]
        return found

    def _pairs(self, name: str, edits: Tensor, slots: Tensor) -> Tensor:
        """Factors (n, ...) of n (edit, slot); their gradient lands in ``part_grads[name]``."""
        if not (self.trainable and torch.is_grad_enabled()):
            return self.parts[name][edits, slots]
        taken: Tensor = _Taken.apply(self.anchor, self, name, edits, slots)  # type: ignore[no-untyped-call]
        return taken


@dataclass(frozen=True)
class _Acting:
    """n pairs beside one site.

    Args:
        edits, slots: (n,) int64, whose they are and which of an edit's.
        offsets: (n + 1,) int64, of their tokens. tokens: (T,) int64, which those are; None is all of a batch.
    """

    edits: Tensor
    slots: Tensor
    offsets: Tensor
    tokens: Tensor | None


def _acting(busy: Sequence[tuple[int, int]], offsets: Sequence[int], device: torch.device) -> _Acting:
    """Of (edit, slot) with tokens, edits rising."""
    edits, slots = (torch.tensor(part, device=device) for part in zip(*busy, strict=True))
    sizes = [offsets[edit + 1] - offsets[edit] for edit, _ in busy]
    tokens = [token for edit, _ in busy for token in range(offsets[edit], offsets[edit + 1])]
    chosen = None if len(tokens) == offsets[-1] else torch.tensor(tokens, device=device)
    return _Acting(edits, slots, torch.tensor([0, *accumulate(sizes)], device=device), chosen)


class _Taken(torch.autograd.Function):
    """Some pairs of a part; writes their gradient where it belongs and leaves that of the others alone."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, stack: LocalizedDelta, name: str, edits: Tensor, slots: Tensor) -> Tensor:
        ctx.stack, ctx.name = stack, name
        ctx.save_for_backward(edits, slots)
        return stack.parts[name][edits, slots]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        edits, slots = ctx.saved_tensors
        found = ctx.stack.part_grads[ctx.name]
        if ctx.stack.first_gradient(ctx.name):
            found.zero_()
        # A pair stands beside one site, which is walked once
        found[edits, slots] += grad
        return None, None, None, None, None
