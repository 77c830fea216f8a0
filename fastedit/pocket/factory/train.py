"""Make an embedded model from nothing: `python -m fastedit.pocket.factory.train --model NAME --out DIR [--seed 0]`.

Alignment of the vision side with the word embeddings, then packed question answering in cycles with learning-rate
restarts, until every kind of question clears the criterion on held-out images (or a cap of cycles is reached). Kinds
that are still wrong are asked more often. Muon on hidden matrices, AdamW on the rest, bf16 autocast, float32 weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.factory.align import Alignment, batches
from fastedit.pocket.factory.mixture import CLAIM_KINDS, KINDS, Mix, Mixer, held_out
from fastedit.pocket.factory.optimiser import Optimiser
from fastedit.pocket.factory.packing import Line, Packer, forward, right_lines
from fastedit.pocket.factory.recipe import RECIPES, Recipe
from fastedit.pocket.models import make_model, make_tokenizer, to_pixels, wiring
from fastedit.pocket.names import MODELS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("fastedit.pocket.factory.train")
LANGUAGE = ("model.language_model.", "language_model.")
DECODERS = ("model.language_model.layers", "language_model.model.decoder.layers")
LAST = ("kinds", "loss")  # what can be said of the last cycle, by kind of question
MEASURED = (*KINDS, *CLAIM_KINDS, "caption", "flag_caption", "easy", "fact", "fact_untrained")


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
        self.trained: Callable[[str], bool] | None = None  # names of the parameters that cycles train; None: all
        self.start, self.cpu = time.time(), time.process_time()

    def align(self) -> dict[str, float]:
        """Run the alignment stage; returns the last share of right words per attribute."""
        steps = self.recipe.align_steps
        optimiser = Optimiser(self.model, self.recipe, steps, only=lambda name: not name.startswith(DECODERS))
        alignment = Alignment(self.tokenizer, self.wiring)
        source = batches(alignment, self.recipe.align_rows, self.seed)
        mean: dict[str, float] = {}
        for step in range(steps):
            pixels, targets = next(source)
            with half_precision():
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
        optimiser = Optimiser(self.model, self.recipe, steps, scale=scale, only=self.trained)
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
        with half_precision():
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
        kinds = {kind: 0.15 + 2 * (1 - accuracy[kind]) for kind in (*KINDS, *CLAIM_KINDS) if kind in accuracy}
        return replace(mix, kinds=kinds, loss={kind: 1 + 8 * (1 - value) for kind, value in accuracy.items()})

    def note(self, label: str, loss: Tensor | None, values: dict[str, float]) -> None:
        """Log one line."""
        shown = " ".join(f"{k}={100 * v:.1f}" for k, v in values.items())
        value = "" if loss is None else f" loss={float(loss.detach()):.4f}"
        log.info(
            "%6.0f s (cpu %6.0f) %s%s %s", time.time() - self.start, time.process_time() - self.cpu, label, value, shown
        )


def half_precision() -> torch.autocast:
    """Return bf16 autocast where the processor multiplies in bf16; elsewhere it is slower than float32, and off."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


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
                with half_precision():
                    logits = forward(model, packer.wiring, packed, pixels)
                right.setdefault(kind, []).extend(right_lines(logits, packed))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def commands(name: str, seed: int, recipe: Recipe, rows: int, last: Mapping[str, Mapping[str, float]]) -> str:
    """Return the command lines that go on from the model's last release, and release what comes of it."""
    cycles, scales = (" ".join(map(str, each)) for each in (recipe.cycle_steps, recipe.cycle_lr))
    further = "".join(
        f"--last-{part} {' '.join(f'{kind}={value:g}' for kind, value in by.items())} " for part, by in last.items()
    )
    return (
        f"python -m fastedit.pocket.factory.train --model {name} --seed {seed} --start LAST --cycles {cycles} "
        f"--scales {scales} --rows {rows} {further}--out DIR && python -m fastedit.pocket.factory.release "
        f"--model {name} --seed {seed} --trained DIR --out FOLDER"
    )


