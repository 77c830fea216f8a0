"""Real Trainers with fastedit's callback and loss: does each way to train that people use work with them?

    python benchmarks/trainers.py                          every setting, a table
    python benchmarks/trainers.py --settings plain,ddp     some
    python benchmarks/trainers.py --record                 append the rows to results/

Each setting trains pocket-llava in a process of its own (two, by gloo, where it is of several) for a hundred steps: an
``InvariantTrainer`` over three environments, one of them kept, with an ``EditCallback`` that asks the edits at half
time and at the end. Rows hold the first and the last loss and the edits' reliability; what was checked is in
their config. A setting that fails a check, or that raises, is said to, and the exit status is 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record

#: Steps between two answers of the callback are half of them.
STEPS, EDITS, RESULTS = 100, 2, record.RESULTS / "trainers.jsonl.gz"
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Args:
        says: it in words. options: of ``TrainingArguments``. processes: by gloo.
        kind: "trainer"; "sft" of TRL; "peft"; or "loop" over ``fully_shard``, for which accelerate wants a GPU.
        computes: the type of its matrix products. On a CPU a Trainer leaves float16 out; there its hook for it
            (``autocast_smart_context_manager``) gets torch's own autocast.
    """

    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    kind: str = "trainer"
    computes: str = "float32"


SETTINGS: Mapping[str, Setting] = {
    "plain": Setting("Trainer, float32"),
    "accumulation": Setting("gradient accumulation, 2 steps", {"gradient_accumulation_steps": 2}),
    "checkpointing": Setting("gradient checkpointing", {"gradient_checkpointing": True}),
    "bf16": Setting("autocast bfloat16", {"bf16": True}, computes="bfloat16"),
    "fp16": Setting("autocast float16", computes="float16"),
    "compile": Setting("torch.compile (inductor)", {"torch_compile": True}),
    "peft": Setting("PEFT model (LoRA)", kind="peft"),
    "sft": Setting("TRL SFTTrainer with vision", kind="sft"),
    "ddp": Setting("DDP, 2 gloo processes", {"ddp_backend": "gloo"}, processes=2),
    "fsdp2": Setting("FSDP2 (fully_shard), 2 gloo processes", processes=2, kind="loop"),
    "zero2": Setting("DeepSpeed ZeRO-2, 2 gloo processes", {"deepspeed": ZERO2, "ddp_backend": "gloo"}, processes=2),
}


def examples(model: Any, records: Sequence[Any]) -> list[dict[str, Any]]:
    """Three rows a record: asked, reworded, and another question, whose answer must stay."""
    from fastedit.requests import Query

    rows = []
    for each in records:
        queries = {
            "asked": Query(each.prompt, each.image, each.target),
            "reworded": Query(each.rephrase, each.image, each.target),
            "other": Query(each.image_locality_prompt, each.image_locality_image, each.image_locality_answer),
        }
        rows += [{**encoded(model, query), "environment": name} for name, query in queries.items()]
    return rows


def encoded(model: Any, query: Any) -> dict[str, Any]:
    """A row as data sets of a Trainer have it: labels are of the input's shape, -100 but for the answer."""
    import torch

    found = model.encode([query], answers=True)
    ids, answer = found.input_ids[0], found.labels[0][found.label_mask[0]]
    labels = torch.full((len(ids) + 1,), -100)
    labels[1:][found.label_mask[0]] = answer
    pixels = found.model_inputs["pixel_values"][0]
    return {"input_ids": torch.cat([ids, answer[-1:]]), "labels": labels, "pixel_values": pixels}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Right-padded rows, images stacked."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
    }


