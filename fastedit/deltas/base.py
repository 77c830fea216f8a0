"""What every kind of delta has in common: flat per-edit rows, named parts, and the map from batch rows to edits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Site
from fastedit.deltas.gate import gate
from fastedit.deltas.room import check_room
from fastedit.deltas.rows import Rows, TokenSpans, slices_of
from fastedit.ops import workspace

if TYPE_CHECKING:
    from fastedit.deltas.full import Factored


@dataclass(frozen=True)
class DeltaSpec:
    """The shape of a delta: its kind, where it sits, and the kind's own settings.

    Args:
        kind: one of ``KINDS``.
        sites: the linear modules that the delta stands beside.
        options: the kind's settings (rank, scale, seed ...), plain values only: they are saved with the delta.
            ``positions`` says on which tokens any kind acts: "all", or "after_image": behind the last image token of
            a row that has an image.
    """

    kind: str
    sites: tuple[Site, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        """All of it as JSON: what an id is taken of."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

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
        texts: what is text in it; "template" is the question to ask instead of any, "{prompt}" standing for that one.
        fitted_on: the company in which it was fitted (``company`` of the deltas that were active): () where it was
            alone, None where that is not known.
        merged: the company that it is the sum of; () for the delta of a single edit.
    """

    spec: DeltaSpec
    tensors: Mapping[str, Tensor]
    model_fingerprint: str = ""
    request_id: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    fitted_on: tuple[str, ...] | None = None
    merged: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sites = [f"{site.layer}.{site.name}" for site in self.spec.sites]
        shown = ", ".join(sites[:4]) + (f" and {len(sites) - 4} more" if len(sites) > 4 else "") or "no site"
        return f"<EditDelta: {self.spec.kind} at {shown}, {self.n_parameters:,} parameters, edit {self.request_id!r}>"

    @cached_property
    def id(self) -> str:
        """SHA-256 over spec, texts and tensors: equal means that both change a model alike, to the bit."""
        texts = json.dumps(dict(self.texts), sort_keys=True, default=str)
        digest = hashlib.sha256(f"[{self.spec.text}, {texts}]".encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            if tensor.numel():
                content_bytes: Any = tensor.reshape(-1).view(torch.uint8).numpy()
                digest.update(content_bytes)
        return digest.hexdigest()

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
    fixed: dict[str, Tensor]
    texts: list[Mapping[str, str]]
    row_roles: tuple[int, ...]
    earlier: Sequence[StackedDelta]

    @property
    def size(self) -> int:
        """B."""

    def bind(self, model: EditableModel) -> None:
        """Take from the model what the delta needs of it to act; called whenever the deltas are installed."""

    def reader(self, site: int) -> str | None:
        """Name of the linear module of the same layer whose input the change is a function of; None is the site's."""

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor) -> Tensor:
        """Change (tokens, d_out) of the output of site number ``site``.

        Args:
            x: (tokens, d_in) input of the reader's or the site's module, tokens sorted by edit.
            output: (tokens, d_out) of the site's module.
        """

    def extra_loss(self) -> Tensor | None:
        """(B,) the delta's own regularisers after a forward pass, added to any objective; None where it has none."""

    def parameters_as_input(self) -> Tensor:
        """``flat`` as a differentiable input, for objectives that are functions of the parameters themselves."""

    def part_names(self) -> list[str]:
        """Names of the parts in the order of the flat row."""

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which changes nothing."""

    def set(self, edit: int, values: Mapping[str, Tensor]) -> None:
        """Write parts or fixed tensors of one edit."""

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """Edit number ``index`` as a value of its own, a copy on the device of the stack."""

    def begin_step(self, *, outer: bool = False) -> None:
        """Forget the gradients of the step before; ``outer``: the step's may be left as outer products."""

    def end_step(self) -> None:
        """After the backward pass: ``grad`` is complete from here on, or ``factored`` gives it."""

    def factored(self) -> Factored | None:
        """After ``end_step``: the step's gradient as outer products, where ``grad`` has it not."""


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
        fixed: name -> shape of what belongs to an edit and is not fitted.
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
        fixed: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.spec = spec
        self.shapes = dict(shapes)
        check_room(spec, [*shapes.values(), *(fixed or {}).values()], dtype, torch.device(device))
        self.fixed = {
            name: torch.zeros(size, *shape, dtype=dtype, device=device) for name, shape in (fixed or {}).items()
        }
        self.texts: list[Mapping[str, str]] = [{} for _ in range(size)]
        #: Role of every row of the running batch, while the deltas are fitted.
        self.row_roles: tuple[int, ...] = ()
        #: Deltas that act beneath, while these are fitted on top of them.
        self.earlier: Sequence[StackedDelta] = ()
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
        self._pending: list[Callable[[], Any]] = []
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

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Everything that is saved of an edit, by name: parts, then fixed tensors."""
        return {**self.shapes, **{name: tuple(tensor.shape[1:]) for name, tensor in self.fixed.items()}}

    def bind(self, model: EditableModel) -> None:
        """Nothing is needed of the model."""

    def reader(self, site: int) -> str | None:
        """The site's own input."""
        return None

    def extra_loss(self) -> Tensor | None:
        """None."""
        return None

    def set(self, edit: int, values: Mapping[str, Tensor]) -> None:
        """Write parts or fixed tensors of one edit."""
        for name, value in values.items():
            (self.parts if name in self.parts else self.fixed)[name][edit].copy_(value)

    def initial(self, _name: str) -> Tensor | float:
        """The value of a part in a fresh delta, without the leading B."""
        return 0.0

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which changes nothing."""
        for span in slices_of(edits):
            for name, part in self.parts.items():
                value = self.initial(name)
                _ = part[span].copy_(value) if isinstance(value, Tensor) else part[span].fill_(value)
            for tensor in self.fixed.values():
                tensor[span].zero_()

    def differentiable(self, name: str) -> Tensor:
        """Part ``name`` (B, ...) as an input of the graph; its gradient lands in ``part_grads[name]``."""
        if not (self.trainable and torch.is_grad_enabled()):
            return self.parts[name]
        return gate(self.anchor, self.parts[name], self, name)

    def parameters_as_input(self) -> Tensor:
        """``flat`` (B, P) as an input of the graph; its gradient is added by ``end_step``."""
        return gate(self.anchor, self.flat, self, "")

    def first_gradient(self, name: str) -> bool:
        """Whether part ``name`` has no gradient in this step yet; the caller must store one if so."""
        first, self._fresh[name] = self._fresh[name], False
        return first

    def receive(self, name: str, grad: Tensor) -> None:
        """Store or add a part's gradient; "" is the whole row."""
        if not name:
            self.receive_later(lambda: self.grad.add_(grad))
        else:
            target = self.part_grads[name]
            _ = target.copy_(grad) if self.first_gradient(name) else target.add_(grad)

    def receive_later(self, add: Callable[[], Any]) -> None:
        """Call ``add()`` in ``end_step``, once every part's gradient is there; it adds to ``grad``."""
        self._pending.append(add)

    def begin_step(self, *, outer: bool = False) -> None:
        """Forget the gradients of the step before."""
        self._fresh, self._pending = dict.fromkeys(self.shapes, True), []

    def end_step(self) -> None:
        """After the backward pass: zero what got no gradient, add what was for whole rows."""
        for name, fresh in self._fresh.items():
            if fresh:
                self.part_grads[name].zero_()
        for add in self._pending:
            add()
        self._pending = []

    def factored(self) -> Factored | None:
        """None: ``grad`` has all."""
        return None

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """Edit number ``index`` as a value of its own, a copy on the device of the stack."""
        kept = {**self.parts, **self.fixed}
        tensors = {name: part[index].detach().clone().contiguous() for name, part in kept.items()}
        return EditDelta(self.spec, tensors, model_fingerprint, request_id, self.texts[index])

    def copy_from(self, deltas: Sequence[EditDelta]) -> None:
        """Fill row b from ``deltas[b]``.

        Raises:
            ValueError: a delta has other parts or shapes than this stack.
        """
        for row, delta in enumerate(deltas):
            for name, shape in self.stored_shapes().items():
                tensor = delta.tensors.get(name)
                got = None if tensor is None else tuple(tensor.shape)
                if tensor is None or got != shape:
                    raise ValueError(
                        f"stack: every delta has part {name!r} of shape {shape} (got {got} in delta {row})"
                    )
                (self.parts[name] if name in self.parts else self.fixed[name])[row].copy_(tensor)
        self.texts = [delta.texts for delta in deltas]
