"""pocket-llava as a stock model, and a training set of its kind for the Trainer of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.requests import Query


@pytest.fixture(scope="session")
def pocket() -> EditableModel:
    return fastedit.load("pocket-llava")


@pytest.fixture(scope="session")
def records() -> list[EditRequest]:
    return fastedit.read_edits("pocket-vqa", limit=8)


@pytest.fixture
def stock(pocket: EditableModel) -> Any:
    """A copy to be trained."""
    return copy.deepcopy(pocket.hf).requires_grad_(True)


def row(model: EditableModel, query: Query, **columns: Any) -> dict[str, Any]:
    """An example as the Trainer's data sets have them: labels are those of the input, -100 but for the answer."""
    encoded = model.encode([query], answers=True)
    ids = encoded.input_ids[0]
    end = encoded.labels[0][encoded.label_mask[0]][-1:]
    labels = torch.full((len(ids) + 1,), -100)
    labels[1:][encoded.label_mask[0]] = encoded.labels[0][encoded.label_mask[0]]
    inputs = {name: value[0] for name, value in encoded.model_inputs.items() if name == "pixel_values"}
    return {"input_ids": torch.cat([ids, end]), "labels": labels, **inputs, **columns}


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded rows, images stacked."""
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([each["input_ids"] for each in examples], batch_first=True),
        "labels": pad([each["labels"] for each in examples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(each["input_ids"]) for each in examples], batch_first=True),
    }
    return batch | {"pixel_values": torch.stack([each["pixel_values"] for each in examples])}


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "lr_scheduler_type": "constant", "seed": 0,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**usual, **options})


@pytest.fixture
def rows(pocket: EditableModel, records: list[EditRequest]) -> Callable[[], list[dict[str, Any]]]:
    """The edits themselves as a training set."""
    return lambda: [row(pocket, Query(each.prompt, each.image, each.target)) for each in records]
