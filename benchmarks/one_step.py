"""What one step along an edit's own gradient can say, whatever its size: how far a network that scales gradients gets.

    python benchmarks/one_step.py                  the shares, by size of the step
    python benchmarks/one_step.py --record         the same, kept under results/

KE masks the gradient of an edit entry by entry, with masks that all tokens share (arXiv 2104.08164, section 3.3), so
its change is the gradient's step and a term of rank one. Here the plain step is taken, sizes from small to large, and
an oracle takes for each edit the best of them. Records are those of the table of KE and MEND: the train split's first.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from torch import Tensor, nn

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from fastedit.methods.ke import KE, KEConfig
from fastedit.methods.meta.hypernets import Factors, Gradients
from fastedit.requests import EditRequest

MODEL, DATA, EDITS = "pocket-llava", "pocket-vqa", 100
#: Frobenius norms of an edit's change over all maps.
SIZES = (0.3, 0.6, 1.0, 1.7, 3.0, 6.0, 10.0)
STORED = record.RESULTS / "one-step.jsonl"


class Step(nn.Module):
    """In place of a network: the gradient itself, downhill, of one size for every edit."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, gradients: Gradients, _requests: Sequence[EditRequest]) -> list[Factors]:
        """Factors by site; the change of all sites together has the size."""
        pairs = list(zip(gradients.x, gradients.grad, strict=True))
        whole: Tensor = sum(((x @ x.mT) * (grad @ grad.mT)).sum((1, 2)) for x, grad in pairs)  # type: ignore[assignment]
        factor = -self.size / whole.sqrt().clamp(min=1e-30)
        return [(x.mT, grad * factor[:, None, None]) for x, grad in pairs]


@dataclass(frozen=True)
class Outcome:
    """By size, one value an edit: whether its target is said.

    tokens: of each target. common: how many pictures of the train split it is the right answer of.
    """

    said: Mapping[float, list[float]]
    tokens: list[int]
    common: list[int]

    @property
    def best(self) -> list[float]:
        """Whether any size does."""
        return [max(values) for values in zip(*self.said.values(), strict=True)]

    def shares(self, groups: Sequence[Any]) -> dict[Any, tuple[int, float]]:
        """By group, its edits and the share of them whose target some size says."""
        found: dict[Any, list[float]] = defaultdict(list)
        for group, value in zip(groups, self.best, strict=True):
            found[group].append(value)
        return {group: (len(values), sum(values) / len(values)) for group, values in sorted(found.items())}


def measure(layers: int, edits: int = EDITS, sizes: Sequence[float] = SIZES) -> Outcome:
    """Take every size on the first edits of the train split."""
    model = fastedit.load(MODEL)
    records = fastedit.read_edits(DATA, split="train")
    # The task holds its last records out
    config = KEConfig(layers=layers, valid_records=edits)
    some = [*records[edits : edits + 32], *records[:edits]]
    task = KE.task(model, config, None, some, KE.trainer(config))
    said = {}
    for size in sizes:
        task.network = Step(size)
        said[size] = task.held_out()["reliability"]
    answers = [one.prediction for one in records]
    chosen = records[:edits]
    tokens = [len(model.tokenizer(f" {one.target}", add_special_tokens=False)["input_ids"]) for one in chosen]
    return Outcome(said, tokens, [answers.count(one.target) for one in chosen])


def rows(layers: int, outcome: Outcome) -> Iterator[dict[str, Any]]:
    """A row of each size, and the oracle's."""
    base = {"model": MODEL, "data": DATA, "split": "train", "edits": len(outcome.tokens), "layers": layers}
    for size, values in [*outcome.said.items(), ("oracle", outcome.best)]:
        yield {**base, "size": size, "said": sum(values) / len(values)}
    long = ["four tokens or more" if count > 3 else "up to three" for count in outcome.tokens]
    rare = ["an answer of training" if count else "no answer of training" for count in outcome.common]
    for group, (count, share) in outcome.shares([f"{a}, {b}" for a, b in zip(long, rare, strict=True)]).items():
        yield {**base, "edits": count, "size": "oracle", "group": group, "said": share}


def main(
    layers: Annotated[list[int] | None, typer.Option(help="last layers that change, each count apart")] = None,
    edits: Annotated[int, typer.Option(min=1)] = EDITS,
    store: Annotated[bool, typer.Option("--record", help="keep the rows")] = False,
) -> None:
    """Measure and print."""
    found = [row for count in layers or (1, 2, 4) for row in rows(count, measure(count, edits))]
    lines = [json.dumps(row) for row in found]
    if store:
        STORED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
