"""Every family is known everywhere it must be, and unknown ones are refused."""

from __future__ import annotations

import types

import pytest

from fastedit.backbone import FAMILIES, SHAPES
from fastedit.backbone.adapters import check_configuration
from fastedit.backbone.text import text_stack

from .conftest import TINY, cached_model


def test_every_family_has_a_tiny_model_and_its_unquantized_parts() -> None:
    assert {SHAPES[name.removeprefix("random:")].model_type for name in TINY} == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_unquantized_parts_are_real_modules_outside_of_the_layers(name: str) -> None:
    model = cached_model(name)
    for path in FAMILIES[model.hf.config.model_type].unquantized:
        part = model.hf.get_submodule(path)
        assert not set(map(id, part.modules())) & set(map(id, model.adapter.text.layers.modules()))


def test_unknown_kinds_and_text_models_are_refused() -> None:
    from transformers import AutoConfig

    unknown = AutoConfig.for_model("clip")
    with pytest.raises(
        ValueError, match=r"model_type must be one that transformers .*\(got model_type='clip'; the near"
    ):
        check_configuration("x/y", unknown)
    root = types.SimpleNamespace(config=types.SimpleNamespace(model_type="gemma"))
    with pytest.raises(ValueError, match=r"text model must be one of .* \(got model_type='gemma'\)"):
        text_stack(root)
