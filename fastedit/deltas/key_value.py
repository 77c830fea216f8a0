"""Extra feed-forward neurons of an edit: keys that read the block's input, values that are added to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import Site
from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import key_value
from fastedit.ops.key_value import ACTIVATIONS, Activation

Shapes = dict[str, tuple[int, ...]]


class KeyValueDelta(FlatStack):
    """n extra neurons per edit and site: ``y += act(x K + b) (V + beta w z)``; gated, ``act(x G + c) * (x K + b)``.

    UniKE, arXiv 2409.19872, equations (1) and (6). The sites are the modules that end the feed-forward blocks ("down");
    x is the block's input, which is that of "up". V and w start at 0, so a fresh delta changes nothing. Every edit
    starts from the same keys, drawn from ``seed``, so that its result does not depend on its slot in a batch.

    Options of the spec:
        n, activation ("relu", "gelu" or "silu"), gate (bool), seed.
        switches: neurons can be switched off. steering: beta; absent without that term.
        activation_weight, memory_weight, margin, most: of the neurons' own losses (``extra_loss``); absent without.
    Parts, named after ``"{layer}.{name}:"``: ``keys`` (B, d, n), ``bias`` (B, n), ``values`` (B, n, d); gated,
    ``gate_keys`` (B, d, n) and ``gate_bias`` (B, n); with steering w, ``steer`` (B, 1).
    Fixed: ``off`` (B, n), 1 at a neuron that is switched off; ``direction`` (B, d), z.
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        self.feeding = self.neuron_sites(spec)
        shapes, fixed = neuron_shapes(spec, self.feeding) if self.feeding else ({}, {})
        others, kept = self.other_shapes(spec)
        shapes, fixed = shapes | others, fixed | kept
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable, fixed=fixed)
        self._drawn = drawn_keys(spec, shapes, self.flat) if size else {}
        # What only the fit needs is not stored with a delta: the token that a neuron is for, and inputs of others
        self.tokens: dict[str, Tensor] = {}
        self.memories: dict[str, Tensor] = {}
        self.foreign: dict[str, Tensor] = {}
        if "activation_weight" in spec.options:
            for site in self.feeding:
                shape = (size, int(spec.options["n"]), site.d_out)
                self.tokens[f"{part_prefix(site)}tokens"] = torch.zeros(shape, dtype=dtype, device=device)
        self.restart(range(size))

    @staticmethod
    def neuron_sites(spec: DeltaSpec) -> tuple[Site, ...]:
        """The sites that neurons stand beside: all."""
        return spec.sites

    @staticmethod
    def other_shapes(_spec: DeltaSpec) -> tuple[Shapes, Shapes]:
        """Shapes of parts and of fixed tensors besides those of neurons: none."""
        return {}, {}

    def initial(self, name: str) -> Tensor | float:
        """Drawn keys; all else is 0."""
        return self._drawn.get(name, 0.0)

    def reader(self, site: int) -> str | None:
        """The neurons read what the feed-forward block reads."""
        return "up"

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change of the block's output for its input x (tokens, d), tokens sorted by edit: (tokens, d)."""
        return neurons(self, self.spec.sites[site], x, rows)

    def set(self, edit: int, values: Mapping[str, Tensor]) -> None:
        """Write parts or fixed tensors of one edit; with losses of its own also what these are made of.

        After a site's name: ``tokens`` (n, d), the input that a neuron is for; ``memory`` (M, d), inputs that no neuron
        is for, one tensor for all edits; ``foreign`` (M,) bool, those of them that this edit has nothing to do with.
        """
        rest = dict(values)
        for name in values:
            if name in self.tokens:
                self.tokens[name][edit].copy_(rest.pop(name))
            elif name.endswith(":memory"):
                self.memories[name] = rest.pop(name)
            elif name.endswith(":foreign"):
                marks = rest.pop(name)
                if name not in self.foreign:
                    self.foreign[name] = marks.new_zeros(self.size, len(marks))
                self.foreign[name][edit] = marks
        super().set(edit, rest)

    def extra_loss(self) -> Tensor | None:
        """(B,) the activation and memory losses of the neurons; see ``neuron_losses``."""
        if not self.memories:
            return None
        return torch.stack([self._site_losses(part_prefix(site)) for site in self.feeding]).sum(0)

    def _site_losses(self, prefix: str) -> Tensor:
        options = self.spec.options
        part = "gate_" if options.get("gate", False) else ""
        keys, bias = self.differentiable(f"{prefix}{part}keys"), self.differentiable(f"{prefix}{part}bias")
        off = self.fixed.get(f"{prefix}off")
        activation, others = neuron_losses(
            keys,
            bias,
            self.tokens.get(f"{prefix}tokens"),
            self.memories[f"{prefix}memory"],
            self.foreign[f"{prefix}foreign"],
            torch.ones_like(bias) if off is None else 1.0 - off,
            margin=float(options["margin"]),
            most=int(options["most"]),
        )
        return float(options.get("activation_weight", 0.0)) * activation + float(options["memory_weight"]) * others


