"""ODEdit's risks and penalty as the loss of a Trainer: ``InvariantTrainer``, over environments that a data set names.

ODEdit (arXiv 2601.19700), equations (2), (3), (6) and (9) to (12), with λ constant:
``loss = w₁ · mean_e CE_e + w₂ · mean_e KL_e + w₃ · MMD² + λ · (mean_e |Γ_e|)²``. An environment e is whatever a column
of the data set says: a source, a template, an annotator, a role. Γ_e is the derivative of its risk by a factor on
logits (on states, for MMD²) at 1: what would gain from another scale in one environment alone is held down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.ops import mmd2, risk

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("InvariantTrainer needs a Trainer: pip install fastedit-mllm[trainers]") from error

#: Key of a batch's environments; σ² of MMD's kernels as multiples of the mean squared distance.
KEY, SCALES = "environment_index", (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Invariance:
    """Which environments there are and how they count.

    Args:
        environments: the values of the column, E of them. column: its name.
        kept: those whose answers must stay: KL(model || reference) instead of cross-entropy.
        reworded: (environment, environment): the second asks what the first does in other words; MMD² between the last
            hidden states that predict their answers.
        weights: of the mean cross-entropy, the mean KL and MMD².
        multiplier: λ. warmup: share of the steps, 0 to 1, before the penalty counts.
        smoothing: ε in |Γ| as √(Γ² + ε²) - ε, above 0.
    Raises:
        ValueError: a value that cannot be.
    """

    environments: Sequence[Hashable]
    column: str = "environment"
    kept: Sequence[Hashable] = ()
    reworded: tuple[Hashable, Hashable] | None = None
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    multiplier: float = 1.0
    warmup: float = 0.0
    smoothing: float = 1e-3

    def magnitude(self, slope: Tensor) -> Tensor:
        """|Γ|, smooth near zero: a KL starts at exactly 0, where the sign of rounding noise must not push it."""
        return torch.sqrt(slope.square() + self.smoothing**2) - self.smoothing

    def __post_init__(self) -> None:
        if not self.environments or len(set(self.environments)) < len(self.environments):
            raise ValueError(f"Invariance: environments must be at least one, each once (got {self.environments!r})")
        for name, values in (("kept", self.kept), ("reworded", self.reworded or ())):
            if unknown := [value for value in values if value not in self.environments]:
                raise ValueError(f"Invariance: {name} must be among the environments (got {name}={unknown[0]!r})")
        if self.reworded is not None and set(self.reworded) & set(self.kept):
            raise ValueError(f"Invariance: what is kept has no rewording (got reworded={self.reworded!r})")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"Invariance: warmup is a share of the steps, 0 to 1 (got warmup={self.warmup})")
        if not self.smoothing > 0:
            raise ValueError(f"Invariance: smoothing must be above 0 (got smoothing={self.smoothing})")
        if min(self.multiplier, *self.weights) < 0:
            raise ValueError(
                f"Invariance: multiplier and weights must not be negative (got multiplier={self.multiplier}, "
                f"weights={self.weights})"
            )


@dataclass(frozen=True)
class Risks:
    """What a batch's loss is made of.

    Args:
        loss: a scalar. risks: (E,) of every environment, detached, NaN where the batch has none.
        penalty, mmd2: scalars, detached.
    """

    loss: Tensor
    risks: Tensor
    penalty: Tensor
    mmd2: Tensor


def invariant_loss(
    settings: Invariance,
    logits: Tensor,
    labels: Tensor,
    environment: Tensor,
    *,
    reference: Tensor | None = None,
    hidden: Tensor | None = None,
    multiplier: float | None = None,
) -> Risks:
    """The loss of a batch; environments that it lacks count nowhere.

    Args:
        logits: (B, T, V), those at a token predict the next one. labels: (B, T) of the input, -100 where none counts.
        environment: (B,) int64, indices into ``settings.environments``.
        reference: (B, T, V) of the model before, needed with ``kept``. hidden: (B, T, d), needed with ``reworded``.
        multiplier: instead of that of the settings.
    Raises:
        ValueError: labels of another shape than the logits, or something that is needed is not there.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"InvariantTrainer: labels must have the shape of the logits without the last dimension (got labels "
            f"{tuple(labels.shape)}, logits {tuple(logits.shape)})"
        )
    for name, value, needed in (("reference", reference, settings.kept), ("hidden", hidden, settings.reworded)):
        if needed and value is None:
            raise ValueError(f"InvariantTrainer: {name} must be given for these environments (got None)")
    count = len(settings.environments)
    wanted = labels[:, 1:].flatten()
    tokens = environment[:, None].expand(labels.shape)[:, 1:].flatten().where(wanted != -100, -1)
    flat = logits[:, :-1].flatten(0, 1)
    stays = torch.tensor([name in settings.kept for name in settings.environments], device=logits.device)
    kept_token = stays[tokens.clamp(min=0)]
    value, slope = risk(flat, wanted, tokens.where(~kept_token, -1), count, kind="ce")
    if reference is not None:
        target = reference[:, :-1].flatten(0, 1).to(flat.dtype)
        kl, kl_slope = risk(flat, target, tokens.where(kept_token, -1), count, kind="reverse_kl")
        value, slope = value + kl, slope + kl_slope
    there = _present(tokens, count, value)
    distance = distance_slope = value.new_zeros(())
    both = value.new_zeros(())
    if settings.reworded is not None and hidden is not None:
        pair = [settings.environments.index(name) for name in settings.reworded]
        both = there[pair[0]] * there[pair[1]]
        distance, distance_slope = _distance(hidden[:, :-1].flatten(0, 1), tokens, pair)
    sizes = settings.magnitude(slope).sum() + settings.magnitude(distance_slope)
    penalty = (sizes / (there.sum() + both).clamp(min=1)).square()
    changed, stayed = there * ~stays, there * stays
    ce, kl = ((value * part).sum() / part.sum().clamp(min=1) for part in (changed, stayed))
    first, second, third = settings.weights
    scale = settings.multiplier if multiplier is None else multiplier
    loss = first * ce + second * kl + third * distance + scale * penalty
    return Risks(loss, value.detach().where(there > 0, math.nan), penalty.detach(), distance.detach())


