"""What every kind of delta has in common: flat per-edit rows, named parts, and the map from batch rows to edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import workspace


@dataclass(frozen=True)
class DeltaSpec:
    """The shape of a delta: its kind, where it sits, and the kind's own settings.

    Args:
        kind: "full" or "low_rank".
        sites: the linear modules that the delta stands beside.
        options: the kind's settings (rank, scale, seed ...), plain values only: they are saved with the delta.
            ``positions`` says on which tokens any kind acts: "all", or "after_image": behind the last image token of
            a row that has an image.
    """

    kind: str
    sites: tuple[Site, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> str:
        """ "all" or "after_image"."""
        return str(self.options.get("positions", "all"))


@dataclass(frozen=True)
class EditDelta:
    """One edit's fitted change, a value: nothing in it refers to a model.

    Args:
        spec: kind and sites.
        tensors: part name -> tensor, e.g. ``"11.down:delta"``; the order is the order of the flat row.
        model_fingerprint: of the base model it was fitted on ("" when unknown).
        request_id: of the edit.
    """

    spec: DeltaSpec
    tensors: Mapping[str, Tensor]
    model_fingerprint: str = ""
    request_id: str = ""

    @property
    def n_parameters(self) -> int:
        """Number of scalars."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def norm(self) -> float:
        """Euclidean norm over all scalars (of the parameters, not of the change in weights)."""
        return float(torch.sqrt(sum((t.double().square().sum() for t in self.tensors.values()), torch.zeros(()))))


class StackedDelta(Protocol):
    """Deltas of B edits with the same spec, fitted together; nothing is ever reduced across B.

    ``flat`` (B, P) holds every parameter and ``grad`` (B, P) their gradient: one row per edit, so an optimiser sees two
    matrices and no list of tensors.
    """

    spec: DeltaSpec
    flat: Tensor
    grad: Tensor

    @property
    def size(self) -> int:
        """B."""

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans) -> Tensor:
        """Change of the output of site number ``site`` for input x (tokens, d_in), as (tokens, d_out)."""

    def parameters_as_input(self) -> Tensor:
        """``flat`` as a differentiable input, for objectives that are functions of the parameters themselves."""

    def part_names(self) -> list[str]:
        """Names of the parts in the order of the flat row."""

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which changes nothing."""

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """Edit number ``index`` as a value of its own."""

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""

    def end_step(self) -> None:
        """After the backward pass: ``grad`` is complete from here on."""


class FlatStack:
    """Storage shared by the kinds: one flat row per edit, its parts as views, gradients written where they belong.

    Autograd's own accumulation would allocate each part's gradient, add it to a zeroed buffer and complain about
    strides; here the backward pass writes straight into ``grad``: the first gradient of a part in a step is stored,
    later ones are added, and parts that get none are zeroed by ``end_step``.

    Args:
        spec: kind and sites.
        shapes: part name -> shape without the leading B.
        size: B.
        dtype, device: of the rows.
        trainable: also allocate gradients.
    """

    def __init__(
        self,
        spec: DeltaSpec,
        shapes: Mapping[str, tuple[int, ...]],
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        trainable: bool,
    ) -> None:
        self.spec = spec
        self.shapes = dict(shapes)
        self.trainable = trainable
        width = sum(math.prod(shape) for shape in shapes.values())
        like = torch.empty(0, dtype=dtype, device=device)
        self.flat = workspace(like, (size, width)).zero_()
        self.grad = workspace(like, (size, width if trainable else 0)).zero_()
        # Autograd needs one input that requires a gradient; it never receives one.
        self.anchor = torch.zeros((), dtype=dtype, device=device, requires_grad=trainable)
        self.parts: dict[str, Tensor] = {}
        self.part_grads: dict[str, Tensor] = {}
        self._fresh = dict.fromkeys(self.shapes, True)
        self._pending: list[Tensor] = []
        start = 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            self.parts[name] = self.flat[:, start:end].view(size, *shape)
            if trainable:
                self.part_grads[name] = self.grad[:, start:end].view(size, *shape)
            start = end

    @property
    def size(self) -> int:
        """B."""
        return int(self.flat.shape[0])

    def part_names(self) -> list[str]:
        """Names of the parts in the order of the flat row."""
        return list(self.shapes)

    def initial(self, _name: str) -> Tensor | float:
        """The value of a part in a fresh delta, without the leading B."""
        return 0.0

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which changes nothing."""
        for name, part in self.parts.items():
            value = self.initial(name)
            for edit in edits:
                _ = part[edit].copy_(value) if isinstance(value, Tensor) else part[edit].fill_(value)

    def differentiable(self, name: str) -> Tensor:
        """Part ``name`` (B, ...) as an input of the graph; its gradient lands in ``part_grads[name]``."""
        if not (self.trainable and torch.is_grad_enabled()):
            return self.parts[name]
        gated: Tensor = _Gate.apply(self.anchor, self.parts[name], self, name)  # type: ignore[no-untyped-call]
        return gated

    def parameters_as_input(self) -> Tensor:
        """``flat`` (B, P) as an input of the graph; its gradient is added by ``end_step``."""
        gated: Tensor = _Gate.apply(self.anchor, self.flat, self, "")  # type: ignore[no-untyped-call]
        return gated

    def first_gradient(self, name: str) -> bool:
        """Whether part ``name`` has no gradient in this step yet; the caller must store one if so."""
        first, self._fresh[name] = self._fresh[name], False
        return first

    def receive(self, name: str, grad: Tensor) -> None:
        """Store or add a part's gradient; "" is the whole row."""
        if not name:
            self._pending.append(grad)
        elif self.first_gradient(name):
            self.part_grads[name].copy_(grad)
        else:
            self.part_grads[name].add_(grad)

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self._fresh = dict.fromkeys(self.shapes, True)
        self._pending = []

    def end_step(self) -> None:
        """After the backward pass: zero what got no gradient, add what was for whole rows."""
        for name, fresh in self._fresh.items():
            if fresh:
                self.part_grads[name].zero_()
        for grad in self._pending:
            self.grad.add_(grad)
        self._pending = []

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """Edit number ``index`` as a value of its own (copied to host memory)."""
        tensors = {name: part[index].detach().to("cpu", copy=True).contiguous() for name, part in self.parts.items()}
        return EditDelta(self.spec, tensors, model_fingerprint, request_id)

    def copy_from(self, deltas: Sequence[EditDelta]) -> None:
        """Fill row b from ``deltas[b]``.

        Raises:
            ValueError: a delta has other parts or shapes than this stack.
        """
        for row, delta in enumerate(deltas):
            for name, shape in self.shapes.items():
                tensor = delta.tensors.get(name)
                if tensor is None or tuple(tensor.shape) != shape:
                    got = None if tensor is None else tuple(tensor.shape)
                    raise ValueError(
                        f"stack: every delta has part {name!r} of shape {shape} (got {got} in delta {row})"
                    )
                self.parts[name][row].copy_(tensor)


