"""Prompt texts, and answers joined to them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from fastedit.backbone import load
from fastedit.backbone.prompts import PromptBuilder, chat, expand_image_token
from fastedit.backbone.synthetic.processors import made_up_tokenizer

from .conftest import cached_model


class BareProcessor:
    chat_template = None


def builder(template: str | None = None, *, opens: bool = True) -> tuple[PromptBuilder, Any]:
    tokenizer = made_up_tokenizer(640, end="</s>", opens=opens)
    return PromptBuilder(BareProcessor(), tokenizer, "<image>", template, 2), tokenizer


def test_a_chat_template_is_used_where_there_is_one() -> None:
    prompts = cached_model("random:llava-tiny").prompts
    assert prompts.text("what?", with_image=True) == "USER: <image>\nwhat? ASSISTANT:"
    assert prompts.text("what?", with_image=False) == "USER: what? ASSISTANT:"
    marked = cached_model("random:qwen2vl-tiny").prompts.text("what?", with_image=True)
    assert marked == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_else_the_image_token_and_the_raw_prompt() -> None:
    prompts, _ = builder()
    assert prompts.text("what?", with_image=True) == "<image>what?"
    assert prompts.text("what?", with_image=False) == "what?"
    assert cached_model("random:blip2-tiny").prompts.text("what?", with_image=True) == "what?"


def test_a_template_overrides_both() -> None:
    prompts, _ = builder("Question: {} Short answer:")
    assert prompts.text("what?", with_image=True) == "<image>Question: what? Short answer:"
    assert prompts.text("{}?", with_image=False) == "Question: {}? Short answer:"
    prompts, _ = builder("Q: {} {image} A:")
    assert prompts.text("what?", with_image=True) == "Q: what? <image> A:"
    assert prompts.text("what?", with_image=False) == "Q: what?  A:"
    model = load("random:llava-tiny", template="Question: {} Short answer:")
    assert model.prompts.text("what?", with_image=True) == "<image>Question: what? Short answer:"


def test_the_text_of_a_question_is_never_read_as_a_template() -> None:
    for template in ("Q: {} {image} A:", "Q: {image}{} A:", "Q: {} A:", None):
        prompts, _ = builder(template)
        for question in ("what does {image} mean?", "{}", "{} and {image}{}", "{prompt}", "{0} {{}}", "{% if %}"):
            for with_image in (True, False):
                assert question in prompts.text(question, with_image)
                assert prompts.text(question, with_image).count("<image>") == int(with_image)
    assert (
        cached_model("random:llava-tiny").prompts.text("{image} {{ 1 }}?", False) == "USER: {image} {{ 1 }}? ASSISTANT:"
    )


def test_a_builder_says_what_it_makes_prompts_by() -> None:
    chat = cached_model("random:llava-tiny")
    assert chat.prompts.template_text == chat.processor.chat_template
    assert builder("Q: {} A:")[0].template_text == "Q: {} A:"
    assert builder()[0].template_text == "{}"
    for prompts in (chat.prompts, builder()[0]):
        assert prompts.template_hash == hashlib.sha256(prompts.template_text.encode()).hexdigest()


@pytest.mark.parametrize(("template", "rule"), [("no field", "exactly once"), ("{} {}", "exactly once")])
def test_a_template_needs_one_question(template: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"template must hold {{}} {rule} \(got template="):
        load("random:llava-tiny", template=template)
    with pytest.raises(ValueError, match="at most once"):
        load("random:llava-tiny", template="{image} {image} {}")


def test_prompts_open_as_texts_do_but_never_twice() -> None:
    prompts, tokenizer = builder()
    assert prompts.ids("what is it?") == tuple(tokenizer("what is it?")["input_ids"])
    assert prompts.ids("what is it?")[0] == 1
    assert prompts.ids("<s>what is it?") == prompts.ids("what is it?")
    unopened, _ = builder(opens=False)
    assert unopened.ids("what is it?") == prompts.ids("what is it?")[1:]


def test_answers_follow_after_one_space() -> None:
    prompts, tokenizer = builder()
    red = tokenizer.convert_tokens_to_ids("Ġred")
    for answer in ("red", " red", "red \n"):
        assert prompts.answer_ids("what is it?", answer) == (red, 2)
    # After white space directly; the joined text would change the prompt's own tokens here.
    bare = tuple(tokenizer("red", add_special_tokens=False)["input_ids"])
    assert prompts.answer_ids("answer: ", "red") == (*bare, 2)
    assert prompts.answer_ids("answer:\n", "red") == (*bare, 2)


def test_the_image_token_is_expanded_in_place() -> None:
    assert expand_image_token((1, 4, 9), 4, 3) == ([1, 4, 4, 4, 9], [False, True, True, True, False])


def test_several_images_stand_inside_of_the_question_or_before_it() -> None:
    prompts, _ = builder("Q: {image}\n{} A:")
    inside = "is {image} near {image}?"
    assert prompts.text(inside, True, images=2) == "Q: \nis <image> near <image>? A:"
    assert prompts.text(inside, True, images=3) == "Q: <image><image><image>\nis {image} near {image}? A:"
    assert prompts.text("which?", True, images=2) == "Q: <image><image>\nwhich? A:"
    # One image stands where it always did, and a question without images may hold what looks like a field
    assert prompts.text("what is {image}?", True) == "Q: <image>\nwhat is {image}? A:"
    assert prompts.text(inside, False, images=2) == "Q: \nis {image} near {image}? A:"


def test_chat_templates_are_given_images_in_order() -> None:
    image, video = {"type": "image"}, {"type": "video"}

    def content(prompt: str, **options: Any) -> list[dict[str, str]]:
        (message,) = chat(prompt, **{"with_image": True} | options)
        return message["content"]

    assert content("what?") == [image, {"type": "text", "text": "what?"}]
    assert content("what?", images=2) == [image, image, {"type": "text", "text": "what?"}]
    assert content("what?", video=True) == [video, {"type": "text", "text": "what?"}]
    assert content("{image}{image} alike?", images=2) == [image, image, {"type": "text", "text": " alike?"}]
    between = [{"type": "text", "text": text} for text in ("is ", " near ", "?")]
    assert content("is {image} near {image}?", images=2) == [between[0], image, between[1], image, between[2]]
    assert content("what is {image}?") == [image, {"type": "text", "text": "what is {image}?"}]
    assert content("what?", with_image=False) == [{"type": "text", "text": "what?"}]
    prompts = cached_model("random:qwen2vl-tiny").prompts
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nis {mark} near {mark}?<|im_end|>" in prompts.text("is {image} near {image}?", True, images=2)
    assert f"user\n{mark}{mark}which?<|im_end|>" in prompts.text("which?", True, images=2)
