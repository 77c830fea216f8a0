"""How an op enters torch: its schema, its default kernel (the reference) and the kernels of single devices."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

# op -> the devices that Triton serves; filled while the op modules are imported and constant afterwards
_TRITON: dict[str, set[str]] = {}

# Who serves CUDA tensors where both can: csrc, the compiled library, or triton. Read when the ops are imported.
PREFER = "FASTEDIT_CUDA"
_PREFERRED = os.environ.get(PREFER, "csrc")
if _PREFERRED not in ("csrc", "triton"):
    raise ValueError(f"{PREFER} is csrc or triton (got {PREFER}={_PREFERRED})")


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``fastedit::name``: the reference is the kernel of every device that gets no other, fake tells shapes."""
    torch.library.define(f"fastedit::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"fastedit::{name}", "CompositeExplicitAutograd", reference)
    torch.library.register_fake(f"fastedit::{name}", fake)
    if name.endswith("_backward"):
        torch.library.register_autograd(f"fastedit::{name}", _refuse_second_backward)
    _TRITON[name] = set()


def serve_with_triton(name: str, stem: str) -> None:
    """Let ``name`` of kernels/<stem>.py serve CUDA tensors where Triton is installed, imported at the first call.

    Where the compiled library serves them already it stays in place, unless FASTEDIT_CUDA prefers Triton.
    """
    if importlib.util.find_spec("triton") is None or (_PREFERRED == "csrc" and _compiled(name, "cuda")):
        return

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"fastedit.kernels.{stem}"), name)(*arguments)

    with warnings.catch_warnings():
        # taking the compiled kernel's place was asked for
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        torch.library.impl(f"fastedit::{name}", "cuda", launch)
    _TRITON[name].add("cuda")


def _compiled(name: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastedit::{name}", device.upper()))


def _refuse_second_backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
    raise RuntimeError("the gradients of fastedit's ops are closed forms that are not differentiable again")


def implementations() -> dict[str, dict[str, str]]:
    """Return who serves each op on each device: ``csrc`` (compiled), ``triton`` or ``reference`` (plain torch).

    For example ``{"risk": {"cpu": "csrc", "cuda": "triton"}, ...}``.
    """
    public = sorted(name for name in _TRITON if not name.endswith("_backward"))
    return {name: {device: _server(name, device) for device in ("cpu", "cuda")} for name in public}


def _server(name: str, device: str) -> str:
    if device in _TRITON[name]:
        return "triton"
    return "csrc" if _compiled(name, device) else "reference"


def fail(op: str, rule: str, **got: object) -> NoReturn:
    """Raise ValueError ``op: rule (got name=value, ...)``."""
    listed = ", ".join(f"{name}={value}" for name, value in got.items())
    raise ValueError(f"{op}: {rule} (got {listed})")


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise unless the tensor has a dtype that the ops compute with."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fail(op, f"{name} is float32, bfloat16, float16 or float64", **{name: tensor.dtype})


def check_index(op: str, name: str, tensor: torch.Tensor, length: int | torch.SymInt, device: torch.device) -> None:
    """Raise unless the tensor is a vector of int64 of that length on that device."""
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.shape[0] != length:
        fail(op, f"{name} is int64 of shape ({length},)", **{name: f"{tensor.dtype} {tuple(tensor.shape)}"})
    if tensor.device != device:
        fail(op, f"{name} is on the device of the features", **{name: tensor.device, "features": device})
