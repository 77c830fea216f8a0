"""Questions and edits of stock models, without images on those that take none."""

from __future__ import annotations

import dataclasses
from typing import Any

import fastedit
from fastedit import EditRequest, Query
from fastedit.deltas import EditDelta
from tests.engine.stock_calls import edits, fitted, load, questions


def takes_images(name: str) -> bool:
    """Whether a model of ``stock_calls.load`` takes any."""
    return hasattr(load(name).hf.config, "vision_config")


def asked_of(name: str) -> list[Query]:
    """``questions``, of a text model in text alone."""
    asked = questions(load(name))
    return asked if takes_images(name) else [dataclasses.replace(query, image=None) for query in asked]


def fitted_on(name: str, method: str, mode: str = "single") -> list[EditDelta]:
    """Deltas of two edits by a method, of a text model in text alone."""
    if takes_images(name):
        return fitted(name, method, mode=mode)
    plain = [EditRequest(edit.prompt, edit.target, id=edit.id) for edit in edits()]
    options: dict[str, Any] = {"steps": 25, "lr": 2e-2, "stop_loss": None, "evaluate": False, "show_progress": False}
    return list(fastedit.edit(load(name), plain, method, mode=mode, **options).deltas)
