"""Trained parts as a value and as a file: safetensors, everything that is not a tensor as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastedit.files import read_tensors, require_finite, write_tensors

if TYPE_CHECKING:
    from fastedit.backbone import EditableModel

FORMAT = "fastedit-artifact/1"


@dataclass(frozen=True, eq=False)
class Artifact:
    """The trained part of a method, bound to the model that it was trained on.

    Args:
        kind: the method's name as spelled when it was trained, e.g. "mend" or "odedit+mend".
        model_fingerprint: of the frozen model.
        config: what the tensors mean: sizes, settings, what it was trained on. Plain values, kept as JSON keeps them
            (tuples become lists).
        tensors: name -> tensor, any dtype; copied to host memory, without gradients.
        metrics: how training went; no part of the identity.
    Raises:
        ValueError: no kind, or a config or metrics that JSON does not know.
    """

    kind: str
    model_fingerprint: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kind:
            raise ValueError(f"artifact: kind is a method's name (got kind={self.kind!r})")
        for name in ("config", "metrics"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", copies)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.tensors.values())
        best = self.metrics.get("best") or {}
        score = (
            f", score {100 * best['score']:.1f} % at step {best['step']:.0f}" if {"score", "step"} <= set(best) else ""
        )
        return f"<Artifact: {self.kind} for model {self.model_fingerprint[:12]}, {count:,} parameters{score}>"

    @cached_property
    def id(self) -> str:
        """SHA-256 over kind, model, config and tensors: equal means that both act alike to the bit."""
        digest = hashlib.sha256(_json([FORMAT, self.kind, self.model_fingerprint, self.config]).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
            if tensor.numel():
                content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
                digest.update(content)
        return digest.hexdigest()


def save_artifact(artifact: Artifact, path: str | Path) -> Path:
    """Write an artifact to one safetensors file that is there whole or not at all; folders are made.

    Raises:
        ValueError: a value that is not finite; nothing is written then.
        OSError: the file cannot be written; what was there is there.
    """
    require_finite(artifact.tensors, "artifact", f"the artifact for {artifact.kind!r}")
    header = {
        "format": FORMAT,
        "kind": artifact.kind,
        "model": artifact.model_fingerprint,
        "config": artifact.config,
        "metrics": artifact.metrics,
        "id": artifact.id,
    }
    write_tensors(artifact.tensors, header, Path(path), "artifact")
    return Path(path)


def load_artifact(path: str | Path, model: EditableModel | None = None, *, kind: str | None = None) -> Artifact:
    """Read an artifact.

    Args:
        path: of a file that ``save_artifact`` or ``fastedit.train`` wrote.
        model: the model it must have been trained on; deltas on it that need the artifact to act find it from then on.
            None leaves that unchecked.
        kind: the method it must be for; None takes any.
    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, an incomplete or changed file, a value that is not finite, another kind, or another
            model.
    """
    tensors, header, _ = read_tensors(path, FORMAT, "artifact")
    try:
        artifact = Artifact(header["kind"], header["model"], header["config"], tensors, header["metrics"])
        stored = header["id"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"artifact: a complete header (got {error!r:.200} in path={str(path)!r})") from error
    if artifact.id != stored:
        raise ValueError(
            f"artifact: the content is what was written (got id={artifact.id[:12]} where the header of {str(path)!r} "
            f"has id={stored!r:.14})"
        )
    require_finite(tensors, "artifact", f"path={str(path)!r}")
    require_artifact(artifact, kind or artifact.kind, model)
    if model is not None:
        model.artifacts[artifact.id] = artifact
    return artifact


def require_artifact(artifact: Artifact | None, kind: str, model: EditableModel | None = None) -> Artifact:
    """Return the artifact if a method can use it on a model.

    Args:
        artifact: as given; None is refused.
        kind: the method's name as spelled.
        model: the model in use; None leaves that unchecked.
    Raises:
        ValueError: none was given, or it is of another kind or model; names the call that makes one.
    """
    call = f"fastedit.train(model, {kind!r}, records)"
    if artifact is None:
        raise ValueError(
            f"{kind}: needs a trained part; make one with {call} and pass it as artifact=, or on the command line with "
            f"'fastedit train --method {kind}' and give it as --artifact (got none)"
        )
    if artifact.kind != kind:
        raise ValueError(f"{kind}: the artifact is of this kind, see {call} (got kind={artifact.kind!r})")
    if model is not None and artifact.model_fingerprint != model.fingerprint:
        raise ValueError(
            f"{kind}: the artifact was trained on the model in use, see {call} (got model="
            f"{artifact.model_fingerprint[:12]!r}, in use {model.fingerprint[:12]!r})"
        )
    return artifact


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _plain(name: str, value: Any) -> Any:
    """The value as it will be after it was saved and loaded."""
    try:
        return json.loads(_json(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"artifact: {name} is made of plain values ({error})") from error