def _present(tokens: Tensor, count: int, like: Tensor) -> Tensor:
    """(E,) 1 where an environment has a token, else 0."""
    marks = like.new_zeros(count + 1)
    return marks.index_fill(0, tokens.where(tokens >= 0, count), 1.0)[:-1]


def _distance(states: Tensor, tokens: Tensor, pair: Sequence[int]) -> tuple[Tensor, Tensor]:
    """MMD² between the states of two environments, kernels around their mean squared distance; and its derivative."""
    first, second = (states.index_select(0, (tokens == number).nonzero().flatten()) for number in pair)
    if not len(first) or not len(second):
        zero = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        return zero, zero
    pooled = torch.cat([first, second]).detach().to(torch.promote_types(states.dtype, torch.float32))
    # Over ordered pairs the mean squared distance is twice the variance
    scales = torch.tensor(SCALES, dtype=pooled.dtype, device=pooled.device)
    widths = (2 * pooled.var(0).sum().clamp(min=5e-5) * scales).sqrt()[None]
    ends = [torch.tensor([0, len(part)], device=states.device) for part in (first, second)]
    value, slope = mmd2(first, second, ends[0], ends[1], widths)
    return value.sum(), slope.sum()


class EnvironmentCollator:
    """A collator around another one: takes the column of environments out of examples, and adds their indices (B,).

    Args:
        collator: of everything else. settings: name the column and its values.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], settings: Invariance) -> None:
        self.collator, self.column = collator, settings.column
        self.index = {name: number for number, name in enumerate(settings.environments)}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch.

        Raises:
            ValueError: an example without the column, or with a value that is none of the environments.
        """
        indices = []
        for example in examples:
            if self.column not in example:
                raise ValueError(
                    f"InvariantTrainer: every example has a column {self.column!r} (got columns {sorted(example)})"
                )
            name = example[self.column]
            name = name.item() if isinstance(name, Tensor) else name
            if name not in self.index:
                raise ValueError(
                    f"InvariantTrainer: {self.column} must be one of {list(self.index)} (got {self.column}={name!r})"
                )
            indices.append(self.index[name])
        batch = self.collator([{k: v for k, v in each.items() if k != self.column} for each in examples])
        batch[KEY] = torch.tensor(indices)
        return batch


