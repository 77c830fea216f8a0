"""Which records the shipped model can be asked: `python -m fastedit.smol.factory.sets --seconds 600`.

Every unedited question of a record must be answered rightly, else its number is left out. Work goes on where the last
call ended, so that the file `assets/skipped.json` always says how far numbers were looked at.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastedit.pocket.edits import HARD_EVERY, Record
from fastedit.pocket.models import to_pixels
from fastedit.smol.edits import SIZE, draw
from fastedit.smol.factory import measure
from fastedit.smol.factory.packing import Line, Packer
from fastedit.smol.names import SETS
from fastedit.smol.requests import Checked, read_checked, write_checked
from fastedit.smol.scenes import Scene, render

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

log = logging.getLogger("fastedit.smol.factory.sets")
_BATCH = 24  # records looked at together
_ROWS = 16

#: Says of each record which of its further questions are not answered rightly; None where one of the others is not.
Answers = Callable[[Sequence[Record[Scene]]], list[frozenset[int] | None]]


def answers_of(model: LlavaForConditionalGeneration, packer: Packer) -> Answers:
    """Return what asks a model the unedited questions of records.

    Questions are asked in three stages, of the records alone that all before were answered rightly of: those about the
    first picture and those without one, those about other pictures, and the further ones, which may be wrong.
    """

    def wrong_of(lines: Mapping[tuple[int, Scene], list[Line]]) -> set[str]:
        wrong: set[str] = set()
        # Rows of one length waste no padding.
        keys = sorted(lines, key=lambda key: sum(len(line.question) + len(line.answer) for line in lines[key]))
        for at in range(0, len(keys), _ROWS):
            part = keys[at : at + _ROWS]
            packed = packer.pack([lines[key] for key in part])
            pixels = to_pixels([render(scene) for _, scene in part])
            with torch.no_grad():
                right = packed.right(measure.logits(model, packer, packed, pixels))
            wrong |= {line.kind for line, is_right in zip(packed.lines, right, strict=True) if not is_right}
        return wrong

    def ask(drawn: Sequence[Record[Scene]]) -> list[frozenset[int] | None]:
        stages: list[dict[tuple[int, Scene], list[Line]]] = [{}, {}, {}]
        for place, record in enumerate(drawn):
            for number, asked in [*((None, one) for one in record.unedited()), *enumerate(record.further)]:
                line = Line(f"{place}:{'' if number is None else number}", asked.prompt, str(asked.answer),
                            asked.scene is not None)  # fmt: skip
                # A question without a picture goes with the first picture, which its mask hides.
                scene = asked.scene or record.scene
                stage = 2 if number is not None else 0 if scene == record.scene else 1
                stages[stage].setdefault((place, scene), []).append(line)
        wrong: list[set[str]] = [set() for _ in drawn]
        for lines in stages:
            for kind in wrong_of({key: each for key, each in lines.items() if "" not in wrong[key[0]]}):
                whose, which = kind.split(":")
                wrong[int(whose)].add(which)
        return [None if "" in each else frozenset(map(int, each)) for each in wrong]

    return ask


def look_on(name: str, split: str, checked: Checked, ask: Answers, *, size: int) -> Iterator[Checked]:
    """Yield `checked` with further numbers looked at, batch by batch, up to a whole set of `size` records.

    Numbers whose kind, hard or not, is complete are not asked: no set takes them.
    """
    skipped, unasked, number = list(checked.skipped), dict(checked.unasked), checked.numbers
    left = {True: size // HARD_EVERY, False: size - size // HARD_EVERY}
    for earlier in range(number):
        if earlier not in checked.skipped and draw(name, split, earlier) is not None:
            left[earlier % HARD_EVERY == 0] -= 1
    while any(count > 0 for count in left.values()):
        drawn: list[Record[Scene]] = []
        while len(drawn) < _BATCH:
            record = draw(name, split, number) if left[number % HARD_EVERY == 0] > 0 else None
            drawn += [record] if record else []
            number += 1
        for record, wrong in zip(drawn, ask(drawn), strict=True):
            if wrong is None:
                skipped.append(record.number)
                continue
            left[record.hard] -= 1
            if wrong:
                unasked[record.number] = tuple(sorted(wrong))
        log.info("%s %s: %d numbers, %d left out", name, split, number, len(skipped))
        yield Checked(number, tuple(skipped), dict(unasked))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    from fastedit.smol.models import model_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; absent: the shipped model")
    parser.add_argument("--only", action="append", help="icon-vqa/eval; absent: all sets, eval first")
    parser.add_argument("--size", type=int, help="records that are enough of each; absent: whole sets")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    end = time.monotonic() + arguments.seconds
    model: Any
    model, packer = measure.load(arguments.model or model_path())
    ask = answers_of(model, packer)
    for split in ("eval", "train"):
        for name in SETS:
            if arguments.only and f"{name}/{split}" not in arguments.only:
                continue
            size = min(SIZE[split], arguments.size or SIZE[split])
            for checked in look_on(name, split, read_checked(name, split), ask, size=size):
                write_checked(name, split, checked)
                if time.monotonic() > end:
                    return


if __name__ == "__main__":
    main()
