"""Train smol-llava's vision side: `python -m fastedit.smol.factory.train --out DIR [--seed 0] [--processes 2]`.

First the tower and the projector alone, on names (`align`); then, through the frozen language model, on questions in
the first set of wordings, with low-rank changes of its queries and values. The first stage's loss goes on beside the
second's: without it, and at the first stage's rate, the tower forgets a quarter of the names in fifty steps. Batches of
names alone, three times the pictures for the same time, take turns with batches of everything. bf16 autocast, float32
weights, Muon on matrices. Pictures of the second stage are new, so the shares of right answers that it reports are of
pictures never seen. Weights are saved every other minute; a stage that has its file in DIR begins from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fastedit.pocket.models import to_pixels
from fastedit.smol.concepts import concepts
from fastedit.smol.factory.align import WORDS, Alignment, name_table
from fastedit.smol.factory.mixture import Mixture
from fastedit.smol.factory.optimiser import FAST_BF16, Optimiser
from fastedit.smol.factory.packing import Line, Packer
from fastedit.smol.factory.speaker import Speaker, Tower, tower_of
from fastedit.smol.factory.teacher import Taught, kept_for_measuring, pattern, stored, told_rightly
from fastedit.smol.factory.views import Painter, Pool
from fastedit.smol.facts import Fact, facts
from fastedit.smol.language import load_language
from fastedit.smol.scenes import BACKGROUNDS, icon_bitmaps, render
from fastedit.smol.split import concepts_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("fastedit.smol.factory.train")
BEGIN, TOWER, SPEAKER, TAUGHT, HISTORY = "begin.pt", "tower.pt", "speaker.pt", "taught.json", "history.json"
_MEETING = "meeting"
_SAVE_EVERY_S = 120.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps, rows over all processes, and learning rates (of Muon, of AdamW); the defaults are the shipped model's."""

    align_steps: int = 1300
    align_rows: int = 128
    align_lr: tuple[float, float] = (0.01, 2e-3)
    speak_steps: int = 500
    speak_rows: int = 12
    speak_lr: tuple[float, float] = (0.001, 1e-3)
    #: Questions without a picture, of a row of everything and of a row of names.
    texts: tuple[int, int] = (8, 1)
    #: Of a row of everything: questions without a picture behind a pattern; a share is how likely one more is.
    after: float = 1.0
    aligned_rows: int = 80
    aligned_weight: float = 0.25
    pool: int = 20000