def part_prefix(site: Site) -> str:
    """What the names of a site's parts begin with."""
    return f"{site.layer}.{site.name}:"


def neuron_shapes(spec: DeltaSpec, sites: Sequence[Site]) -> tuple[Shapes, Shapes]:
    """Shapes, without the leading B, of the parts and of the fixed tensors of the neurons at some sites.

    Raises:
        ValueError: fewer than one neuron, an activation that is not known, or a site that ends no feed-forward block.
    """
    n, activation = int(spec.options["n"]), spec.options.get("activation", "relu")
    if n < 1:
        raise ValueError(f"key_value: n is at least 1 (got n={n})")
    if activation not in ACTIVATIONS:
        raise ValueError(f"key_value: activation is one of {list(ACTIVATIONS)} (got activation={activation!r})")
    shapes: Shapes = {}
    fixed: Shapes = {}
    for site in sites:
        if site.name != "down":
            raise ValueError(f"key_value: neurons stand beside 'down' (got site {site.layer}.{site.name})")
        # A feed-forward block ends as wide as it begins
        prefix, width = part_prefix(site), site.d_out
        shapes |= {f"{prefix}keys": (width, n), f"{prefix}bias": (n,)}
        if spec.options.get("gate", False):
            shapes |= {f"{prefix}gate_keys": (width, n), f"{prefix}gate_bias": (n,)}
        shapes[f"{prefix}values"] = (n, width)
        if spec.options.get("switches", False):
            fixed[f"{prefix}off"] = (n,)
        if "steering" in spec.options:
            shapes[f"{prefix}steer"] = (1,)
            fixed[f"{prefix}direction"] = (width,)
    return shapes, fixed


