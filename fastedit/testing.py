"""Inputs, tolerances and implementations of the ops, shared by the tests and the benchmarks."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit import _native
from fastedit.ops import implementations

# The one constant of all tolerances: c * eps(dtype) * sqrt(reduction length), relative to the largest expected value.
TOLERANCE = 4.0

# What tensor cores keep of a float32 operand, "tf32": they cut off 13 of 23 bits behind the point.
TF32 = 2.0**-10


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Return c * eps(dtype) * sqrt(length), the relative error that a sum of that many terms may show."""
    return float(TOLERANCE * torch.finfo(dtype).eps * max(length, 1) ** 0.5)


def assert_close(
    actual: Tensor, expected: Tensor, *, length: int, scale: float = 0.0, rounding: float = 0.0, name: str = "result"
) -> None:
    """Compare a result with its float64 expectation under the tolerance of its own dtype.

    Args:
        actual: any shape, any floating dtype.
        expected: the same shape, float64.
        length: number of terms behind one entry.
        scale: size of the terms summed, where cancellation makes it larger than that of the result.
        rounding: relative rounding of the terms' factors, where they were rounded before they were multiplied.
        name: how the result is called in the message.
    Raises:
        AssertionError: shapes differ, a value is not finite where expected is, or the error exceeds the tolerance.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    wide = actual.detach().cpu().double()
    goal = expected.detach().cpu().double()
    if not torch.equal(torch.isfinite(wide), torch.isfinite(goal)):
        raise AssertionError(f"{name}: {int((~torch.isfinite(wide)).sum())} values are not finite")
    bound = max(tolerance(actual.dtype, length), TOLERANCE * rounding) * max(scale, float(goal.abs().max()))
    error = float((wide - goal).abs().max())
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3e} exceeds {bound:.3e} ({actual.dtype}, {length} terms)")


@dataclass(frozen=True)
class Provider:
    """One implementation of one op: its id, the device of its tensors and where its functions are found."""

    op: str
    id: str
    device: str
    # why it cannot run here; empty when it can
    missing: str = ""

    def __str__(self) -> str:
        return self.id

    def function(self, name: str = "") -> Callable[..., Any]:
        """Return the function ``name`` (the op itself by default) with the arguments of the schema."""
        name = name or self.op
        source = self.id.split(":")[1]
        stem = self.op.rstrip("_")
        found: Callable[..., Any]
        if self.id.startswith("triton"):
            found = getattr(importlib.import_module(f"fastedit.kernels.{stem}"), name)
        elif source == "reference":
            found = getattr(importlib.import_module(f"fastedit.reference.{stem}"), name)
        else:
            found = getattr(torch.ops.fastedit, name).default
        return found if not source.startswith("csrc-") else _with_instruction_set(source.split("-")[1], found)


def _with_instruction_set(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        best = _native.instruction_sets()[0]
        _native.use_instruction_set(name)
        try:
            return function(*arguments)
        finally:
            _native.use_instruction_set(best)

    return call


def providers(op: str) -> list[Provider]:
    """Return every implementation the project has of an op, those that cannot run here with the reason."""
    served = implementations()[op]
    stem = op.rstrip("_")
    found = [Provider(op, "cpu:reference", "cpu")]
    compiled = "" if served["cpu"] == "csrc" else "the compiled library does not serve this op"
    found.append(Provider(op, "cpu:csrc", "cpu", compiled))
    # the best instruction set serves; the others are tested beside it
    found.extend(Provider(op, f"cpu:csrc-{isa}", "cpu", compiled) for isa in _native.instruction_sets()[1:])
    if importlib.util.find_spec(f"fastedit.kernels.{stem}") is not None:
        installed = "" if importlib.util.find_spec("triton") else "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        found.append(
            Provider(op, "triton:interpreted", "cpu", installed or ("" if interpreted else "TRITON_INTERPRET is not 1"))
        )
        gpu = "" if torch.cuda.is_available() and not interpreted else "no CUDA device, or Triton is interpreted"
        found.append(Provider(op, "triton:cuda", "cuda", installed or gpu))
    if served["cuda"] == "csrc":
        found.append(Provider(op, "cuda:csrc", "cuda", "" if torch.cuda.is_available() else "no CUDA device"))
    return found


def factor_rounding(provider: Provider, features: torch.dtype, parameters: torch.dtype) -> float:
    """Return ``rounding`` of sums of an implementation: on a GPU Triton multiplies 16-bit features as tf32."""
    narrow = features in (torch.bfloat16, torch.float16) and parameters == torch.float32
    return TF32 if narrow and provider.id == "triton:cuda" else 0.0


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """Return the int64 offsets (G + 1,) of groups of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)


def risk_inputs(
    tokens: int,
    vocabulary: int,
    segments: int,
    kind: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    spread: float = 2.0,
    drift: float = 0.3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int, str]:
    """Return the arguments of ``risk``: logits of standard deviation ``spread``, about a fifth of the tokens ignored.

    The reference logits of the KL kinds differ from the logits by ``drift``; ignored labels are -100, and the last of
    several segments has no tokens.
    """
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocabulary, generator=make) * spread).to(dtype)
    used = max(segments - 1, 1)
    segment = torch.randint(0, used, (tokens,), generator=make)
    segment[torch.rand(tokens, generator=make) < 0.2] = -1
    if kind == "ce":
        target = torch.randint(0, vocabulary, (tokens,), generator=make)
        target[segment < 0] = -100
    else:
        target = (logits.float() + drift * torch.randn(tokens, vocabulary, generator=make)).to(dtype)
    return logits.to(device), target.to(device), segment.to(device), segments, kind


