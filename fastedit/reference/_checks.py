"""Checks of single arguments, shared by all ops: one message form, ``op: rule (got name=value, ...)``."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, rule: str, **got: object) -> NoReturn:
    """Raise ValueError ``op: rule (got name=value, ...)``."""
    listed = ", ".join(f"{name}={value}" for name, value in got.items())
    raise ValueError(f"{op}: {rule} (got {listed})")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is a plain one of a dtype that the ops compute with."""
    if tensor.dtype not in FLOATING:
        fail(op, f"{name} is float32, bfloat16, float16 or float64", **{name: tensor.dtype})
    check_dense(op, **{name: tensor})


def check_dense(op: str, **tensors: Tensor) -> None:
    """Raise unless the tensors have strides: sparse ones and their like have none."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            fail(op, f"{name} is dense", **{name: tensor.layout})


def check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int | torch.SymInt], device: torch.device
) -> None:
    """Raise unless the tensor is a plain one of that dtype and shape on that device."""
    if tensor.dtype != dtype or tensor.shape != tuple(shape):
        rule = f"{name} is {str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
        fail(op, rule, **{name: f"{tensor.dtype} {tuple(tensor.shape)}"})
    if tensor.device != device:
        fail(op, f"{name} is on the device of the features", **{name: tensor.device, "features": device})
    check_dense(op, **{name: tensor})


def check_index(op: str, name: str, tensor: Tensor, length: int | torch.SymInt, device: torch.device) -> None:
    """Raise unless the tensor is a vector of int64 of that length on that device."""
    check_tensor(op, name, tensor, torch.int64, (length,), device)


def check_same(op: str, rule: str, attribute: str, **tensors: Tensor) -> None:
    """Raise unless all tensors have one dtype, or are on one device."""
    got = {name: getattr(tensor, attribute) for name, tensor in tensors.items()}
    if len(set(got.values())) > 1:
        fail(op, rule, **got)
    check_dense(op, **tensors)


def offsets_of(op: str, offsets: Tensor, rows: int, *, name: str = "offsets", what: str, rows_name: str) -> list[int]:
    """Return offsets as numbers, which rise from 0 to ``rows``."""
    starts: list[int] = offsets.tolist()
    if not starts or starts[0] != 0 or starts[-1] != rows or sorted(starts) != starts:
        fail(op, f"{name} rise from 0 to {what}", **{name: starts, rows_name: rows})
    return starts


def check_segments(op: str, segments: Tensor, n_segments: int) -> None:
    """Raise unless every segment is below ``n_segments``; a negative one stands for none."""
    if segments.numel() and not bool((segments < n_segments).all()):
        fail(op, "segments are below n_segments", max=int(segments.max()), n_segments=n_segments)


def check_labels(op: str, labels: Tensor, segments: Tensor, vocabulary: int) -> None:
    """Raise unless the labels of tokens that count are rows of the vocabulary."""
    labels = labels[segments >= 0]
    if labels.numel() and not bool(((labels >= 0) & (labels < vocabulary)).all()):
        got = {"min": int(labels.min()), "max": int(labels.max()), "V": vocabulary}
        fail(op, "labels lie in [0, V) where segments >= 0", **got)
