"""What the embedded models answer rightly before any edit, in seen and in unseen wording, per kind of question.

    python benchmarks/quality_wordings.py --model pocket-llava --samples 100

Seen are the wordings that training, pools and classifiers may see; unseen those of `fastedit.pocket.unseen`. Without
--samples the figures are those of the model cards; a model that was released before it was asked has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from fastedit import pocket
from fastedit.pocket.factory.mixture import KINDS, REWORDED
from fastedit.pocket.factory.release import accuracy, load

ASKED = (*KINDS, "caption", "fact")


def of_card(name: str) -> dict[str, float]:
    """Return the accuracies on a model's card by kind, those of unseen wordings among them."""
    measured = pocket.model_card(name)["accuracy"]
    groups = (measured["held_out"], measured.get("not_kept", {}), measured.get("unseen_wordings", {}))
    return {kind: value for group in groups for kind, value in group.items()}


def measured(name: str, samples: int) -> dict[str, float]:
    """Return the same, measured now on `samples` fresh questions a kind."""
    model, processor = load(pocket.model_path(name))
    return {kind: accuracy(model, processor, kind, samples) for each in ASKED for kind in (each, REWORDED + each)}


def table(accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table, "seen / unseen" in percent, a column a model and the means in the last row."""

    def cell(by: Mapping[str, float], kinds: Sequence[str]) -> str:
        both = []
        for prefix in ("", REWORDED):
            values = [by[prefix + kind] for kind in kinds if prefix + kind in by]
            both.append(f"{100 * sum(values) / len(values):.1f}" if values else "-")
        return " / ".join(both)

    rows = [[kind, *(cell(by, (kind,)) for by in accuracies.values())] for kind in ASKED]
    rows.append(["mean", *(cell(by, ASKED) for by in accuracies.values())])
    head = [["kind", *accuracies], ["---"] * (1 + len(accuracies))]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=pocket.MODELS, default=pocket.MODELS)
    parser.add_argument("--samples", type=int, default=0, help="measure anew, on so many questions a kind")
    arguments = parser.parse_args(argv)
    print(table({n: measured(n, arguments.samples) if arguments.samples else of_card(n) for n in arguments.model}))


if __name__ == "__main__":
    main()