def continue_from(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Load the weights of a released folder; a token that it does not have keeps the embedding it was made with."""
    from fastedit.pocket.factory.release import load

    released, processor = load(folder)
    stored, before = released.state_dict(), processor.tokenizer.get_vocab()
    shared = [(i, before[token]) for token, i in tokenizer.get_vocab().items() if token in before]
    new, old = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    rows = len(before)
    for name, value in model.state_dict().items():
        # Words of an equal number may stand in another order
        if stored[name].shape[0] == rows and value.shape[0] == len(tokenizer):
            value[new] = stored[name][old]
        else:
            value.copy_(stored[name])


def train(
    name: str,
    out: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    resume: Path | None = None,
    start: Path | None = None,
    focus: Sequence[str] = (),
    rows: int = Mix.rows,
    last: Mapping[str, Mapping[str, float]] | None = None,
) -> Trainer:
    """Train a model and save its weights to out/weights.pt after every cycle; see the module's first lines.

    resume: weights to go on from, in cycles only. start: a released folder to go on from; its vocabulary may be
    another one, words are found by their text, and the vision side stays as it is. focus: kinds to be asked much more
    in the first cycle. rows: images a step. last: in the last cycle, instead of what the errors of the one before say,
    by kind the frequency ("kinds") and the weight of an answer token ("loss").
    """
    last = last or {}
    recipe = recipe or RECIPES[name]
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(name, seed, recipe)
    history: list[dict[str, float]] = []
    started = {"reproduce": commands(name, seed, recipe, rows, last)} if start else {}

    def keep(label: str) -> None:
        torch.save(trainer.model.state_dict(), out / "weights.pt")
        record = {
            "seconds": round(time.time() - trainer.start),
            "cpu_seconds": round(time.process_time() - trainer.cpu),
            **started,
        }
        (out / "history.json").write_text(json.dumps({"label": label, **record, "history": history}, indent=1))

    mix = Mix(caption=1.0, facts=0.15)
    if start:
        continue_from(trainer.model, trainer.tokenizer, start)
        trainer.trained = lambda name: name.startswith(LANGUAGE)  # it sees already, and has words to learn
        mix = Mix(caption=0.4, facts=0.2, kinds=dict.fromkeys(CLAIM_KINDS, 2.0))
    elif resume:
        trainer.model.load_state_dict(torch.load(resume))
        trainer.mixer.rng = random.Random(f"resumed:{seed}")
        mix = replace(trainer.reweighted(mix, trainer.measure(200, "resume")), caption=0.4)
        more = {kind: 8 * mix.kinds[kind] for kind in focus}
        mix = replace(mix, kinds={**mix.kinds, **more}, loss={**mix.loss, **dict.fromkeys(focus, 6.0)})
    else:
        trainer.align()
        keep("align")
        trainer.cycle(Mix(questions=False, budget=80, flags=0.12), recipe.first_steps, "captions")
    mix = replace(mix, rows=rows)
    for number, (steps, scale) in enumerate(zip(recipe.cycle_steps, recipe.cycle_lr, strict=False), start=1):
        if last and number == len(recipe.cycle_steps):
            mix = replace(mix, kinds=last.get("kinds", mix.kinds), loss=last.get("loss", mix.loss))
        mix = trainer.cycle(
            mix, steps, f"cycle {number}", every=0 if start or (focus and number == 1) else 150, scale=scale
        )
        accuracy = trainer.measure(recipe.samples, f"cycle {number}")
        history.append(accuracy)
        keep(f"cycle {number}")
        if all(value >= recipe.wanted(kind) for kind, value in accuracy.items()):
            break
        mix = replace(trainer.reweighted(mix, accuracy), caption=0.4 if start else 0.7, facts=0.15 if start else 0.12)
    return trainer


def weights(pairs: Sequence[str]) -> dict[str, float]:
    """Return KIND=NUMBER texts by kind.

    Raises:
        ValueError: a kind that nothing is asked of, or no number above zero.
    """
    found = {kind: float(number) for kind, _, number in (pair.partition("=") for pair in pairs)}
    for kind, number in found.items():
        if kind not in MEASURED or number <= 0:
            raise ValueError(f"train: a weight is KIND=NUMBER, of one of {MEASURED} and above 0 (got {kind}={number})")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="weights.pt to go on from")
    parser.add_argument("--start", type=Path, help="released folder to go on from, as --resume, with more words")
    parser.add_argument(
        "--focus", nargs="*", default=(), help="kinds to ask much more in the first cycle after --resume"
    )
    parser.add_argument("--cycles", type=int, nargs="*", help="steps of every cycle, instead of the recipe's")
    parser.add_argument("--rows", type=int, default=Mix.rows, help="images a step")
    for part in LAST:
        parser.add_argument(f"--last-{part}", nargs="*", default=(), metavar="KIND=NUMBER", help="of the last cycle")
    parser.add_argument("--samples", type=int, help="held-out samples a kind after every cycle")
    parser.add_argument(
        "--scales", type=float, nargs="*", help="learning rate of every cycle, as a share of the recipe's"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = RECIPES[arguments.model]
    if arguments.cycles:
        recipe = replace(recipe, cycle_steps=tuple(arguments.cycles))
    if arguments.samples:
        recipe = replace(recipe, samples=arguments.samples)
    if arguments.scales:
        recipe = replace(recipe, cycle_lr=tuple(arguments.scales))
    train(
        arguments.model,
        arguments.out,
        arguments.seed,
        recipe,
        arguments.resume,
        arguments.start,
        arguments.focus,
        arguments.rows,
        {part: weights(pairs) for part in LAST if (pairs := getattr(arguments, f"last_{part}"))},
    )


if __name__ == "__main__":
    main()
