"""Which facts smol-llava answers in text: `python -m fastedit.smol.factory.knowledge` writes `assets/known.json`.

A fact is known if the question is answered rightly, to the end, in two wordings, and a two-hop fact only where both of
its steps are. Records ask nothing else of the language model, so the list comes before the edit sets.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastedit.pocket.models import to_pixels
from fastedit.smol.concepts import concepts
from fastedit.smol.factory import measure
from fastedit.smol.factory.packing import Line, Packer
from fastedit.smol.facts import KNOWN, TWO_HOP, Fact, facts
from fastedit.smol.names import MODEL
from fastedit.smol.scenes import Scene, Shown, render

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

log = logging.getLogger("fastedit.smol.factory.knowledge")
WORDINGS = 2  # the first ones of a relation, all of which must be answered rightly
_LINES, _ROWS = 10, 16

#: Says of each (question in text, answer) whether the model gives the answer.
Answers = Callable[[Sequence[tuple[str, str]]], list[bool]]


def answers_of(model: LlavaForConditionalGeneration, packer: Packer) -> Answers:
    """Return what asks a model questions in text."""
    # A row has a picture, which no question in text sees.
    pixels = to_pixels([render(Scene((Shown(concepts()[0].name, "centre"),), "white", 0))])

    def ask(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        lines = [Line("text", question, answer, with_image=False) for question, answer in pairs]
        right: list[bool] = []
        for at in range(0, len(lines), _LINES * _ROWS):
            part = lines[at : at + _LINES * _ROWS]
            packed = packer.pack([part[row : row + _LINES] for row in range(0, len(part), _LINES)])
            with torch.no_grad():
                right += packed.right(measure.logits(model, packer, packed, pixels.expand(len(packed.ids), -1, -1, -1)))
        return right

    return ask


def known_facts(ask: Answers) -> list[Fact]:
    """Return the facts that are answered rightly in every one of the first wordings, in the order of all facts."""
    known = dict.fromkeys(facts())
    for wording in range(WORDINGS):
        left = list(known)
        right = ask([(fact.prompts()[wording], fact.answer) for fact in left])
        for fact, is_right in zip(left, right, strict=True):
            if not is_right:
                del known[fact]
    steps = {(fact.relation, fact.subject) for fact in known}
    return [
        fact
        for fact in known
        if not fact.two_hop or {("capital", fact.subject), (TWO_HOP[fact.relation], fact.subject)} <= steps
    ]


def write(known: Sequence[Fact], source: str, path: Path = KNOWN) -> None:
    """Write which model was asked, and subjects by relation."""
    listed: dict[str, list[str]] = {}
    for fact in known:
        listed.setdefault(fact.relation, []).append(fact.subject)
    path.write_text(json.dumps({"asked": source, "known": listed}, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    from fastedit.smol.models import model_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; absent: the shipped model")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, packer = measure.load(arguments.model or model_path())
    known = known_facts(answers_of(model, packer))
    write(known, f"{MODEL}, in text, without a pattern")
    log.info("%d of %d facts", len(known), len(facts()))


if __name__ == "__main__":
    main()
