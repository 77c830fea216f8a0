"""Chat templates that do not end, or fill the memory, are stopped; others cost nothing."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from fastedit.backbone.prompts import chat
from fastedit.backbone.rendering import _WATCH, TemplateTooLong, _within, check_template_ends, rendered

from .conftest import cached_model

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
TIME, MEMORY = (
    r"^load: the chat template must end within 2 s \(got",
    r"^load: the chat template must need less than 256 MiB",
)


def processor(template: str) -> Any:
    tokenizer = cached_model("random:llava-tiny").tokenizer

    class Processor:
        chat_template = template

        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            return tokenizer.apply_chat_template(messages, chat_template=template, **options)

    return Processor()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, TIME),
        (CALLS, TIME),
        ("{{ 10 ** (10 ** 10) }}", TIME),
        (DOUBLING, MEMORY),
        ("{{ 'a' * 10 ** 12 }}", MEMORY),
    ],
)
def test_a_template_that_does_not_end_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_template_ends(template, [chat("what?", with_image=True)], {"bos_token": "<s>"})


def test_templates_that_end_are_left_to_those_who_render_them() -> None:
    for template in (
        "{{ messages[0].content[1].text }}",
        "{% generation %}a{% endgeneration %}",
        "{% for %}",
        "{{ a.b.c }}",
    ):
        check_template_ends(template, [chat("what?", with_image=True)], {})


@pytest.mark.parametrize("template", [LOOP, CALLS])
def test_a_template_that_loops_on_some_question_is_stopped_there(template: str) -> None:
    some = processor("{% if 'zebra' in messages[0].content[0].text %}" + template + "{% endif %}{{ messages[0].role }}")
    assert rendered(some, chat("a horse?", with_image=False), "") == "user"
    with pytest.raises(ValueError, match=r"^the chat template must end within 2 s"):
        rendered(some, chat("a zebra?", with_image=False), "")
    assert rendered(some, chat("a horse?", with_image=False), "") == "user"


def test_templates_that_fail_or_talk_too_much_are_told() -> None:
    for template, reason in (("{{ a.b.c }}", "UndefinedError"), ("{% for %}", "TemplateSyntaxError")):
        with pytest.raises(ValueError, match=rf"^the chat template must render a question \(got {reason}"):
            rendered(processor(template), chat("what?", with_image=False), template)
    with pytest.raises(ValueError, match=r"a prompt of at most 1048576 characters \(got 2000000 characters\)"):
        rendered(processor("{{ 'a' * 2000000 }}"), chat("what?", with_image=False), "")


def test_threads_are_watched_apart_and_nothing_comes_late() -> None:
    ended: list[str] = []

    def work(steps: int) -> None:
        try:
            with _within(0.3):
                end = time.thread_time() + steps * 0.1
                while time.thread_time() < end:
                    pass
            ended.append("done")
        except TemplateTooLong:
            ended.append("stopped")
        # An error that was on its way would come here
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    threads = [threading.Thread(target=work, args=(steps,)) for steps in (0, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["done", "stopped"]
    assert not _WATCH._ends


def test_prompts_start_no_thread_and_no_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = cached_model("random:llava-tiny").prompts
    prompts.text("what?", with_image=True)
    thread = _WATCH._thread
    monkeypatch.setattr("subprocess.run", lambda *_args, **_options: pytest.fail("a process was started"))
    for number in range(20):
        assert prompts.text(f"what is {number}?", with_image=True).endswith(f"what is {number}? ASSISTANT:")
    assert _WATCH._thread is thread
