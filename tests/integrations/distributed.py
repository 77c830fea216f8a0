"""Run by torchrun on CPUs: pocket-llava trained by ODEdit's loss in each process.

"ddp" and "deepspeed" are an InvariantTrainer; "fsdp2" is a loop of the loss over ``fully_shard``, because accelerate
shards no model on CPUs.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import fastedit
from fastedit.integrations.invariant import KEY, EnvironmentCollator, Invariance, InvariantTrainer, invariant_loss
from fastedit.requests import Query
from tests.integrations.conftest import arguments, collate, row

SETTINGS = Invariance(["asked", "other"], kept=["other"])
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}


def training_set(pocket: Any) -> list[dict[str, Any]]:
    rows = []
    for each in fastedit.read_edits("pocket-vqa", limit=4):
        other = Query(each.image_locality_prompt or "", each.image_locality_image, each.image_locality_answer)
        for query, name in ((Query(each.prompt, each.image, each.target), "asked"), (other, "other")):
            rows.append(row(pocket, query, environment=name))
    return rows


def by_trainer(pocket: Any, rows: Any, folder: Path, steps: int, **options: Any) -> tuple[Any, list[float]]:
    settings = arguments(folder, max_steps=steps, ddp_backend="gloo", **options)
    trainer = InvariantTrainer(
        copy.deepcopy(pocket.hf).requires_grad_(True), settings, train_dataset=rows, data_collator=collate,
        invariance=SETTINGS, reference_model=copy.deepcopy(pocket.hf),
    )  # fmt: skip
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_fully_shard(pocket: Any, rows: Any, steps: int) -> tuple[Any, list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = copy.deepcopy(pocket.hf).requires_grad_(True)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    half = len(rows) // 2
    mine = rows[:half] if distributed.get_rank() == 0 else rows[half:]
    batch = EnvironmentCollator(collate, SETTINGS)(mine)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", KEY)}
    with torch.no_grad():
        reference = pocket.hf(**inputs).logits
    losses = []
    for _ in range(steps):
        found = invariant_loss(SETTINGS, model(**inputs).logits, batch["labels"], batch[KEY], reference=reference)
        found.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(found.loss.detach()))
    return model, losses


def run(kind: str, pocket: Any, rows: Any, folder: Path, steps: int) -> dict[str, Any]:
    """Losses of the first process, the sum of all weights, and whether they are shards."""
    if kind == "fsdp2":
        model, losses = by_fully_shard(pocket, rows, steps)
    else:
        options = {"deepspeed": ZERO2} if kind == "deepspeed" else {}
        model, losses = by_trainer(pocket, rows, folder, steps, **options)
    whole = [getattr(each, "full_tensor", lambda each=each: each)().detach() for each in model.parameters()]
    total = float(torch.stack([each.double().sum() for each in whole]).sum())
    return {"sum": total, "losses": losses, "sharded": any(hasattr(each, "full_tensor") for each in model.parameters())}


def main(kinds: str, folder: Path, steps: int = 3) -> None:
    pocket = fastedit.load("pocket-llava")
    rows = training_set(pocket)
    told = {kind: run(kind, pocket, rows, folder, steps) for kind in kinds.split(",")}
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(told))
    distributed.barrier()
    distributed.destroy_process_group()
    # What was asked is written; threads of gloo that outlive the interpreter may abort it, as was seen once
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
