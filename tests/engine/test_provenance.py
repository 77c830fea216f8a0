"""Where a result came from."""

from __future__ import annotations

import hashlib

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.engine import provenance
from tests.engine.test_editing import run


def test_the_prompt_is_told_as_it_is_sent(edits: list[EditRequest]) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    told = run(model, edits[:1], steps=1).provenance["model"]
    question = "What is it?"
    assert told["template"].replace("{}", question) == model.prompts.text(question, True)
    assert told["text_template"].replace("{}", question) == model.prompts.text(question, False)
    assert told["template_source"] == "processor"
    assert told["template_sha256"] == hashlib.sha256(model.processor.chat_template.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "template", "source", "with_image"),
    [
        ("random:llava-tiny", "Q: {} A:", "given", "<image>Q: {} A:"),
        ("random:blip2-tiny", None, "none", "{}"),
    ],
)
def test_templates_of_other_sources_are_told(name: str, template: str | None, source: str, with_image: str) -> None:
    told = provenance.prompts(fastedit.load(name, template=template))
    assert (told["template"], told["template_source"]) == (with_image, source)
    assert told["template_sha256"] == hashlib.sha256((template or "{}").encode()).hexdigest()
