"""A worker comes by the very model of the run, or says that it does not."""

from __future__ import annotations

import pickle

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.engine.parallel.source import InMemory, Loaded, source_of


def test_a_loaded_model_is_loaded_again(model: EditableModel) -> None:
    source = pickle.loads(pickle.dumps(source_of(model)))
    assert isinstance(source, Loaded)
    opened = source.open(None)
    assert (opened.fingerprint, opened.dtype, opened.device) == (model.fingerprint, torch.float64, model.device)


def test_a_loaded_model_that_was_changed_is_refused() -> None:
    changed = fastedit.load("random:llava-tiny")
    with torch.no_grad():
        changed.hf.get_input_embeddings().weight += 1
    with pytest.raises(ValueError, match=r"given to workers by fastedit\.wrap"):
        source_of(changed).open(None)


def test_a_wrapped_model_travels_with_its_weights() -> None:
    loaded = fastedit.load("random:llava-tiny", linear="torch", seed=3)
    wrapped = fastedit.wrap(loaded.hf, loaded.processor)
    source = pickle.loads(pickle.dumps(source_of(wrapped)))
    assert isinstance(source, InMemory)
    assert source.open(None).fingerprint == wrapped.fingerprint
