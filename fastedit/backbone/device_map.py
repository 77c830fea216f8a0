"""`device_map`: which part of a checkpoint goes where, decided and checked before its weights are read."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .generic.decoder import find_decoder
from .settings import check_choice, checked_device, default_device

#: How accelerate fills devices: evenly, the first one last, or one after another.
FILLS: tuple[str, ...] = ("auto", "balanced", "balanced_low_0", "sequential")
DISK = "disk"


@dataclass(frozen=True)
class DeviceMap:
    """What `load` was asked for.

    Args:
        places: one of `FILLS`, or a device or "disk" by module path; "" is the rest.
        max_memory: bytes by device, as accelerate takes them; None is what is free.
        offload_folder: where weights are written that lie in no file of the checkpoint as the model has them.
    """

    places: str | Mapping[str, torch.device | str]
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | None = None

    @property
    def device(self) -> torch.device:
        """The device that modules run on whose weights are in host memory or on disk."""
        if isinstance(self.places, str):
            return default_device()
        gpus = [place for place in self.places.values() if isinstance(place, torch.device) and place.type != "cpu"]
        return gpus[0] if gpus else torch.device("cpu")

    def settled(self, hf: Any, *, quantized: bool) -> DeviceMap:
        """Return the map with a place for every weight of a model, which is on the meta device.

        Args:
            quantized: whether linear maps are; their sizes are known to the loader alone, which then fills devices.
        Raises:
            ValueError: a path that the model does not have, a weight without a place, a layer in parts, weights on disk
                where they cannot be.
        """
        places = self.places
        if isinstance(places, str):
            if quantized:
                return self
            places = _filled(hf, places, self.max_memory)
        _check_paths(hf, places)
        by_weight = {name: _place_of(name, places) for name in hf.state_dict()}
        homeless = [name for name, place in by_weight.items() if place is None]
        if homeless:
            raise ValueError(
                'load: device_map must have a place for every weight, "" for the rest '
                f"(got none for {homeless[0]} and {len(homeless) - 1} more)"
            )
        settled = DeviceMap(places, None, self.offload_folder)
        settled = DeviceMap(_leaves(hf, places, settled.device), None, self.offload_folder)
        by_weight = {name: _place_of(name, settled.places) for name in by_weight}  # type: ignore[arg-type]
        _check_layers(hf, by_weight, settled.device)
        if DISK in by_weight.values():
            settled._check_disk(hf, by_weight, quantized)
        return settled

    def _check_disk(self, hf: Any, by_weight: Mapping[str, Any], quantized: bool) -> None:
        if quantized:
            raise ValueError(
                "load: quantized weights must be on devices, not on disk (got 'disk' in device_map with quantized maps)"
            )
        if self.offload_folder is not None:
            return
        rewritten = [name for name, place in by_weight.items() if place == DISK and _is_rewritten(hf, name)]
        if rewritten:
            raise ValueError(
                "load: offload_folder must be given where weights on disk are not in the checkpoint as the model has "
                f"them (got none; {rewritten[0]} is put together from others)"
            )

    def options(self, folder: str | None) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        places: Any = self.places
        if not isinstance(places, str):
            # accelerate knows the host by its name only
            places = {path: str(place) if str(place) in ("cpu", DISK) else place for path, place in places.items()}
        given: dict[str, Any] = {"device_map": places}
        if self.max_memory is not None:
            given["max_memory"] = dict(self.max_memory)
        if folder is not None:
            given["offload_folder"] = folder
        return given


def checked_map(
    device_map: object, device: object, max_memory: object, offload_folder: object, name: str
) -> DeviceMap | None:
    """Return what was asked for, or None where no map was; refused where it cannot be, before anything is read.

    Args:
        device_map, device, max_memory, offload_folder: arguments of `load`. name: of the model.
    Raises:
        ValueError: see `load`. ImportError: accelerate is absent.
    """
    if device_map is None:
        for field, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise ValueError(f"load: {field} must come with a device_map (got {field}={value!r})")
        return None
    if device is not None:
        raise ValueError(f"load: device or device_map must be given, not both (got {device=!r}, {device_map=!r})")
    if name.startswith("random:"):
        raise ValueError(f"load: a device_map must be of a checkpoint's weights (got name_or_path={name!r})")
    _require_accelerate()
    if isinstance(device_map, str):
        check_choice("device_map", device_map, FILLS)
        places: str | dict[str, torch.device | str] = device_map
    elif isinstance(device_map, Mapping) and device_map:
        places = {str(path): _checked_place(path, place) for path, place in device_map.items()}
    else:
        rule = f"device_map must be one of {', '.join(FILLS)}, or devices by module path"
        raise ValueError(f"load: {rule} (got device_map={device_map!r})")
    if max_memory is not None:
        _check_memory(max_memory, places)
    return DeviceMap(places, max_memory, _checked_folder(offload_folder))  # type: ignore[arg-type]


@contextmanager
def offloading(map_: DeviceMap | None) -> Iterator[tuple[str | None, list[Any]]]:
    """A new folder below the one for offloaded weights, which goes with the model that is put into the list.

    Yields:
        The folder, None where none was asked for; and the list.
    """
    owner: list[Any] = []
    if map_ is None or map_.offload_folder is None:
        yield None, owner
        return
    Path(map_.offload_folder).mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="fastedit-", dir=map_.offload_folder)
    try:
        yield folder, owner
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(owner[0], shutil.rmtree, folder, ignore_errors=True)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError("load: device_map needs accelerate: pip install accelerate") from error


def _checked_place(path: object, place: object) -> torch.device | str:
    if not isinstance(path, str):
        raise ValueError(f"load: device_map must have module paths for keys (got {path!r})")
    if place == DISK:
        return DISK
    if isinstance(place, int) and not isinstance(place, bool):
        place = f"cuda:{place}"
    try:
        return checked_device(place)
    except ValueError as error:
        rule = str(error).removeprefix("load: ")
        raise ValueError(f"load: device_map of {path!r}: 'disk', a GPU's number, or a {rule}") from None


def _check_memory(max_memory: object, places: object) -> None:
    if not isinstance(places, str):
        raise ValueError(f"load: max_memory must come with one of {', '.join(FILLS)} (got devices by module path)")
    rule = "max_memory must be bytes, or '10GiB', by a GPU's number or 'cpu'"
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise ValueError(f"load: {rule} (got max_memory={max_memory!r})")
    from accelerate.utils import convert_file_size_to_int

    for key, size in max_memory.items():
        if key != "cpu":
            _checked_place("max_memory", key)
        try:
            amount = convert_file_size_to_int(size) if isinstance(size, (int, str)) else -1
        except ValueError:
            amount = -1
        if amount < 0 or isinstance(size, bool) or not isinstance(key, (int, str)):
            raise ValueError(f"load: {rule} (got {key!r}: {size!r})")


def _checked_folder(folder: object) -> str | None:
    if folder is None:
        return None
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"load: offload_folder must be a path (got offload_folder={folder!r})")
    path = Path(os.fspath(folder))
    if path.exists() and not (path.is_dir() and os.access(path, os.W_OK)):
        raise ValueError(f"load: offload_folder must be a folder that can be written to (got {str(path)!r})")
    return str(path)


def _filled(hf: Any, fill: str, max_memory: Mapping[int | str, int | str] | None) -> dict[str, torch.device | str]:
    """Places by module path, as accelerate fills devices, the host and the disk."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = list(getattr(hf, "_no_split_modules", None) or ())
    limits = None if max_memory is None else dict(max_memory)
    if fill == "sequential":
        memory = get_max_memory(limits)
    else:
        low = fill == "balanced_low_0"
        memory = get_balanced_memory(hf, max_memory=limits, no_split_module_classes=whole, low_zero=low)
    inferred = infer_auto_device_map(hf, max_memory=memory, no_split_module_classes=whole)
    return {path: place if place == DISK else _checked_place(path, place) for path, place in inferred.items()}


