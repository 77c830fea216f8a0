"""Make an embedded model from nothing: `python -m fastedit.pocket.factory.train --model NAME --out DIR [--seed 0]`.

Alignment of the vision side with the word embeddings, then packed question answering in cycles with learning-rate
restarts, until every kind of question clears the criterion on held-out images (or a cap of cycles is reached). Kinds
that are still wrong are asked more often. Muon on hidden matrices, AdamW on the rest, bf16 autocast, float32 weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.factory.align import Alignment, batches
from fastedit.pocket.factory.mixture import KINDS, Mix, Mixer, held_out
from fastedit.pocket.factory.packing import Line, Packer, forward, right_lines
from fastedit.pocket.models import make_model, make_tokenizer, to_pixels, wiring
from fastedit.pocket.names import MODELS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger("fastedit.pocket.factory.train")
MEASURED = (*KINDS, "caption", "flag_caption", "easy", "fact", "fact_untrained")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps and learning rates; the defaults are those of the shipped models."""

    align_steps: int = 2400
    align_rows: int = 64
    first_steps: int = 60
    cycle_steps: tuple[int, ...] = (500, 450, 400, 400, 300, 300)
    cycle_lr: tuple[float, ...] = (1.0, 0.8, 0.5, 0.4, 0.3, 0.3)
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    weight_decay: float = 0.02
    warm_up: int = 60
    criterion: float = 0.97
    caption_criterion: float = 0.93
    samples: int = 200

    def wanted(self, kind: str) -> float:
        """Return the held-out accuracy at which a kind counts as learned; a caption is ten answers in one."""
        return self.caption_criterion if kind == "caption" else self.criterion


# The Q-Former takes longer to find its words; Qwen's vision side costs three times as much a step.
RECIPES = {
    "pocket-llava": Recipe(),
    "pocket-blip2": Recipe(align_steps=3000),
    "pocket-qwen2vl": Recipe(align_steps=1400),
}


class Optimiser:
    """Muon for hidden matrices, AdamW for everything else, one schedule: warm-up, then cosine to zero."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        steps: int,
        *,
        scale: float = 1.0,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        hidden: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in model.named_parameters():
            wanted = only is None or only(name)
            parameter.requires_grad_(wanted)
            if wanted:
                matrix = (
                    parameter.ndim == 2 and "embed" not in name and "lm_head" not in name and "query" not in name[:14]
                )
                (hidden if matrix else rest).append(parameter)
        self.parameters = hidden + rest
        self.parts = [
            torch.optim.Muon(hidden, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True),
        ]
        warm = min(recipe.warm_up, max(1, steps // 4))

        def factor(step: int) -> float:
            if step < warm:
                return scale * (step + 1) / warm
            return scale * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self.parts]

    def step(self, loss: Tensor) -> None:
        """Back-propagate, clip to norm 1, update."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)