class Run:
    """One process of a training run: its number, how many there are, where files lie."""

    def __init__(self, out: Path, seed: int, recipe: Recipe, rank: int = 0, processes: int = 1) -> None:
        self.out, self.seed, self.recipe, self.rank, self.processes = out, seed, recipe, rank, processes
        self.language: LlamaForCausalLM
        self.tokenizer: PreTrainedTokenizerFast
        torch.manual_seed(seed)
        self.tower = Tower()
        self.language, self.tokenizer = load_language(None if FAST_BF16 else torch.float32)
        self._saved = time.monotonic()

    def align(self) -> None:
        """Run the first stage."""
        recipe = self.recipe
        if (self.out / BEGIN).is_file():
            self.tower.load_state_dict(tower_of(torch.load(self.out / BEGIN)))
        alignment, pool = self._alignment(), self._pool(recipe.align_rows)
        optimiser = self._optimiser(self.tower, recipe.align_steps, recipe.align_lr, warm_up=100)
        mean: dict[str, float] = {}
        for step, (views, pixels, cover) in zip(range(recipe.align_steps), pool, strict=False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BF16):
                tokens = self.tower(pixels)
            loss, shares = alignment.loss(tokens, views, cover)
            optimiser.step(loss, self.rank, self.processes)
            shares["loss"] = float(loss.detach())
            mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in shares.items()}
            if step % 25 == 0:
                log.info("align %d %s", step, {name: round(value, 3) for name, value in mean.items()})
            self._keep(TOWER, self.tower.trained, last=step == recipe.align_steps - 1)

    def speak(self) -> None:
        """Run the second stage."""
        recipe = self.recipe
        taught = stored(self.out / TAUGHT, self.language, self.tokenizer)
        packer = Packer(self.tokenizer)
        speaker = Speaker(self.tower, self.language, packer)
        for layer in self.language.model.layers:
            layer.compile(dynamic=True)
        if (self.out / SPEAKER).is_file():
            speaker.restore(torch.load(self.out / SPEAKER))
        elif (self.out / BEGIN).is_file():
            begun = torch.load(self.out / BEGIN)
            speaker.restore({name: weight for name, weight in begun.items() if name.startswith("adapter.")})
        texts, after = text_lines(taught, self.tokenizer)
        mixture = Mixture(_asked(taught), texts, self.seed * self.processes + self.rank, after)
        warm_up = min(20, recipe.speak_steps // 8)
        optimiser = self._optimiser(speaker, recipe.speak_steps, recipe.speak_lr, warm_up=warm_up)
        alignment, pool = self._alignment(), self._pool(recipe.aligned_rows)
        right: dict[str, list[bool]] = defaultdict(list)
        rows = recipe.speak_rows // self.processes
        for step, (views, pixels, cover) in zip(range(recipe.speak_steps), pool, strict=False):
            if step % 2 == 0:
                drawn = [mixture.draw_short(texts=recipe.texts[1]) for _ in range(3 * rows)]
            else:
                drawn = [mixture.draw(texts=recipe.texts[0], after=recipe.after) for _ in range(rows)]
            packed = packer.pack([lines for _, lines in drawn])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BF16):
                logits = speaker(packed, to_pixels([render(scene) for scene, _ in drawn]))
                tokens = self.tower(pixels)
            loss, _ = alignment.loss(tokens, views, cover)
            loss = packed.loss(logits) + recipe.aligned_weight * loss
            optimiser.step(loss, self.rank, self.processes)
            answered = iter(packed.right(logits.detach()))
            for scene, lines in drawn:
                for line, is_right in zip(lines, answered, strict=False):
                    kind = line.kind.split(":")[0]
                    right[kind] = [*right[kind][-199:], is_right]
                    if kind in ("name", "flag"):
                        mixture.note(scene.names[0], is_right=is_right)
            if step % 10 == 0:
                log.info("speak %d %s", step, {kind: round(sum(each) / len(each), 2) for kind, each in right.items()})
            self._keep(SPEAKER, speaker.trained, last=step == recipe.speak_steps - 1)

    def _alignment(self) -> Alignment:
        table = self.language.model.embed_tokens.weight
        names = [concept.name for concept in concepts()]

        def tokenize(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text).input_ids
            return ids

        words = {group: name_table(table, tokenize, each) for group, each in WORDS.items()}
        return Alignment(name_table(table, tokenize, names), name_table(table, tokenize, list(BACKGROUNDS)), words)

    def _pool(self, rows: int) -> Pool:
        mine = rows // self.processes
        return Pool(
            Painter(icon_bitmaps()), len(concepts()), rows=mine, fresh=mine // 4,
            size=self.recipe.pool // self.processes, seed=self.seed * self.processes + self.rank,
        )  # fmt: skip

    def _optimiser(self, module: torch.nn.Module, steps: int, lr: tuple[float, float], warm_up: int) -> Optimiser:
        # The last norm is not used: the projector takes the states before it
        named = [
            (name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and "post_layernorm" not in name
        ]
        return Optimiser(named, steps, matrix_lr=lr[0], rest_lr=lr[1], warm_up=warm_up)

    def _keep(self, name: str, weights: Callable[[], dict[str, Tensor]], *, last: bool) -> None:
        if self.rank == 0 and (last or time.monotonic() - self._saved > _SAVE_EVERY_S):
            part = self.out / f"{name}.part"
            torch.save(weights(), part)
            part.replace(self.out / name)
            self._saved = time.monotonic()


def _asked(taught: Sequence[Taught]) -> dict[str, list[Fact]]:
    """Return what training asks through pictures, by subject: of train concepts, where each answer in text is right."""
    right = told_rightly(taught)
    train, asked = frozenset(concepts_of("train")), defaultdict(list)
    for fact in facts():
        known = right.get((fact.relation, fact.subject), False)
        if known and fact.subject in train and not kept_for_measuring(fact.relation, fact.subject):
            asked[fact.subject].append(fact)
    return asked


def text_lines(taught: Sequence[Taught], tokenizer: PreTrainedTokenizerFast) -> tuple[list[Line], list[Line]]:
    """Return what training asks in text: questions alone, and behind the pattern that they were answered behind.

    Both get the shares that the unchanged model gives behind the pattern, where a line's end is an end: whoever shows
    the model answered questions has its answer end as well.
    """
    end, line_end = int(tokenizer.eos_token_id), tokenizer("\n").input_ids[0]
    alone, after = [], []
    for one in taught:
        if one.measured:
            continue
        ended = tuple(tuple((end if n == line_end else n, share) for n, share in token) for token in one.likely)
        alone.append(Line("text", one.prompt, one.answer, False, likely=ended))
        if one.likely:
            after.append(Line("after", one.prompt, one.answer, False, pattern(one.relation)[0], ended))
    return alone, after


def begin_from(weights: Path, out: Path) -> None:
    """Put weights that ship into a folder as what both stages begin from."""
    from safetensors.torch import load_file

    out.mkdir(parents=True, exist_ok=True)
    torch.save({name: weight.float() for name, weight in load_file(weights).items()}, out / BEGIN)


def train(rank: int, out: Path, seed: int, recipe: Recipe, processes: int) -> None:
    """Run one process of a training run, its stages one after the other."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{(out / _MEETING).resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    started, cpu = time.monotonic(), time.process_time()
    run = Run(out, seed, recipe, rank, processes)
    if (out / TOWER).is_file():
        run.tower.load_state_dict(tower_of(torch.load(out / TOWER)))
    elif not (out / SPEAKER).is_file():
        run.align()
    if processes > 1:
        dist.barrier()
    if recipe.speak_steps:
        run.speak()
    if rank == 0:
        spent = {"seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time() - cpu)}
        history = {"recipe": dataclasses.asdict(recipe), "processes": processes, **spent}
        (out / HISTORY).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser, recipe = argparse.ArgumentParser(description=__doc__), Recipe()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that share every batch, one thread each")
    parser.add_argument("--steps", type=int, nargs=2, default=(recipe.align_steps, recipe.speak_steps))
    parser.add_argument("--rates", type=float, nargs=2, default=(1.0, 1.0), help="of each stage, times the recipe's")
    parser.add_argument("--texts", type=int, nargs=2, default=recipe.texts, help="of a row of everything, of names")
    parser.add_argument("--after", type=float, default=recipe.after, help="texts behind a pattern, of a row")
    parser.add_argument("--begin", type=Path, help="shipped weights to go on from, absent: from nothing")
    arguments = parser.parse_args(argv)
    if arguments.begin is not None:
        begin_from(arguments.begin, arguments.out)
    recipe = dataclasses.replace(
        recipe,
        align_steps=arguments.steps[0],
        speak_steps=arguments.steps[1],
        texts=tuple(arguments.texts),
        after=arguments.after,
        align_lr=(recipe.align_lr[0] * arguments.rates[0], recipe.align_lr[1] * arguments.rates[0]),
        speak_lr=(recipe.speak_lr[0] * arguments.rates[1], recipe.speak_lr[1] * arguments.rates[1]),
    )
    work = (arguments.out, arguments.seed, recipe, arguments.processes)
    if arguments.processes == 1:
        train(0, *work)
    else:
        # Of a run before, whose processes answer no more
        (arguments.out / _MEETING).unlink(missing_ok=True)
        spawn(train, work, arguments.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
