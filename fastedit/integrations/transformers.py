"""Edits asked again while a Trainer of transformers trains the model: ``EditCallback``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.wrapping import wrap
from fastedit.deltas import EditDelta
from fastedit.engine.acting import applied
from fastedit.engine.score import ModelScores, joined, of_record, score
from fastedit.evaluation import MUST_CHANGE, MUST_STAY
from fastedit.files.atomic import write_json
from fastedit.ledger import Ledger
from fastedit.requests import EditRequest

try:
    from transformers import TrainerCallback
except ImportError as error:  # transformers without accelerate has no trainer
    raise ImportError(
        "fastedit.integrations.transformers needs a Trainer: pip install fastedit-mllm[trainers]"
    ) from error

#: File in the output folder of the edits that do not hold at the last evaluation.
LOST = "edits_lost.json"


class EditCallback(TrainerCallback):  # type: ignore[misc]
    """At evaluations, asks the edits again and puts their scores into the logs of a Trainer.

    Made, then given a trainer by ``add_to``, whose ``log`` it calls: TensorBoard, W&B, MLflow and the trainer's history
    get the means over edits of protocol "strict", named ``eval_edit_reliability``, ``eval_edit_text_generality``,
    ``eval_edit_text_locality`` and so on, and

    * ``eval_edit_lost``: the share of edits that do not hold;
    * ``eval_edit_unlearned``: the share of edits that held when training began and do not hold now.

    They are in what ``trainer.evaluate`` returns as well, so that ``metric_for_best_model`` may name one. What must
    stay is compared with the model as it was when training began, without ``deltas``; after a resume that is the
    checkpoint, unless ``reference`` is given.

    Every process of a distributed training asks all edits, so that all stop together. The model must be whole in each
    (DDP, ZeRO-1 and ZeRO-2, not FSDP or ZeRO-3).

    Args:
        edits: records, whose edits are in the weights or are to be learnt; or a ledger, whose deltas act while it is
            asked, on the weights as they are then.
        deltas: of records, which act while they are asked: of a sequence or routed together, else each with its record.
        processor: of the model; None is that of the trainer (``processing_class``).
        every: ask at every so many evaluations.
        stop_if: training stops where this is true of the scores by name ("reliability", ..., "lost", "unlearned").
        reference: scores of the records by the model before training.
        max_new_tokens: longest generated answer.
    Attributes:
        scores: of the last time that was asked (``fastedit.ModelScores``); None before.
        lost: its edits that do not hold, as mappings with "number", "id", "prompt", "target", "answer" and
            "held_before"; also in ``edits_lost.json`` in the trainer's output folder.
    Raises:
        ValueError, TypeError: no edits, deltas of another number, or a setting that cannot be.
    """

    scores: ModelScores | None
    lost: list[dict[str, Any]]

    def __init__(
        self,
        edits: Sequence[EditRequest] | Ledger,
        *,
        deltas: Sequence[EditDelta] | None = None,
        processor: Any = None,
        every: int = 1,
        stop_if: Callable[[Mapping[str, float]], bool] | None = None,
        reference: ModelScores | None = None,
        max_new_tokens: int = 48,
    ) -> None:
        self._artifacts: Mapping[str, Any] = {}
        if isinstance(edits, Ledger):
            edits, deltas = self._of_ledger(edits, deltas)
        else:
            self._alone = deltas is not None and _act_alone(deltas)
        if not edits:
            raise ValueError("EditCallback: edits must have at least one (got none)")
        if deltas is not None and len(deltas) != len(edits):
            raise ValueError(
                f"EditCallback: every record has its delta (got {len(deltas)} deltas of {len(edits)} records)"
            )
        if every < 1:
            raise ValueError(f"EditCallback: every counts evaluations, from 1 up (got every={every})")
        if stop_if is not None and not callable(stop_if):
            raise TypeError(f"EditCallback: stop_if is a function of the scores by name (got {stop_if!r:.80})")
        self._records, self._deltas, self._processor = list(edits), deltas, processor
        self._every, self._stop_if, self._max_new_tokens = every, stop_if, max_new_tokens
        self._reference = reference
        self._held: list[bool] | None = None
        self._evaluations = 0
        self._trainer: Any = None
        self.scores, self.lost = None, []

    def _of_ledger(self, ledger: Ledger, deltas: object) -> tuple[list[EditRequest], Sequence[EditDelta]]:
        """The edits that act now, and their deltas."""
        if deltas is not None:
            raise ValueError("EditCallback: a ledger has its deltas (got deltas as well)")
        state = ledger.state()
        self._alone = state.act_alone and len(state) > 1
        if ledger.model is not None:
            self._artifacts = ledger.model.artifacts
        return state.requests(), state.acting()

    def add_to(self, trainer: Any) -> EditCallback:
        """Let a trainer call this, before its other callbacks: those may look at the scores. Returns itself."""
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the first time: how the model answers before it is trained."""
        self._begin(**kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Ask the edits, log their scores, write down what was lost, and perhaps stop."""
        self._evaluations += 1
        if (self._evaluations - 1) % self._every:
            return
        held = self._begin(**kwargs)
        self.scores = self._asked(self._model(**kwargs))
        self.lost = [
            {
                "number": number,
                "id": record.id,
                "prompt": record.prompt,
                "target": record.target,
                "answer": self.scores.edit_scores[number].answers[0]["after"],
                "held_before": held[number],
            }
            for number, record in enumerate(self._records)
            if not self.scores.holds[number]
        ]
        strict = self.scores.scores["strict"]
        told = {name: strict[name].mean for name in (*MUST_CHANGE, *MUST_STAY, "blindness") if name in strict}
        told["lost"] = len(self.lost) / len(self._records)
        told["unlearned"] = sum(row["held_before"] for row in self.lost) / len(self._records)
        logs = {f"eval_edit_{name}": value for name, value in told.items()}
        if metrics is not None:
            metrics.update(logs)
        self._trainer.log(dict(logs))
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_json(Path(args.output_dir) / LOST, {"step": state.global_step, "lost": self.lost})
        if self._stop_if is not None and self._stop_if(told):
            control.should_training_stop = True

    def _begin(self, **kwargs: Any) -> list[bool]:
        """Which edits held before training; asked once."""
        if self._trainer is None:
            raise ValueError("EditCallback: it logs by a trainer; call add_to(trainer) (got none)")
        if self._held is None:
            model = self._model(**kwargs)
            if self._reference is None:
                self._reference = score(model, None, self._records, max_new_tokens=self._max_new_tokens)
            self._held = (self._reference if self._deltas is None else self._asked(model)).holds
            model.forget()
        return self._held

    def _model(self, model: Any = None, processing_class: Any = None, **_kwargs: Any) -> EditableModel:
        """The model in training as one that can be asked."""
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
                raise ValueError(f"EditCallback: a model that is asked is whole in every process (got {name} sharded)")
        model = getattr(model, "_orig_mod", model)
        editable = wrap(model, processing_class if self._processor is None else self._processor)
        editable.artifacts.update(self._artifacts)
        return editable

    def _asked(self, model: EditableModel) -> ModelScores:
        """The scores of all records by a model, with the deltas where there are any."""
        options: dict[str, Any] = {"reference": self._reference, "max_new_tokens": self._max_new_tokens}
        if self._deltas is None:
            return score(model, None, self._records, **options)
        if not self._alone:
            with applied(model, self._deltas, check_model=False):
                return score(model, None, self._records, **options)
        assert self._reference is not None
        parts = []
        for number, delta in enumerate(self._deltas):
            alone = of_record(self._reference, self._records, number)
            with applied(model, delta, check_model=False, check_sequence=False):
                parts.append(score(model, None, [self._records[number]], **{**options, "reference": alone}))
        return joined(parts, self._records)


def _act_alone(deltas: Sequence[EditDelta]) -> bool:
    """Whether deltas were fitted each alone, so that each answers for its own record."""
    return len(deltas) > 1 and "router" not in deltas[0].spec.options and not any(each.fitted_on for each in deltas)
