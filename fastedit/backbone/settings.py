"""The arguments of `load` that are names: what they may be, and sentences for what they may not."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
#: float32 on a CPU; elsewhere, and where a checkpoint is quantized already, the type that it was stored in.
AUTO_DTYPE = "auto"
ATTENTIONS: tuple[str, ...] = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)
#: Kinds of devices that models run on.
DEVICES: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")


def check_choice(field: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones, naming the nearest."""
    if isinstance(value, str) and value in known:
        return
    nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    raise ValueError(f"load: {field} must be one of {', '.join(known)} (got {field}={value!r}{hint})")


def check_dtype(dtype: object) -> None:
    """Refuse what is no name of a type."""
    if dtype is not None:
        check_choice("dtype", dtype, (*DTYPES, AUTO_DTYPE))


def settled_dtype(dtype: str | None, device: torch.device) -> str | None:
    """Return the name of the type that "auto" is on a device: None, what the checkpoint was stored in, on a GPU."""
    return None if dtype == AUTO_DTYPE and device.type not in ("cpu", "meta") else dtype


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_device(device: object) -> torch.device:
    """Return the device that `load` was asked for; None is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: no device of this name, or none such in this machine.
    """
    if device is None:
        return default_device()
    got = f"got device={str(device) if isinstance(device, torch.device) else device!r}"
    rule = f"device must be one of {', '.join(DEVICES)}, a number behind it where there are several"
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"load: {rule} ({got})")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"load: {rule} ({got})") from None
    if place.type not in DEVICES:
        raise ValueError(f"load: {rule} ({got})")
    if place.type == "cpu":
        if place.index not in (None, 0):
            raise ValueError(f"load: device 'cpu' is a single one ({got})")
        return place
    module: Any = getattr(torch, place.type)
    count = int(module.device_count()) if module.is_available() else 0
    if (place.index or 0) >= count:
        known = f"{count} of this kind" if count else f"none of this kind that torch {torch.__version__} can use"
        raise ValueError(f"load: device must be one that this machine has ({got}; there {_verb(count)} {known})")
    return place


def _verb(count: int) -> str:
    return "are" if count > 1 else "is"
