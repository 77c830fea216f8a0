"""Deltas on disk: one safetensors file, the specs as JSON in its header. Nothing in a file is ever executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas.base import DeltaSpec, EditDelta, new_stack

FORMAT = "fastedit-deltas/1"


def save_deltas(deltas: Sequence[EditDelta], path: str | Path) -> Path:
    """Write deltas to one safetensors file, atomically (written beside, then renamed).

    Tensor names are ``"{index:06d}/{part}"``; header field ``fastedit`` holds format, specs, ids and fingerprints.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    entries = []
    specs: list[dict[str, Any]] = []
    for index, delta in enumerate(deltas):
        spec = {**asdict(delta.spec), "options": dict(delta.spec.options)}
        if spec not in specs:
            specs.append(spec)
        entry = {"id": delta.request_id, "model": delta.model_fingerprint, "spec": specs.index(spec)}
        entries.append(entry)
        for name, tensor in delta.tensors.items():
            tensors[f"{index:06d}/{name}"] = tensor.contiguous()
    header = {"fastedit": json.dumps({"format": FORMAT, "specs": specs, "deltas": entries})}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)
    return path


def load_deltas(path: str | Path) -> list[EditDelta]:
    """Read deltas back, with every shape checked against its spec.

    Raises:
        ValueError: not a file of this format, or a part is missing or has the wrong shape.
    """
    from safetensors import safe_open

    deltas = []
    with safe_open(str(path), framework="pt") as file:
        raw = (file.metadata() or {}).get("fastedit")
        if raw is None:
            raise ValueError(f"deltas: a safetensors file with a 'fastedit' header (got path={str(path)!r})")
        try:
            header = json.loads(raw)
            if header["format"] != FORMAT:
                raise ValueError(f"deltas: format is {FORMAT!r} (got format={header['format']!r})")
            specs = [
                DeltaSpec(s["kind"], tuple(Site(**site) for site in s["sites"]), dict(s["options"]))
                for s in header["specs"]
            ]
            entries = [(specs[e["spec"]], str(e["model"]), str(e["id"])) for e in header["deltas"]]
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"deltas: a complete header (got {error!r} in path={str(path)!r})") from error
        names = set(file.keys())
        for index, (spec, model, request_id) in enumerate(entries):
            shapes = new_stack(spec, 0, trainable=False).shapes
            tensors = {}
            for name, shape in shapes.items():
                key = f"{index:06d}/{name}"
                if key not in names:
                    raise ValueError(f"deltas: every part is present (got no {key!r} in path={str(path)!r})")
                tensor = file.get_tensor(key)
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"deltas: part {key!r} has shape {shape} (got shape={tuple(tensor.shape)})")
                tensors[name] = tensor
            deltas.append(EditDelta(spec, tensors, model, request_id))
    return deltas