class InvariantLoss:
    """Mixed into a Trainer, its loss: ``class MyTrainer(InvariantLoss, SFTTrainer)``.

    Every micro-batch of every process has the loss of its own environments; gradients are averaged over accumulation
    steps and processes. The logs have ``risk/<environment>``, ``penalty`` and ``mmd2``, of the first process.

    Args:
        invariance: which environments there are. reference_model: the frozen model before training, for ``kept``; of a
            PEFT model that is the model without its adapters.
    Raises:
        ValueError: ``kept`` without anything to compare with, or a liger kernel or label smoothing beside this loss.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, invariance: Invariance, reference_model: Any = None, **kwargs: Any) -> None:
        self.invariance, self.reference_model = invariance, reference_model
        self._risks: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if invariance.kept and reference_model is None and not hasattr(trainer.model, "disable_adapter"):
            raise ValueError("InvariantTrainer: kept needs a reference_model, or a PEFT model (got neither)")
        for name in ("use_liger_kernel", "label_smoothing_factor"):
            if value := getattr(trainer.args, name, None):
                raise ValueError(f"InvariantTrainer: {name} is of another loss (got {name}={value})")
        if reference_model is not None:
            reference_model.eval().requires_grad_(False).to(trainer.args.device)
        trainer.data_collator = EnvironmentCollator(trainer.data_collator, invariance)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of environments, which no forward takes."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = self._signature_columns  # type: ignore[attr-defined]
        if self.invariance.column not in columns:
            columns.append(self.invariance.column)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, see `invariant_loss`."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", KEY)}
        settings, trainer = self.invariance, self
        asked: dict[str, Any] = {"use_cache": False}
        outputs = model(**given, **asked, output_hidden_states=settings.reworded is not None)
        state: Any = trainer.state  # type: ignore[attr-defined]
        warm = state.global_step < settings.warmup * state.max_steps
        found = invariant_loss(
            settings,
            outputs.logits,
            inputs["labels"],
            inputs[KEY],
            reference=self._reference(model, {**given, **asked}) if settings.kept else None,
            hidden=outputs.hidden_states[-1] if settings.reworded is not None else None,
            multiplier=0.0 if warm else None,
        )
        if model.training:
            self._note(found)
        return (found.loss, outputs) if return_outputs else found.loss

    @torch.no_grad()
    def _reference(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of the model before training."""
        block: AbstractContextManager[Any] = nullcontext()
        before = self.reference_model
        if before is None:
            before = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
            block = before.disable_adapter()
        with block:
            logits: Tensor = before(**inputs).logits
        return logits

    def _note(self, found: Risks) -> None:
        names = [f"risk/{name}" for name in self.invariance.environments]
        told = dict(zip(names, found.risks.tolist(), strict=True)) | {"penalty": float(found.penalty)}
        self._risks.append(told if self.invariance.reworded is None else told | {"mmd2": float(found.mmd2)})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the loss, what it was made of since the last time; environments that did not come up are left
        out."""
        if "loss" in logs and self._risks:
            for name in self._risks[-1]:
                values = [each[name] for each in self._risks if not math.isnan(each[name])]
                if values:
                    logs[name] = sum(values) / len(values)
            self._risks = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class InvariantTrainer(InvariantLoss, Trainer):  # type: ignore[misc]
    """A Trainer of transformers with the loss of `InvariantLoss`; all else is the Trainer's."""
