"""A test file that asks a checkpoint what edits must answer: pytest and transformers run it, nothing of fastedit."""

from __future__ import annotations

from pathlib import Path

from fastedit.evaluation import normalise as _normalise

#: The name that pytest looks for.
TEST_FILE = "test_edits.py"

_PROGRAM = '''"""What edits changed and what they left alone, asked of a checkpoint: CHECKPOINT=folder pytest {name}.

Needs pytest, torch, transformers and Pillow. DEVICE=cuda asks on a GPU. Answers are greedy and compared as the VQA
challenge does. Questions that the edited model did not answer so when this was written are expected to fail.
"""

{head}
import functools
import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CONTENT = json.loads((HERE / "questions.json").read_text(encoding="utf-8"))


@functools.cache
def loaded():
    """Model and processor of the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    name = os.environ.get("CHECKPOINT")
    if not name:
        pytest.skip("CHECKPOINT names no model")
    sees = hasattr(AutoConfig.from_pretrained(name), "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_pretrained(name, dtype=os.environ.get("DTYPE", "auto")).to(os.environ.get("DEVICE", "cpu"))
    return model.eval(), AutoProcessor.from_pretrained(name)


def answer(question):
    """The greedy answer of the checkpoint."""
    import torch
    from PIL import Image

    model, processor = loaded()
    images = [Image.open(HERE / path).convert("RGB") for path in question["images"]]
    visual = {{}} if not images else {{"videos": [images]}} if question["video"] else {{"images": images}}
    tokenizer = getattr(processor, "tokenizer", processor)
    # A chat template may spell the opening token itself
    spelled = bool(tokenizer.bos_token) and question["text"].startswith(tokenizer.bos_token)
    inputs = processor(text=[question["text"]], return_tensors="pt", add_special_tokens=not spelled, **visual)
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=CONTENT["max_new_tokens"], do_sample=False)
    # Models that are fed embeddings, and encoders' decoders, give the new tokens alone
    given = inputs["input_ids"].shape[1]
    start = given if ids.shape[1] > given and torch.equal(ids[:, :given], inputs["input_ids"]) else 0
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def cases():
    """Every question; those that did not hold are marked."""
    for number, question in enumerate(CONTENT["questions"]):
        held = question["holds"]
        marks = () if held else pytest.mark.xfail(reason="did not hold when it was written", strict=False)
        yield pytest.param(question, id=f"{{number}}-{{question['score']}}-{{question['edit']}}", marks=marks)


@pytest.mark.parametrize("question", cases())
def test_edit(question):
    """The answer is the expected one."""
    given = answer(question)
    assert exact_match(given, question["expected"]), f"{{question['prompt']!r}}: {{given!r}}"


{rules}
'''


def program_text() -> str:
    """The text of the test file."""
    source = Path(_normalise.__code__.co_filename).read_text(encoding="utf-8")
    _, _, rules = source.partition("from collections import Counter\n")
    head = "import re\nimport unicodedata\nfrom collections import Counter"
    return _PROGRAM.format(name=TEST_FILE, head=head, rules=rules.strip())