class _Gate(torch.autograd.Function):
    """The identity on a part's values; hands the part's gradient to its stack."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, values: Tensor, stack: FlatStack, name: str) -> Tensor:
        ctx.stack, ctx.name = stack, name
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.stack.receive(ctx.name, grad)
        return None, None, None, None


def new_stack(
    spec: DeltaSpec,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable: bool = True,
) -> Any:
    """An initialised stack of ``size`` deltas of the given spec; at the start every delta changes nothing.

    Raises:
        ValueError: unknown kind, or no sites.
    """
    from fastedit.deltas.full import FullDelta
    from fastedit.deltas.low_rank import LowRankDelta

    kinds = {"full": FullDelta, "low_rank": LowRankDelta}
    if spec.kind not in kinds:
        raise ValueError(f"delta: kind is one of {sorted(kinds)} (got kind={spec.kind!r})")
    if not spec.sites:
        raise ValueError(f"delta: at least one site (got sites={spec.sites!r})")
    return kinds[spec.kind](spec, size, dtype=dtype, device=device, trainable=trainable)


def stack(deltas: Sequence[EditDelta], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Deltas of equal spec as one stack for application (not trainable).

    Raises:
        ValueError: none given, or their specs differ.
    """
    if not deltas:
        raise ValueError("stack: at least one delta (got none)")
    spec = deltas[0].spec
    for index, delta in enumerate(deltas):
        if delta.spec.kind != spec.kind or delta.spec.sites != spec.sites or delta.spec.options != spec.options:
            raise ValueError(f"stack: deltas share one spec (delta {index} has {delta.spec}, delta 0 has {spec})")
    kind_dtype = dtype or next((t.dtype for t in deltas[0].tensors.values()), torch.float32)
    stacked = new_stack(spec, len(deltas), dtype=kind_dtype, device=device, trainable=False)
    stacked.copy_from(deltas)
    return stacked


def accumulate(deltas: Sequence[EditDelta]) -> EditDelta:
    """One delta that acts as all the given ones together, as after edits made in sequence.

    Full deltas are added; low-rank deltas are laid side by side along the rank. Their kinds, sites and positions must
    agree.

    Raises:
        ValueError: none given, or kinds, sites or positions differ.
    """
    from fastedit.deltas.full import accumulate_full
    from fastedit.deltas.low_rank import accumulate_low_rank

    if not deltas:
        raise ValueError("accumulate: at least one delta (got none)")
    first = deltas[0].spec
    for index, delta in enumerate(deltas):
        spec = delta.spec
        if (spec.kind, spec.sites, spec.positions) != (first.kind, first.sites, first.positions):
            told = f"delta {index} has {spec}, not {first}"
            raise ValueError(f"accumulate: deltas share kind, sites and positions ({told})")
    return {"full": accumulate_full, "low_rank": accumulate_low_rank}[first.kind](deltas)
