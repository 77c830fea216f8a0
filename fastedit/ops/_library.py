"""How an op enters torch: its schema, its default kernel (the reference) and the kernels of single devices.

What arguments must be is checked by every kernel, so also where torch.ops.fastedit is called without the public
functions.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch

# op -> the devices that Triton serves; filled while the op modules are imported and constant afterwards
_TRITON: dict[str, set[str]] = {}

# op -> its definition in plain torch
_REFERENCES: dict[str, Callable[..., Any]] = {}

# Who serves CUDA tensors where both can: csrc, the compiled library, or triton. Read when the ops are imported.
PREFER = "FASTEDIT_CUDA"
_PREFERRED = os.environ.get(PREFER, "csrc")
if _PREFERRED not in ("csrc", "triton"):
    raise ValueError(f"{PREFER} is csrc or triton (got {PREFER}={_PREFERRED})")


# What torch.autocast does to an op's features: casts all to its dtype, as it does for products; the first two arguments
# to the wider one of them, as it does where results are exact anyway; or nothing.
Autocast = Literal["lower", "widest", "keep"]

# op -> what differentiates it under torch.func; filled as _TRITON is
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def define(
    name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any], autocast: Autocast = "keep"
) -> None:
    """Define ``fastedit::name``: the reference is the kernel of every device that gets no other, fake tells shapes."""
    torch.library.define(f"fastedit::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"fastedit::{name}", "CompositeExplicitAutograd", reference)
    torch.library.register_fake(f"fastedit::{name}", fake)
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        torch.library.impl(f"fastedit::{name}", key, _autocast_kernel(name, device, key, autocast))
    if name.endswith("_backward"):
        differentiate(name, _save_nothing, _refuse_second_backward)
    _TRITON[name] = set()
    _REFERENCES[name] = reference


def _autocast_kernel(name: str, device: str, key: str, autocast: Autocast) -> Callable[..., Any]:
    op = getattr(torch.ops.fastedit, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments: Any) -> Any:
        # what a kernel computes with torch's ops is not for autocast either
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*_cast(arguments, device, autocast))

    return kernel


def _cast(arguments: tuple[Any, ...], device: str, autocast: Autocast) -> tuple[Any, ...]:
    if autocast == "keep":
        return arguments
    count = 2 if autocast == "widest" else len(arguments)
    features = [one for one in arguments[:count] if isinstance(one, torch.Tensor) and one.is_floating_point()]
    if autocast == "widest":
        if len({one.dtype for one in features}) < 2:
            return arguments
        dtype = torch.promote_types(*(one.dtype for one in features))
    else:
        dtype = torch.get_autocast_dtype(device)
        # as torch's own ops: float64 is left as it is
        features = [one for one in features if one.dtype != torch.float64]
    chosen = {id(one) for one in features}
    return tuple(one.to(dtype) if id(one) in chosen else one for one in arguments)


def differentiate(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``fastedit::name`` a gradient: ``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` needs."""
    torch.library.register_autograd(f"fastedit::{name}", backward, setup_context=save)
    op = getattr(torch.ops.fastedit, name).default
    parts = {"forward": op.__call__, "setup_context": save, "backward": backward}
    members: dict[str, Any] = {part: staticmethod(function) for part, function in parts.items()}
    # vmap goes over the op itself, member by member
    members["generate_vmap_rule"] = True
    _FUNCTIONS[name] = type(f"{name}_function", (torch.autograd.Function,), members)


def call(name: str, *arguments: Any) -> Any:
    """Call ``fastedit::name``, also under torch.func's transforms, which do not take what register_autograd made."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.fastedit, name).default(*arguments)
    return _FUNCTIONS[name].apply(*arguments)  # type: ignore[no-untyped-call]


def serve_with_triton(name: str, stem: str) -> None:
    """Let ``name`` of kernels/<stem>.py serve CUDA tensors where Triton is installed, imported at the first call.

    Where the compiled library serves them already it stays in place, unless FASTEDIT_CUDA prefers Triton.
    """
    if importlib.util.find_spec("triton") is None or (_PREFERRED == "csrc" and compiled(name, "cuda")):
        return

    def launch(*arguments: Any) -> Any:
        return launched(name, getattr(importlib.import_module(f"fastedit.kernels.{stem}"), name), *arguments)

    with warnings.catch_warnings():
        # taking the compiled kernel's place was asked for
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        torch.library.impl(f"fastedit::{name}", "cuda", launch)
    _TRITON[name].add("cuda")


def launched(name: str, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """What a Triton kernel gives, or where a block of it is too large for the GPU the reference, with a warning.

    That is about shared memory or registers of one block, which follow from ranks and widths: fewer edits at a time
    would not help. It is found out before the kernel runs. An op that changes its arguments is not begun again.
    """
    try:
        return kernel(*arguments)
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        schema = getattr(torch.ops.fastedit, name).default._schema
        if schema.is_mutable:
            raise RuntimeError(f"{name}: a block of the Triton kernel fits the GPU (got {error})") from error
        message = (
            f"{name}: a block of the Triton kernel is too large for this GPU; plain torch serves the call ({error})"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return _REFERENCES[name](*arguments)


def compiled(name: str, device: str) -> bool:
    """Return whether the compiled library serves the op's tensors on the device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastedit::{name}", device.upper()))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


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
    return "csrc" if compiled(name, device) else "reference"
