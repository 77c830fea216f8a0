"""ODEdit's loss in real Trainers: against its definition, and beside what trainings are made with."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.data import open_image
from fastedit.losses import InvariantRisk
from fastedit.requests import Query
from tests.integrations.conftest import arguments, collate, row

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from fastedit.integrations.invariant import (
    EnvironmentCollator,
    Invariance,
    InvariantLoss,
    InvariantTrainer,
    invariant_loss,
)

ROLES = Invariance(["asked", "reworded", "other"], kept=["other"], reworded=("asked", "reworded"))


@pytest.fixture(scope="session")
def roles(pocket: EditableModel, records: list[EditRequest]) -> list[dict[str, Any]]:
    """Edits, their rewordings and what must stay, in turn."""
    examples = []
    for each in records[:4]:
        queries = {
            "asked": Query(each.prompt, each.image, each.target),
            "reworded": Query(each.rephrase or "", each.image, each.target),
            "other": Query(each.image_locality_prompt or "", each.image_locality_image, each.image_locality_answer),
        }
        examples += [row(pocket, query, environment=name) for name, query in queries.items()]
    return examples


def trained(model: Any, rows: Any, folder: Path, invariance: Invariance = ROLES, **options: Any) -> Any:
    reference = options.pop("reference_model", None)
    trainer = InvariantTrainer(
        model, arguments(folder, **{"per_device_train_batch_size": 6, **options}), train_dataset=rows,
        data_collator=collate, invariance=invariance, reference_model=reference,
    )  # fmt: skip
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_without_kept_or_rewordings_it_is_the_invariant_risk() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (5, 7), generator=generator)
    labels[:, :3] = -100
    environment = torch.tensor([0, 1, 0, 1, 1])
    ours = invariant_loss(Invariance(["a", "b", "absent"], multiplier=0.7, smoothing=1e-9), logits, labels, environment)
    expected = InvariantRisk(3, multiplier=0.7, shift=True)
    theirs = expected(logits, labels, environment)
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(ours.risks, expected.risks, equal_nan=True)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    (wanted,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(grad, wanted)


def test_the_loss_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(4, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (4, 6), generator=generator)
    environment = torch.tensor([0, 1, 2, 2])
    settings = Invariance(
        ["asked", "reworded", "other"], kept=["other"], reworded=("asked", "reworded"), weights=(1.0, 2.0, 3.0),
        multiplier=0.5, smoothing=1e-9,
    )  # fmt: skip

    def parts(scale: torch.Tensor) -> torch.Tensor:
        scores = (scale * logits[:, :-1]).log_softmax(-1)
        ce = [-scores[n].gather(-1, labels[n, 1:, None]).mean() for n in (0, 1)]
        old = reference[2:, :-1].log_softmax(-1)
        kl = (scores[2:].exp() * (scores[2:] - old)).sum(-1).mean()
        x, y = (scale * hidden[n, :-1] for n in (0, 1))
        pooled = torch.cat([hidden[0, :-1], hidden[1, :-1]])
        spread = torch.pdist(pooled).square().mean()

        def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            squared = (a[:, None] - b[None]).square().sum(-1)
            widths = spread * torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
            return sum(torch.exp(-squared / (2 * width)) for width in widths).mean()  # type: ignore[return-value]

        return torch.stack([*ce, kl, kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)])

    one = torch.ones((), dtype=torch.float64)
    value = parts(one)
    slopes = torch.autograd.functional.jacobian(parts, one)
    expected = value[:2].mean() + 2 * value[2] + 3 * value[3] + 0.5 * slopes.abs().mean().square()
    found = invariant_loss(settings, logits, labels, environment, reference=reference, hidden=hidden)
    torch.testing.assert_close(found.risks, value[:3])
    torch.testing.assert_close(found.mmd2 / value[3], torch.ones_like(value[3]))
    torch.testing.assert_close(found.loss, expected)


def test_a_trainer_learns_what_must_change_and_keeps_the_rest(
    pocket: EditableModel, stock: Any, roles: Any, tmp_path: Path
) -> None:
    # All rows in every batch, so that each log has every environment
    settled = {"max_steps": 8, "per_device_train_batch_size": 12}
    trainer = trained(stock, roles, tmp_path, reference_model=copy.deepcopy(pocket.hf), **settled)
    first, *_, last = [entry for entry in trainer.state.log_history if "penalty" in entry]
    assert {"risk/asked", "risk/reworded", "risk/other", "penalty", "mmd2"} <= set(first)
    # It begins as the reference, and comes to the targets without leaving it far behind
    assert first["risk/other"] == pytest.approx(0, abs=1e-5)
    assert last["risk/asked"] < 0.5 * first["risk/asked"]
    free = Invariance(["asked", "reworded", "other"], kept=["other"], weights=(1.0, 0.0, 0.0), multiplier=0.0)
    free_model = copy.deepcopy(pocket.hf).requires_grad_(True)
    loose = trained(free_model, roles, tmp_path, free, reference_model=copy.deepcopy(pocket.hf), **settled)
    unkept = [entry for entry in loose.state.log_history if "penalty" in entry][-1]
    assert last["risk/other"] < 0.5 * unkept["risk/other"]


def test_accumulated_steps_average_their_losses(pocket: EditableModel, roles: Any, tmp_path: Path) -> None:
    """Two halves that are alike, accumulated, are one of them."""
    doubled = [*roles[:6], *roles[:6]]
    grads = []
    for size, steps in ((6, 1), (6, 2)):
        model = copy.deepcopy(pocket.hf).requires_grad_(True)
        trainer = trained(
            model, doubled[: size * steps], tmp_path, reference_model=copy.deepcopy(pocket.hf), max_steps=1,
            gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0, learning_rate=0.1,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        grads.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    before = torch.cat([parameter.detach().flatten() for parameter in pocket.hf.parameters()])
    assert (grads[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(grads[1] - before, grads[0] - before, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"bf16": True}],
    ids=["checkpointing", "bf16"],
)
def test_it_trains_alike_with(pocket: EditableModel, roles: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    plain, other = (
        trained(
            copy.deepcopy(pocket.hf).requires_grad_(True),
            roles[:2],
            tmp_path,
            Invariance(["asked", "reworded"]),
            max_steps=3,
            **chosen,
        )
        for chosen in ({}, options)
    )
    tolerance = 0.05 if "bf16" in options else 1e-4
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(plain)[-1] < losses(plain)[0]


def test_of_a_peft_model_the_reference_is_the_model_without_adapters(
    pocket: EditableModel, roles: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pocket.hf), config)
    trainer = trained(model, roles, tmp_path, max_steps=6, learning_rate=5e-3)
    told = [entry for entry in trainer.state.log_history if "penalty" in entry]
    # Adapters that are not zero at the start are away from the reference, and come back to it
    assert told[0]["risk/other"] > 1e-2
    assert told[-1]["loss"] < told[0]["loss"]
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)


def test_sft_trainer_of_trl_has_the_loss(
    pocket: EditableModel, stock: Any, records: list[EditRequest], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class Mixed(InvariantLoss, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    def example(prompt: str | None, record: EditRequest, name: str) -> dict[str, Any]:
        asked = [{"type": "image"}, {"type": "text", "text": prompt}]
        answer = [{"type": "text", "text": record.target}]
        return {
            "prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}],
            "images": [open_image(record.image)], "environment": name,
        }  # fmt: skip

    rows = [example(each.prompt, each, "asked") for each in records[:2]]
    rows += [example(each.rephrase, each, "reworded") for each in records[:2]]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, max_length=None, disable_tqdm=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Mixed(
        stock, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=pocket.processor,
        invariance=Invariance(["asked", "reworded"], reworded=("asked", "reworded")),
    )  # fmt: skip
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "penalty" in entry]
    assert all({"risk/asked", "risk/reworded", "mmd2"} <= set(entry) for entry in told)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """DDP and FSDP2 by gloo: each process has half the rows, and all end with the same weights."""
    script = Path(__file__).with_name("distributed.py")
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(script), "ddp,fsdp2", str(tmp_path)]
    # Python finds modules beside a script, and not those of the folder that it is started in
    paths = [str(script.parents[2]), os.environ.get("PYTHONPATH", "")]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False, env=given
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for kind in ("ddp", "fsdp2"):
        assert first[kind]["sum"] == second[kind]["sum"]
        assert first[kind]["losses"][-1] < first[kind]["losses"][0]
        assert first[kind]["sharded"] == (kind == "fsdp2")


def test_what_cannot_be_is_refused(pocket: EditableModel, stock: Any, roles: Any, tmp_path: Path) -> None:
    for wrong, message in (
        ({"environments": []}, "environments must be at least one"),
        ({"environments": ["a", "a"]}, "each once"),
        ({"environments": ["a"], "kept": ["b"]}, "kept must be among the environments"),
        ({"environments": ["a"], "reworded": ("a", "c")}, r"\(got reworded='c'\)"),
        ({"environments": ["a", "b"], "kept": ["b"], "reworded": ("a", "b")}, "what is kept has no rewording"),
        ({"environments": ["a"], "warmup": 1.5}, r"warmup is a share of the steps, 0 to 1 \(got warmup=1.5\)"),
        ({"environments": ["a"], "multiplier": -1.0}, "must not be negative"),
        ({"environments": ["a"], "smoothing": 0.0}, "smoothing must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Invariance(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kept needs a reference_model, or a PEFT model"):
        InvariantTrainer(stock, arguments(tmp_path), train_dataset=roles, data_collator=collate, invariance=ROLES)
    collator = EnvironmentCollator(collate, ROLES)
    with pytest.raises(ValueError, match="every example has a column 'environment'"):
        collator([{k: v for k, v in roles[0].items() if k != "environment"}])
    with pytest.raises(ValueError, match=r"environment must be one of .*\(got environment='elsewhere'\)"):
        collator([{**roles[0], "environment": "elsewhere"}])
    logits, labels = torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="reference must be given"):
        invariant_loss(ROLES, logits, labels, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must have the shape of the logits"):
        invariant_loss(ROLES, logits, labels[:, :3], torch.zeros(2, dtype=torch.long))
