"""Edits asked again by a real Trainer while it trains pocket-llava."""

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
from fastedit.files.atomic import read_json
from tests.integrations.conftest import arguments, collate

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from fastedit.integrations.transformers import LOST, EditCallback


def trainer_of(model: Any, folder: Path, rows: Any, processor: Any, **options: Any) -> Any:
    from transformers import Trainer

    settings = arguments(folder, **{"eval_strategy": "steps", "eval_steps": 2, **options})
    return Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows[:2], data_collator=collate, processing_class=processor
    )


def test_training_on_the_edits_shows_in_the_logs(
    pocket: EditableModel, stock: Any, records: list[EditRequest], rows: Callable[[], Any], tmp_path: Path
) -> None:
    records = records[:4]
    trainer = trainer_of(
        stock, tmp_path, rows()[:4], pocket.processor, max_steps=16, eval_steps=8, per_device_train_batch_size=8
    )
    callback = EditCallback(records).add_to(trainer)
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "eval_edit_reliability" in entry]
    assert [entry["step"] for entry in told] == [8, 16]
    assert not any("[" in name or "_gap" in name for name in told[0])
    # The records' answers are what it was trained on
    assert told[-1]["eval_edit_reliability"] > 0.7
    assert told[-1]["eval_edit_lost"] == pytest.approx(1 - told[-1]["eval_edit_reliability"])
    # What the callback says is what the model says
    base = fastedit.score(pocket, None, records)
    found = fastedit.score(stock, pocket.processor, records, reference=base)
    assert callback.scores is not None
    assert callback.scores.edit_scores == found.edit_scores
    assert told[-1]["eval_edit_text_locality"] == found.scores["strict"]["text_locality"].mean


def test_what_training_unlearned_is_written_down_and_stops_it(
    pocket: EditableModel, stock: Any, records: list[EditRequest], rows: Callable[[], Any], tmp_path: Path
) -> None:
    run = fastedit.edit(pocket, records[:3], "ft", layers=2, steps=20, mode="sequential", evaluate=False)
    before = fastedit.score(pocket, None, records[:3])
    wrapped = fastedit.wrap(stock, pocket.processor)
    with fastedit.applied(wrapped, run.deltas):
        held = fastedit.score(wrapped, None, records[:3], reference=before).holds
    assert any(held)
    # A training that wrecks the model
    trainer = trainer_of(stock, tmp_path, rows(), pocket.processor, max_steps=8, learning_rate=0.3)
    callback = EditCallback(records[:3], deltas=run.deltas, stop_if=lambda scores: scores["unlearned"] > 0)
    callback.add_to(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    last = [entry for entry in trainer.state.log_history if "eval_edit_unlearned" in entry][-1]
    assert last["eval_edit_unlearned"] == pytest.approx(sum(held) / 3)
    assert [each["held_before"] for each in callback.lost] == held
    content, checked = read_json(tmp_path / LOST, "test")
    assert (content, checked) == ({"step": 2, "lost": callback.lost}, True)
    assert content["lost"][0]["prompt"] == records[0].prompt


def test_edits_of_a_ledger_are_asked_with_their_deltas(
    pocket: EditableModel, stock: Any, records: list[EditRequest], rows: Callable[[], Any], tmp_path: Path
) -> None:
    with fastedit.open_ledger(tmp_path / "ledger", pocket) as ledger:
        run = ledger.edit(records[:2], "lora", mode="single", show_progress=False, layers=2, steps=10)
        trainer = trainer_of(stock, tmp_path, rows(), pocket.processor, learning_rate=0.0)
        callback = EditCallback(ledger, every=2).add_to(trainer)
        metrics = trainer.evaluate()
        # A training that changes nothing leaves every edit what it was, each alone
        assert callback.scores is not None
        strict = [
            {name: value for name, value in each.strict.items() if not name.endswith("_kl")} for each in run.edit_scores
        ]
        assert [dict(each.strict) for each in callback.scores.edit_scores] == strict
        assert metrics["eval_edit_unlearned"] == 0.0
        callback.scores = None
        assert "eval_edit_unlearned" not in trainer.evaluate()
        assert callback.scores is None


def test_the_best_model_is_chosen_by_the_edits(
    pocket: EditableModel, stock: Any, records: list[EditRequest], rows: Callable[[], Any], tmp_path: Path
) -> None:
    trainer = trainer_of(
        stock, tmp_path, rows(), pocket.processor, metric_for_best_model="eval_edit_reliability", save_steps=2,
        save_strategy="steps", load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    EditCallback(records[:2]).add_to(trainer)
    trainer.train()
    best = max(entry["eval_edit_reliability"] for entry in trainer.state.log_history if "eval_edit_lost" in entry)
    assert trainer.state.best_metric == best


def test_what_cannot_be_is_refused(pocket: EditableModel, records: list[EditRequest], tmp_path: Path) -> None:
    run = fastedit.edit(pocket, records[:1], "ft", layers=1, steps=1, evaluate=False)
    with pytest.raises(ValueError, match=r"edits must have at least one \(got none\)"):
        EditCallback([])
    with pytest.raises(ValueError, match=r"every record has its delta \(got 1 deltas of 2 records\)"):
        EditCallback(records[:2], deltas=run.deltas)
    with pytest.raises(ValueError, match="every counts evaluations"):
        EditCallback(records, every=0)
    with pytest.raises(TypeError, match="stop_if is a function"):
        EditCallback(records, stop_if="lost")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"call add_to\(trainer\)"):
        EditCallback(records).on_train_begin(None, None, None, model=pocket.hf)
    sharded = copy.deepcopy(pocket.hf.get_output_embeddings())
    sharded.weight.ds_id = 0
    callback = EditCallback(records).add_to(type("T", (), {"callback_handler": type("H", (), {"callbacks": []})})())
    with pytest.raises(ValueError, match="whole in every process"):
        callback.on_train_begin(None, None, None, model=torch.nn.Sequential(sharded))