def topk_agreement_inputs(
    tokens: int, vocabulary: int, dtype: torch.dtype, *, drift: float = 0.5, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return two sets of logits (T, V) that agree in part, rounded to quarters: ties are everywhere."""
    make = torch.Generator().manual_seed(seed)
    before = torch.randn(tokens, vocabulary, generator=make) * 2.0
    after = before + drift * torch.randn(tokens, vocabulary, generator=make)
    return tuple((4.0 * logits).round().div(4.0).to(device, dtype) for logits in (before, after))  # type: ignore[return-value]


def mmd2_inputs(
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    features: int,
    dtype: torch.dtype,
    *,
    scales: int = 5,
    per_group: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, y, offsets and bandwidths of ``mmd2``: features of mean 1 and 1.3, bandwidths around their distance."""
    make = torch.Generator().manual_seed(seed)
    x = 1.0 + torch.randn(sum(x_lengths), features, generator=make)
    y = 1.3 + torch.randn(sum(y_lengths), features, generator=make)
    # variances in ratio 2 around the mean squared distance 2 d
    powers = torch.arange(scales, dtype=torch.float32) - scales // 2
    bandwidths = (2.0 * features * 2.0**powers).sqrt()
    if per_group:
        bandwidths = bandwidths * (1.0 + 0.1 * torch.arange(len(x_lengths))[:, None])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        x.to(device, dtype),
        y.to(device, dtype),
        offsets(x_lengths, device),
        offsets(y_lengths, device),
        bandwidths.to(device, wide),
    )


def nearest_keys_inputs(
    queries: int, keys: int, features: int, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return queries and keys of ``nearest_keys``, standard normal."""
    make = torch.Generator().manual_seed(seed)
    made = (torch.randn(rows, features, generator=make).to(device, dtype) for rows in (queries, keys))
    return next(made), next(made)


def low_rank_inputs(
    lengths: Sequence[int],
    d: int,
    rank: int,
    d_out: int,
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, down, up and offsets of ``low_rank`` for edits with these token counts."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), d, generator=make)
    down = torch.randn(len(lengths), d, rank, generator=make) / max(d, 1) ** 0.5
    up = torch.randn(len(lengths), rank, d_out, generator=make) / max(rank, 1) ** 0.5
    factor_dtype = weight_dtype or dtype
    return x.to(device, dtype), down.to(device, factor_dtype), up.to(device, factor_dtype), offsets(lengths, device)


def key_value_inputs(
    lengths: Sequence[int],
    d: int,
    neurons: int,
    d_out: int,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return x, keys, bias, values, offsets, gate keys and gate bias of ``key_value``, entering values of unit size."""
    make = torch.Generator().manual_seed(seed)
    edits, factor_dtype = len(lengths), weight_dtype or dtype
    x = torch.randn(sum(lengths), d, generator=make).to(device, dtype)
    keys, gate_keys = (torch.randn(2, edits, d, neurons, generator=make) / max(d, 1) ** 0.5).to(device, factor_dtype)
    own_bias, gate_bias = torch.randn(2, edits, neurons, generator=make).to(device, factor_dtype)
    values = (torch.randn(edits, neurons, d_out, generator=make) / max(neurons, 1) ** 0.5).to(device, factor_dtype)
    gate = (gate_keys, gate_bias if bias else None) if gated else (None, None)
    return x, keys, own_bias if bias else None, values, offsets(lengths, device), *gate


def adam_step_inputs(
    rows: int, size: int, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return params, grads, both moments, step, lr and active of ``adam_step_``; every third row is done."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = torch.randn(rows, size, generator=make)
    grads = torch.randn(rows, size, generator=make) * 0.1
    first = torch.randn(rows, size, generator=make) * 0.1
    second = torch.rand(rows, size, generator=make) * 0.1
    step = torch.arange(rows) * 3
    lr = 0.01 * (1.0 + torch.arange(rows, dtype=torch.float64))
    active = torch.arange(rows) % 3 != 2
    return (
        params.to(device, dtype),
        grads.to(device, dtype),
        first.to(device, wide),
        second.to(device, wide),
        step.to(device),
        lr.to(device),
        active.to(device),
    )


def adam_step_outer_inputs(
    lengths: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> list[Any]:
    """Return the arguments of ``adam_step_outer_`` before its settings: a token count per part and edit, an (o, i) a
    part; every third edit is done."""
    make = torch.Generator().manual_seed(seed)
    edits = len(lengths[0])

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=dtype).to(device)

    totals = [sum(counts) for counts in lengths]
    params = [random(edits, *shape) for shape in shapes]
    inputs = [random(total, i) for total, (_, i) in zip(totals, shapes, strict=True)]
    grads = [random(total, o) * 0.1 for total, (o, _) in zip(totals, shapes, strict=True)]
    first = [random(edits, *shape) * 0.1 for shape in shapes]
    second = [random(edits, *shape).abs() * 0.1 for shape in shapes]
    step, lr = torch.arange(edits) * 3, 0.01 * (1.0 + torch.arange(edits, dtype=torch.float64))
    ends = [offsets(counts, device) for counts in lengths]
    active = torch.arange(edits) % 3 != 2
    return [params, inputs, grads, ends, first, second, step.to(device), lr.to(device), active.to(device)]
