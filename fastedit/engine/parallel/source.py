"""How a worker comes by the model of a run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastedit.backbone import EditableModel, load
from fastedit.backbone.wrapping import wrap


class ModelSource(Protocol):
    """Gives a worker the model of a run; travels to it by pickle."""

    def open(self, device: str | None) -> EditableModel:
        """The model, on a device; None is the one that it has with who sends it."""


@dataclass(frozen=True)
class Loaded:
    """A model that ``fastedit.load`` gave: workers load it as well.

    Args:
        name: of it. options: of ``load``. fingerprint: of the weights.
    """

    name: str
    options: Mapping[str, Any]
    fingerprint: str

    def open(self, device: str | None) -> EditableModel:
        """Load it.

        Raises:
            ValueError: what the name stands for are other weights than those of the run.
        """
        moved = {} if device is None or self.options["device_map"] is not None else {"device": device}
        model = load(self.name, **{**self.options, **moved})
        if model.fingerprint != self.fingerprint:
            raise ValueError(
                f"edit: a model that was changed in memory is given to workers by fastedit.wrap(model.hf, "
                f"model.processor) (got {self.name!r} with fingerprint {self.fingerprint[:12]}, which is loaded as "
                f"{model.fingerprint[:12]})"
            )
        return model


@dataclass(frozen=True)
class InMemory:
    """A model that was wrapped in memory: it travels with its weights.

    Args:
        parts: pickled model and processor. options: of ``fastedit.wrap``.
    """

    parts: bytes
    options: Mapping[str, Any]

    def open(self, device: str | None) -> EditableModel:
        """Wrap it again."""
        hf, processor = pickle.loads(self.parts)
        return wrap(hf if device is None else hf.to(device), processor, **self.options)


def source_of(model: EditableModel) -> ModelSource:
    """How workers come by a model.

    Raises:
        ValueError: it is in memory alone and cannot be pickled.
    """
    if model.loaded_with is not None:
        return Loaded(model.name, model.loaded_with, model.fingerprint)
    try:
        parts = pickle.dumps((model.hf, model.processor))
    except Exception as error:
        raise ValueError(
            f"edit: a model in memory is pickled for workers; give engine=None, or load it by name (got "
            f"{model.name!r}, of which {error})"
        ) from error
    return InMemory(parts, {"name": model.name, "template": model.template})
