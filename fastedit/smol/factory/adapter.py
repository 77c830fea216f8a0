"""What the low-rank changes of the language model are worth and cost: `python -m fastedit.smol.factory.adapter`.

The shipped changes are taken at a share of their size, 0 being the unchanged language model behind the shipped tower,
and asked for names on pictures never seen and for facts in text. Facts are asked in two ways. "known" is the card's:
facts that training never asked, without a pattern, right is what the unchanged model says behind one, so that the form
of a short answer, which the changes teach, counts as well. "as_unchanged" asks both models the very same text, three
answered questions before it, and counts equal answers: what the changes do to a text prompt that needs them not;
"as_unchanged/right" counts those alone that the unchanged model answers rightly.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from fastedit.smol.factory import measure
from fastedit.smol.factory.packing import Line
from fastedit.smol.factory.teacher import Taught, teach
from fastedit.smol.facts import Fact, facts
from fastedit.smol.language import read_language
from fastedit.smol.models import ASSETS, WEIGHTS, merged, model_path
from fastedit.smol.scenes import Scene

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("fastedit.smol.factory.adapter")
SHARES = (0.0, 0.5, 0.75, 1.0)
_FACTS = 150  # each asked in two wordings


def scaled(trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return trained weights with the changes of the language model at a share of their size; others as they are."""
    return {
        name: weight.float() * share if name.startswith("adapter.") and name.endswith(".up") else weight
        for name, weight in trained.items()
    }


def equal_answers(before: Sequence[Taught], after: Sequence[Taught]) -> float:
    """Return the share of questions answered before that are answered alike after; one that does not end is not."""
    answers = {(one.relation, one.subject, one.prompt): one.answer for one in after}
    same = [answers.get((one.relation, one.subject, one.prompt)) == one.answer for one in before]
    return sum(same) / len(same)


def chosen_facts(count: int, seed: int = 0) -> list[Fact]:
    """Return so many facts by lot, known or not, in the order of all facts."""
    picked = set(random.Random(f"adapter:{seed}").sample(range(len(facts())), count))
    return [fact for number, fact in enumerate(facts()) if number in picked]


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--facts", type=int, default=_FACTS, help="asked in two wordings each")
    parser.add_argument("--renderings", type=int, default=1, help="of each concept to be named")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, packer = measure.load(model_path())
    model.requires_grad_(False)
    language, _ = read_language()
    trained = load_file(ASSETS / WEIGHTS)
    inner: Any = model.model.language_model
    asked = SimpleNamespace(model=inner, lm_head=model.lm_head)
    some = chosen_facts(arguments.facts)

    def put(share: float) -> None:
        for name, weight in merged(language, scaled(trained, share)).items():
            inner.get_parameter(name).data.copy_(weight)

    put(0.0)
    before = teach(asked, packer.tokenizer, chosen=some)
    right = [one for one in before if one.answer == one.truth]
    for share in arguments.shares:
        put(share)
        wrong: dict[str, list[str]] = {}

        def note(scene: Scene, line: Line, wrong: dict[str, list[str]] = wrong) -> None:
            wrong.setdefault(line.kind, []).append(scene.names[0])

        found = measure.shares(model, packer, list(measure.names(arguments.renderings)), note)
        found |= measure.shares(model, packer, list(measure.texts([])), note)
        after = before if share == 0.0 else teach(asked, packer.tokenizer, chosen=some)
        found["as_unchanged"] = round(equal_answers(before, after), 4)
        found["as_unchanged/right"] = round(equal_answers(right, after), 4)
        row = {"share": share, "accuracy": found, "asked_as_unchanged": len(before), "wrongly_named": wrong.get("name")}
        log.info("%s", json.dumps(row))


if __name__ == "__main__":
    main()