def drawn_keys(spec: DeltaSpec, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> dict[str, Tensor]:
    """First keys and gate keys by name of the part: uniform with variance 1 / (3 d), as of a fresh linear map."""
    generator = torch.Generator().manual_seed(int(spec.options.get("seed", 0)))
    drawn = {}
    for name, shape in shapes.items():
        if name.endswith((":keys", ":gate_keys")):
            draw = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1
            drawn[name] = (draw * shape[0] ** -0.5).to(like)
    return drawn


def neurons(stack: FlatStack, site: Site, x: Tensor, rows: Rows | TokenSpans) -> Tensor:
    """What the neurons at a site add for tokens x (T, d), sorted by edit: (T, d)."""
    prefix, options = part_prefix(site), stack.spec.options
    keys, bias = stack.differentiable(f"{prefix}keys"), stack.differentiable(f"{prefix}bias")
    gate = None
    if options.get("gate", False):
        gate = stack.differentiable(f"{prefix}gate_keys"), stack.differentiable(f"{prefix}gate_bias")
    values = stack.differentiable(f"{prefix}values")
    if "steering" in options:
        # (B, 1) * (B, d): the same row beside every value
        towards = stack.differentiable(f"{prefix}steer") * stack.fixed[f"{prefix}direction"]
        values = values + float(options["steering"]) * towards[:, None]
    if options.get("switches", False):
        values = values * (1.0 - stack.fixed[f"{prefix}off"])[:, :, None]
    offsets = rows.offsets_tensor(x.shape[0], stack.size, x.device)
    # Half-precision tokens are taken as they are; sums and parameters are float32 all the same
    narrow = x.dtype in (torch.bfloat16, torch.float16) and keys.dtype == torch.float32
    activation = cast(Activation, options.get("activation", "relu"))
    return key_value(x if narrow else x.to(keys.dtype), keys, bias, values, offsets, activation, gate)


def neuron_losses(
    keys: Tensor,
    bias: Tensor,
    tokens: Tensor | None,
    memory: Tensor,
    foreign: Tensor,
    on: Tensor,
    *,
    margin: float,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Activation and memory loss of an edit's neurons, (B,) each.

    T-Patcher, arXiv 2301.09785, section 3.3. With s what enters a neuron at its own token and m at a remembered input,
    both before the activation: the mean of the five largest exp(-s); and the mean of the largest exp(m - s + margin)
    plus that of the largest exp(m + margin). Neurons that are off, and edits without any, count for nothing.

    Args:
        keys: (B, d, n). bias: (B, n). memory: (M, d).
        tokens: (B, n, d); None without, where the terms that have s are left out.
        foreign: (B, M) bool, inputs that an edit may not act at. on: (B, n), 1 or 0.
        margin: of the memory loss. most: how many of the largest are taken.
    """
    edits, d, n = keys.shape
    # (B, n, M), as one product: a batched one would copy the memory for every edit
    remembered = (keys.transpose(1, 2).reshape(edits * n, d) @ memory.to(keys.dtype).T).view(edits, n, -1)
    remembered = remembered + bias[:, :, None]
    counted = (on > 0)[:, :, None] & foreign[:, None, :]
    others = _mean_of_largest(remembered + margin, counted, most)
    if tokens is None:
        return torch.zeros_like(others), others
    entering = (tokens * keys.transpose(1, 2)).sum(-1) + bias
    activation = _mean_of_largest(-entering, on > 0, 5)
    return activation, others + _mean_of_largest(remembered - entering[:, :, None] + margin, counted, most)


def _mean_of_largest(exponents: Tensor, counted: Tensor, most: int) -> Tensor:
    """Mean over an edit's largest exp(exponents) (B, ...), at most so many, of those that count; else 0: (B,)."""
    flat, counted = exponents.masked_fill(~counted, -torch.inf).flatten(1), counted.flatten(1)
    k = min(most, flat.shape[1])
    found = counted.sum(1).clamp(max=k).clamp(min=1)
    return torch.exp(flat.topk(k, dim=1, sorted=False).values).sum(1) / found


def acting_values(delta: EditDelta, prefix: str) -> Tensor:
    """(n, d), what a delta's neurons add when they put out 1: values with their steering, zeros where switched off."""
    values, options = delta.tensors[f"{prefix}values"], delta.spec.options
    if "steering" in options:
        towards = delta.tensors[f"{prefix}steer"] * delta.tensors[f"{prefix}direction"]
        values = values + float(options["steering"]) * towards
    if options.get("switches", False):
        values = values * (1.0 - delta.tensors[f"{prefix}off"])[:, None]
    return values


def plain_neurons(delta: EditDelta, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The neurons of a delta at some sites as parts of one without switches and steering, which adds the same."""
    plain: dict[str, Tensor] = {}
    gated = bool(delta.spec.options.get("gate", False))
    for site in sites:
        prefix = part_prefix(site)
        for part in ("keys", "bias", "gate_keys", "gate_bias") if gated else ("keys", "bias"):
            plain[prefix + part] = delta.tensors[prefix + part]
        plain[f"{prefix}values"] = acting_values(delta, prefix)
    return plain


#: Along which dimension of a part, without the leading B, the neurons are numbered.
NEURON_DIM = {"keys": 1, "bias": 0, "gate_keys": 1, "gate_bias": 0, "values": 0, "off": 0}


def plain_options(spec: DeltaSpec, n: int) -> dict[str, object]:
    """Options of a delta that only acts: without what serves to fit it."""
    fitting = ("steering", "switches", "activation_weight", "memory_weight", "margin", "most")
    return {**{key: value for key, value in spec.options.items() if key not in fitting}, "n": n}


def side_by_side(deltas: Sequence[EditDelta], sites: Sequence[Site]) -> dict[str, Tensor]:
    """The neurons of several deltas as the parts of one.

    Raises:
        ValueError: their activations or gates differ, or they ask another question besides.
    """
    if any("template" in delta.texts for delta in deltas):
        raise ValueError(f"key_value: deltas in sequence ask the question itself (got texts={list(deltas[0].texts)})")
    kinds = {(d.spec.options.get("activation", "relu"), bool(d.spec.options.get("gate", False))) for d in deltas}
    if len(kinds) > 1:
        raise ValueError(f"key_value: neurons laid side by side share activation and gate (got {sorted(kinds)})")
    parts = [plain_neurons(delta, sites) for delta in deltas]
    return {name: torch.cat([part[name] for part in parts], NEURON_DIM[name.split(":")[1]]) for name in parts[0]}


def accumulate_key_value(deltas: Sequence[EditDelta]) -> EditDelta:
    """The neurons of all deltas side by side: n is the sum of theirs."""
    spec = deltas[0].spec
    options = plain_options(spec, sum(int(delta.spec.options["n"]) for delta in deltas))
    tensors = side_by_side(deltas, spec.sites)
    request_id = "+".join(delta.request_id for delta in deltas)
    return replace(deltas[0], spec=replace(spec, options=options), tensors=tensors, request_id=request_id)


def joined_key_value(deltas: Sequence[EditDelta]) -> list[EditDelta]:
    """Deltas that may differ in their number of neurons as deltas of one spec: filled up with neurons that add 0."""
    n = max(int(delta.spec.options["n"]) for delta in deltas)
    made = []
    for delta in deltas:
        parts = {
            name: _widened(tensor, NEURON_DIM[name.split(":")[1]], n)
            for name, tensor in plain_neurons(delta, delta.spec.sites).items()
        }
        made.append(replace(delta, spec=replace(delta.spec, options=plain_options(delta.spec, n)), tensors=parts))
    return made


def _widened(tensor: Tensor, dim: int, n: int) -> Tensor:
    missing = n - tensor.shape[dim]
    # pad counts dimensions from the last
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor
