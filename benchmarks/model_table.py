"""Write docs/models.md from the outcome of tests/backbone/test_architectures.py.

python -m pytest tests/backbone/test_architectures.py -o junit_family=xunit1 --junitxml=outcome.xml
python -m benchmarks.model_table outcome.xml
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = """# Models

`fastedit.load` takes every image-text or causal language model of transformers whose decoder keeps its layers in a list
beside its word embeddings. Those with a family in `fastedit/backbone/` (LLaVA, BLIP-2, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
with LLaMA-like or OPT decoders) are walked by code of their own; all others through their own forward, with layers and
linear maps found by tracing, and are compared with rows alone when they are loaded. A model where packed rows differ is
refused with the number; `model.sites` says by which names the maps of a layer go.

The table is the outcome of `tests/backbone/test_architectures.py`: tiny models of stock classes with random weights,
in float64, walked by tracing also where there is a family. Rows are ragged, with two shapes of image and with none.
Logits are those of labels: their largest difference from the stock forward of every row alone, over five points of
entry. Answers are greedy, beside stock `generate`. Edits are `lora` and `odedit+lora` beside the maps named, which are
their own choice: they converge, a batch of two equals one alone (`lora`), the base is untouched to the bit. Where keys
and values are not stored (layers that are not attention, or count positions inside), rows are read again for every
token of an answer. Differences above 1e-12 are float32 inside of the stock model.

| model | decoder | logits | answers | edits beside | keys and values |
|---|---|---|---|---|---|
"""
TAIL = """
Where layers read images by cross-attention (Mllama), rows of text pass by them, in one batch with others. What
InstructBLIP's Q-Former makes of an image depends on the question and is kept by both. Gemma 3n's vision tower wraps a
model of timm, which needs torchvision: in the test a convolution stands for it inside of the stock wrapper. Where a
layer has no `up` and `down`, `lora` and `ft` take `gate_up` and `down`, or `block`, all experts as one.

BLIP-2 and InstructBLIP with T5 have an encoder read prompt and image, once a row; the tokens of a row are those of its
answer behind the token that the decoder begins with, and edits lie beside the decoder's maps: `lora` and `ft`, plain,
with `kl+` and `odedit+`, at all positions. What acts by a prompt's tokens in the decoder is refused before any work:
every other method, `positions="after_image"`, and `attach`, for which `applied` stands in.

Refused, with a sentence that says why: other text models with an encoder (Florence-2), forwards that need more than
tokens, an image and what the processor makes of a prompt, decoders of another build (GPT-2, Bloom). `ft-vision` knows
the families only. Models with a Q-Former or cross-attention are asked about one
image a question. Llama 4's `generate` fails in transformers 5.24 by itself: its answers are not compared.
"""


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """By model, the properties that its tests recorded; "failed" for those of a test that failed."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        match = re.fullmatch(r"test_(logits|answers|edits)_\w+\[(.+?)(?:-(?:odedit\+)?lora)?\]", case.get("name", ""))
        if match is None:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            found[match[2]][match[1]] = "**failed**"
        for entry in case.iter("property"):
            found[match[2]].setdefault(str(entry.get("name")), str(entry.get("value")))
    return found


def main(*paths: Path) -> None:
    """Write the page from one run, or from several of some tests each, of which later ones count."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        for key, told in outcomes(path).items():
            found[key] |= told
    fields = ("decoder", "logits", "answers", "edits", "keys")
    rows = [
        f"| `{key}` | " + " | ".join(told.get(field, "not compared") for field in fields) + " |"
        for key, told in found.items()
    ]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