def _check_paths(hf: nn.Module, places: Mapping[str, Any]) -> None:
    known = {path for path, _ in hf.named_modules()} | set(hf.state_dict())
    unknown = [path for path in places if path not in known]
    if unknown:
        check_choice(
            "device_map", unknown[0], sorted(path for path in known if path.count(".") <= unknown[0].count("."))
        )


def _leaves(hf: nn.Module, places: Mapping[str, Any], main: torch.device) -> dict[str, Any]:
    """The same places by paths of which none lies below another: a hook places all that is below its module.

    Weights of a module that has parts elsewhere have no hook of their own and are on the main device.
    """
    found: dict[str, Any] = {}
    waiting: list[tuple[str, nn.Module]] = [("", hf)]
    while waiting:
        path, module = waiting.pop()
        below = f"{path}." if path else ""
        if not any(name.startswith(below) and name != path for name in places):
            found[path] = _place_of(path, places)
            continue
        waiting += [(below + name, child) for name, child in module.named_children()]
        own = [*module._parameters, *module._buffers]
        found |= {below + name: main for name in own if getattr(module, name) is not None}
    return {path: place for path, place in found.items() if place is not None}


def _place_of(name: str, places: Mapping[str, Any]) -> Any:
    """The place of a weight: that of the longest path that it lies under."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places.get(name)


def _check_layers(hf: nn.Module, by_weight: Mapping[str, Any], main: torch.device) -> None:
    """Refuse a decoder layer that runs on several devices."""
    layers: Any = find_decoder(hf).layers
    prefix = next(path for path, module in hf.named_modules() if module is layers)
    for index in range(len(layers)):
        places = {place for name, place in by_weight.items() if name.startswith(f"{prefix}.{index}.")}
        runs = {main if place == DISK or place == torch.device("cpu") else place for place in places}
        if len(runs) > 1:
            raise ValueError(
                "load: device_map must keep a decoder layer on one device "
                f"(got {', '.join(sorted(map(str, runs)))} for {prefix}.{index})"
            )


def _is_rewritten(hf: Any, name: str) -> bool:
    """Whether a weight is put together from several of a checkpoint, so that no file has it as it is."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return False
    patterns = [
        pattern
        for each in get_model_conversion_mapping(hf)
        if isinstance(each, WeightConverter)
        for pattern in each.target_patterns
    ]
    return any(pattern.replace("\\", "").strip("^$.") in name for pattern in patterns)