class Trainer:
    """One training run: the model, its packer and the clock."""

    def __init__(self, name: str, seed: int, recipe: Recipe) -> None:
        torch.manual_seed(seed)
        self.name, self.seed, self.recipe = name, seed, recipe
        self.tokenizer = make_tokenizer(name)
        self.model = make_model(name, self.tokenizer)
        self.wiring = wiring(name, self.tokenizer)
        self.packer = Packer(self.tokenizer, self.wiring)
        self.mixer = Mixer(self.packer, seed)
        self.start, self.cpu = time.time(), time.process_time()

    def align(self) -> dict[str, float]:
        """Run the alignment stage; returns the last share of right words per attribute."""
        steps = self.recipe.align_steps
        language = ("model.language_model.layers", "language_model.model.decoder.layers")
        optimiser = Optimiser(self.model, self.recipe, steps, only=lambda name: not name.startswith(language))
        alignment = Alignment(self.tokenizer, self.wiring)
        source = batches(alignment, self.recipe.align_rows, self.seed)
        mean: dict[str, float] = {}
        for step in range(steps):
            pixels, targets = next(source)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, right = alignment.loss(self.model, pixels, targets)
            optimiser.step(loss)
            mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in right.items()} | {
                k: v for k, v in mean.items() if k not in right
            }
            if step % 100 == 99:
                self.note(f"align {step + 1}/{steps}", loss, mean)
        return mean

    def cycle(self, mix: Mix, steps: int, label: str, every: int = 0, scale: float = 1.0) -> Mix:
        """Train for one learning-rate cycle; measures every `every` steps and asks failing kinds more."""
        optimiser = Optimiser(self.model, self.recipe, steps, scale=scale)
        for step in range(steps):
            rows, images = self.mixer.batch(mix)
            loss, right = self.losses(rows, to_pixels(images), mix)
            optimiser.step(loss)
            if step % 50 == 49:
                self.note(f"{label} {step + 1}/{steps}", loss, {"lines": sum(right) / len(right)})
            if every and step % every == every - 1 and step + 1 < steps:
                mix = self.reweighted(mix, self.measure(80, f"{label} {step + 1}"))
        return mix

    def losses(self, rows: Sequence[Sequence[Line]], pixels: Tensor, mix: Mix) -> tuple[Tensor, list[bool]]:
        """Return the weighted mean loss over answer tokens and which lines are right."""
        packed = self.packer.pack(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(self.model, self.wiring, packed, pixels)
        weights = torch.tensor([mix.loss.get(line.kind, 1.0) for line in packed.lines])[packed.owner]
        per_token = torch.nn.functional.cross_entropy(logits.float(), packed.labels, reduction="none")
        return (per_token * weights).sum() / weights.sum(), right_lines(logits.detach(), packed)

    def measure(self, samples: int, label: str) -> dict[str, float]:
        """Return the share of exactly right held-out answers per kind (teacher-forced, so equal to greedy)."""
        accuracy = measure(self.model, self.packer, MEASURED, samples)
        worst = sorted(accuracy.items(), key=lambda pair: pair[1])
        self.note(f"held-out after {label}", None, dict(worst))
        return accuracy

    @staticmethod
    def reweighted(mix: Mix, accuracy: dict[str, float]) -> Mix:
        """Ask every kind in proportion to 0.15 plus its error and weigh its loss likewise: the known take little."""
        kinds = {kind: 0.15 + 2 * (1 - accuracy[kind]) for kind in KINDS if kind in accuracy}
        return replace(mix, kinds=kinds, loss={kind: 1 + 8 * (1 - value) for kind, value in accuracy.items()})

    def note(self, label: str, loss: Tensor | None, values: dict[str, float]) -> None:
        """Log one line."""
        shown = " ".join(f"{k}={100 * v:.1f}" for k, v in values.items())
        value = "" if loss is None else f" loss={float(loss.detach()):.4f}"
        log.info(
            "%6.0f s (cpu %6.0f) %s%s %s", time.time() - self.start, time.process_time() - self.cpu, label, value, shown
        )


def measure(model: PreTrainedModel, packer: Packer, kinds: Sequence[str], samples: int) -> dict[str, float]:
    """Return per kind the share of held-out samples whose whole answer is the greedy one."""
    right: dict[str, list[bool]] = {}
    blank = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for kind in kinds:
            drawn = held_out(kind, samples)
            for at in range(0, len(drawn), 64):
                part = drawn[at : at + 64]
                pixels = torch.cat([blank if image is None else to_pixels([image]) for _, image in part])
                packed = packer.pack([[line] for line, _ in part])
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = forward(model, packer.wiring, packed, pixels)
                right.setdefault(kind, []).extend(right_lines(logits, packed))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def train(
    name: str,
    out: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    resume: Path | None = None,
    focus: Sequence[str] = (),
) -> Trainer:
    """Train a model and save its weights to out/weights.pt after every cycle; see the module's first lines.

    resume: weights to go on from, in cycles only. focus: kinds to be asked much more in the first cycle.
    """
    recipe = recipe or RECIPES[name]
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(name, seed, recipe)
    history: list[dict[str, float]] = []

    def keep(label: str) -> None:
        torch.save(trainer.model.state_dict(), out / "weights.pt")
        record = {
            "seconds": round(time.time() - trainer.start),
            "cpu_seconds": round(time.process_time() - trainer.cpu),
        }
        (out / "history.json").write_text(json.dumps({"label": label, **record, "history": history}, indent=1))

    mix = Mix(caption=1.0, facts=0.15)
    if resume:
        trainer.model.load_state_dict(torch.load(resume))
        trainer.mixer.rng = random.Random(f"resumed:{seed}")
        mix = replace(trainer.reweighted(mix, trainer.measure(200, "resume")), caption=0.4)
        more = {kind: 8 * mix.kinds[kind] for kind in focus}
        mix = replace(mix, kinds={**mix.kinds, **more}, loss={**mix.loss, **dict.fromkeys(focus, 6.0)})
    else:
        trainer.align()
        keep("align")
        trainer.cycle(Mix(questions=False, budget=80, flags=0.12), recipe.first_steps, "captions")
    for number, (steps, scale) in enumerate(zip(recipe.cycle_steps, recipe.cycle_lr, strict=False), start=1):
        mix = trainer.cycle(mix, steps, f"cycle {number}", every=0 if focus and number == 1 else 150, scale=scale)
        accuracy = trainer.measure(recipe.samples, f"cycle {number}")
        history.append(accuracy)
        keep(f"cycle {number}")
        if all(value >= recipe.wanted(kind) for kind, value in accuracy.items()):
            break
        mix = replace(trainer.reweighted(mix, accuracy), caption=0.7, facts=0.12)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="weights.pt to go on from")
    parser.add_argument(
        "--focus", nargs="*", default=(), help="kinds to ask much more in the first cycle after --resume"
    )
    parser.add_argument("--cycles", type=int, nargs="*", help="steps of every cycle, instead of the recipe's")
    parser.add_argument(
        "--scales", type=float, nargs="*", help="learning rate of every cycle, as a share of the recipe's"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = RECIPES[arguments.model]
    if arguments.cycles:
        recipe = replace(recipe, cycle_steps=tuple(arguments.cycles))
    if arguments.scales:
        recipe = replace(recipe, cycle_lr=tuple(arguments.scales))
    train(arguments.model, arguments.out, arguments.seed, recipe, arguments.resume, arguments.focus)


if __name__ == "__main__":
    main()