def conversations(records: Sequence[Any]) -> Any:
    """The same as a data set of prompts and completions with images, for TRL."""
    import datasets

    from fastedit.data import open_image

    rows = []
    for each in records:
        other = (each.image_locality_prompt, each.image_locality_image, each.image_locality_answer, "other")
        edit = (each.prompt, each.image, each.target, "asked"), (each.rephrase, each.image, each.target, "reworded")
        for prompt, image, answer, name in (*edit, other):
            question = [{"type": "image"}, {"type": "text", "text": prompt}]
            said = [{"type": "text", "text": answer}]
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": said}],
                    "images": [open_image(image)],
                    "environment": name,
                }
            )
    return datasets.Dataset.from_list(rows)


def invariance() -> Any:
    """Three environments: what is asked, in other words, and what must stay."""
    from fastedit.integrations.invariant import Invariance

    pair = ("asked", "reworded")
    return Invariance([*pair, "other"], kept=["other"], reworded=pair, multiplier=0.5, warmup=0.1)


def by_trainer(setting: Setting, model: Any, records: Sequence[Any], folder: Path, steps: int) -> dict[str, Any]:
    """Train by a Trainer and look at what came out."""
    import copy

    import torch
    from transformers import TrainingArguments

    from fastedit.integrations.invariant import InvariantLoss, InvariantTrainer

    class _Float16(InvariantTrainer):
        def autocast_smart_context_manager(self, *_args: Any, **_options: Any) -> Any:
            return torch.autocast("cpu", torch.float16)

    from fastedit.integrations.transformers import EditCallback

    options = {
        "per_device_train_batch_size": 3, "train_sampling_strategy": "sequential", "max_steps": steps,
        "learning_rate": 3e-4, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "lr_scheduler_type": "constant", "seed": 0, "eval_strategy": "steps", "eval_steps": steps // 2,
        "output_dir": str(folder), **setting.options,
    }  # fmt: skip
    trained: Any = copy.deepcopy(model.hf).requires_grad_(True)
    common = {"invariance": invariance(), "processing_class": model.processor}
    if setting.kind == "sft":
        import trl

        mixed: Any = type("Mixed", (InvariantLoss, trl.SFTTrainer), {})
        rows = conversations(records)
        arguments = trl.SFTConfig(**{"bf16": False, "max_length": None, **options})
        reference = copy.deepcopy(model.hf)
        trainer = mixed(
            trained, arguments, train_dataset=rows, eval_dataset=rows.select([0]), reference_model=reference, **common
        )
    else:
        reference = copy.deepcopy(model.hf) if setting.kind != "peft" else None
        if setting.kind == "peft":
            import peft

            trained.requires_grad_(False)
            options["learning_rate"] = 5e-3
            adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
            trained = peft.get_peft_model(trained, adapters)
        rows = examples(model, records)
        kind = _Float16 if setting.computes == "float16" else InvariantTrainer
        trainer = kind(
            trained, TrainingArguments(**options), train_dataset=rows, eval_dataset=rows[:1], data_collator=collate,
            reference_model=reference, **common,
        )  # fmt: skip
    before = {name: value.detach().clone() for name, value in trained.named_parameters()}
    callback = EditCallback(records).add_to(trainer)
    product, seen = next(each for name, each in trained.named_modules() if name.endswith("q_proj")), []
    is_compiled = bool(setting.options.get("torch_compile"))
    if not is_compiled:  # a hook in a compiled model is where its graph ends
        product.register_forward_hook(lambda each, _args, output: seen.append(output.dtype) if each.training else None)
    trainer.train()
    history = trainer.state.log_history
    asked = [entry for entry in history if "eval_edit_reliability" in entry]
    told = [entry for entry in history if "penalty" in entry]
    after = trainer.accelerator.unwrap_model(trainer.model)
    after = getattr(after, "_orig_mod", after)
    checks = {
        "every step was logged": len([entry for entry in history if "loss" in entry]) == steps,
        "risks, penalty and MMD² are finite": bool(told) and all(_finite(entry) for entry in told),
        "the callback asked at half time and at the end": [entry["step"] for entry in asked] == [steps // 2, steps],
        "the kept environment began at the reference": told[0]["risk/other"] < 1e-2,
        "weights have changed": any(not value.equal(before[name]) for name, value in after.named_parameters()),
    }
    if is_compiled:
        checks["graphs were compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    else:
        checks[f"matrix products were {setting.computes}"] = set(seen) == {getattr(torch, setting.computes)}
    if setting.options.get("gradient_checkpointing"):
        checks["layers were computed twice"] = len(seen) == 2 * steps
    if setting.kind == "peft":
        still = {name: value for name, value in after.named_parameters() if "lora" not in name}
        checks["only adapters have changed"] = all(value.equal(before[name]) for name, value in still.items())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "losses": losses, "checks": checks, "sum": _sum(after.parameters()),
        "reliability": asked[-1]["eval_edit_reliability"], "text_locality": asked[-1]["eval_edit_text_locality"],
        "lost": len(callback.lost),
    }  # fmt: skip


def by_loop(model: Any, records: Sequence[Any], steps: int) -> dict[str, Any]:
    """The loss in a loop over a model whose layers are sharded; the callback refuses such a model."""
    import copy

    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fastedit.integrations.invariant import KEY, EnvironmentCollator, invariant_loss
    from fastedit.integrations.transformers import EditCallback

    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    trained: Any = copy.deepcopy(model.hf).requires_grad_(True)
    for layer in trained.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=3e-4, weight_decay=0.0)
    rows = examples(model, records)
    mine = rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]
    batch = EnvironmentCollator(collate, invariance())(mine)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", KEY)}
    with torch.no_grad():
        reference = model.hf(**inputs).logits
    losses = []
    for step in range(steps):
        output = trained(**inputs, output_hidden_states=True, use_cache=False)
        found = invariant_loss(
            invariance(), output.logits, batch["labels"], batch[KEY], reference=reference,
            hidden=output.hidden_states[-1], multiplier=0.0 if step < steps // 10 else None,
        )  # fmt: skip
        found.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(found.loss.detach()))
    try:
        EditCallback(records)._model(model=trained, processing_class=model.processor)
        refused = False
    except ValueError as error:
        refused = "whole in every process" in str(error)
    return {
        "losses": losses, "sum": _sum(trained.parameters()),
        "checks": {
            "the callback says that it needs the whole model": refused,
            "parameters are shards": all(hasattr(each, "full_tensor") for each in trained.parameters()),
        },
    }  # fmt: skip


