"""What is asked of an engine is looked at before anything is done."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from tests.engine.parallel.conftest import FEW


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "dask"}, r"engine is one of \['processes', 'ray'\], or None \(got engine='dask'\)"),
        ({"workers": 2}, r"workers and resources belong to an engine"),
        ({"engine": "processes", "workers": 0}, r"workers is at least 1, or None \(got workers=0\)"),
        ({"engine": "processes", "resources": {"GPU": 1}}, "resources belong to engine='ray'"),
        ({"engine": "ray", "resources": {"GPU": "one"}}, "resources are amounts by name"),
    ],
)
def test_impossible_arguments(
    model: EditableModel, edits: list[EditRequest], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastedit.edit(model, edits, **given, **FEW)


def test_without_ray_it_says_what_to_install(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else stock(name, *rest))
    with pytest.raises(ImportError, match=r"pip install 'fastedit-mllm\[ray\]'"):
        fastedit.edit(model, edits, engine="ray", **FEW)