def _finite(entry: Mapping[str, float]) -> bool:
    import math

    return all(math.isfinite(value) for name, value in entry.items() if name.startswith(("risk/", "penalty", "mmd2")))


def _sum(parameters: Any) -> float:
    import torch

    whole = [getattr(each, "full_tensor", lambda each=each: each)().detach() for each in parameters]
    return float(torch.stack([each.double().sum() for each in whole]).sum())


def work(name: str, folder: Path, steps: int) -> None:
    """What a process of a setting does; writes what it found to ``<rank>.json``."""
    import fastedit

    setting = SETTINGS[name]
    model = fastedit.load("pocket-llava")
    records = fastedit.read_edits("pocket-vqa", limit=EDITS)
    loop = setting.kind == "loop"
    found = by_loop(model, records, steps) if loop else by_trainer(setting, model, records, folder, steps)
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")


def measured(name: str, steps: int, timeout: float) -> dict[str, Any]:
    """Run a setting in processes of its own; what the first of them found, with what they must have in common."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if setting.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={setting.processes}"]
            command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command += [str(Path(__file__).resolve()), "--work", name, "--folder", folder, "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
        if done.returncode:
            return {"losses": [], "checks": {}, "failed": done.stderr[-2000:]}
        found = [json.loads((Path(folder) / f"{n}.json").read_text()) for n in range(setting.processes)]
    first = found[0]
    if setting.processes > 1:
        first["checks"]["all processes have the same weights"] = len({each["sum"] for each in found}) == 1
    if first["losses"]:
        first["checks"]["the loss has halved"] = first["losses"][-1] < 0.5 * first["losses"][0]
    return first


def rows_of(found: Mapping[str, Mapping[str, Any]], steps: int) -> list[record.Row]:
    """Rows of the settings that trained."""
    from datetime import UTC, datetime

    from fastedit.engine import provenance

    commit = record.commit_with_changes(provenance.commit())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for name, each in found.items():
        setting = SETTINGS[name]
        config = {
            "setting": setting.says, "model": "pocket-llava", "steps": steps, "edits": EDITS,
            "processes": setting.processes, "checks": [check for check, holds in each["checks"].items() if holds],
        }  # fmt: skip
        values = {"first_loss": each["losses"][0], "last_loss": each["losses"][-1]}
        values |= {f"strict_{score}": each[score] for score in ("reliability", "text_locality") if score in each}
        rows += [
            record.Row(
                f"trainers/{name}", "trainer", metric, record.unit_of(metric), value, value, value, None, None, config,
                record.machine(), provenance.versions(), commit, 0, now,
            )
            for metric, value in values.items()
        ]  # fmt: skip
    return record.check(rows)


def show(found: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a line a setting."""
    table = Table("setting", "loss, first", "last", "reliability", "checks that hold")
    for name, each in found.items():
        losses, checks = each["losses"], each["checks"]
        failed = [check for check, holds in checks.items() if not holds]
        said = "FAILED: " + "; ".join(failed) if failed else f"{len(checks)} of {len(checks)}"
        if "failed" in each:
            said = "FAILED: " + each["failed"].strip().splitlines()[-1][:200]
        shown = [f"{losses[0]:.3f}", f"{losses[-1]:.4f}"] if losses else ["-", "-"]
        asked = f"{each['reliability']:.2f}" if "reliability" in each else "-"
        table.add_row(SETTINGS[name].says, *shown, asked, said)
    console.print(table)


def page(rows: Sequence[record.Row]) -> str:
    """The newest stored rows as the table of docs/trainers.md."""
    newest = {(row.case, row.metric): row for row in record.latest(rows)}
    lines = [
        "| trained by | loss, first | last | edits hold | text locality | checked |",
        "|---|---|---|---|---|---|",
    ]
    for name, setting in SETTINGS.items():
        case = f"trainers/{name}"
        if (case, "last_loss") not in newest:
            continue
        cells = [
            f"{newest[case, metric].value:.3f}" if (case, metric) in newest else "-"
            for metric in ("first_loss", "last_loss", "strict_reliability", "strict_text_locality")
        ]
        checks = "; ".join(newest[case, "last_loss"].config["checks"])
        lines.append(f"| {setting.says} | {' | '.join(cells)} | {checks} |")
    return "\n".join(lines) + "\n"


def main(
    settings: Annotated[str, typer.Option(help="comma-separated names")] = ",".join(SETTINGS),
    steps: Annotated[int, typer.Option(min=2)] = STEPS,
    timeout: Annotated[float, typer.Option(help="seconds for one setting")] = 1800.0,
    store: Annotated[bool, typer.Option("--record", help="append the rows to results/")] = False,
    table: Annotated[bool, typer.Option("--table", help="print the stored rows for docs/trainers.md")] = False,
    work_on: Annotated[str, typer.Option("--work", hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Train with every setting."""
    if work_on:
        work(work_on, folder, steps)
        return
    if table:
        print(page(record.read(RESULTS)), end="")
        return
    names = settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise typer.BadParameter(f"one of {', '.join(SETTINGS)} (got {unknown[0]})", param_hint="--settings")
    console = Console()
    found = {}
    for name in names:
        found[name] = measured(name, steps, timeout)
        show({name: found[name]}, console)
        if "failed" in found[name]:
            console.print(found[name]["failed"], markup=False, soft_wrap=True)
        elif store and all(found[name]["checks"].values()) and (rows := rows_of({name: found[name]}, steps)):
            record.append(rows, RESULTS)
    if any("failed" in each or not all(each["checks"].values()) for each in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
