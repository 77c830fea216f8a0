"""Every way of calling the stock model while edits are attached to it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.backbone.vision import watched
from tests.backbone.architectures import LayoutProcessor, make_stock
from tests.engine.conftest import make_edits
from tests.engine.stock_calls import (
    NEW,
    edits,
    engine_logits,
    fitted,
    inputs,
    load,
    questions,
    stock_answers,
    stock_logits,
    texts,
)

LLAVA = "random:llava-tiny"


@pytest.fixture(scope="module")
def llava() -> EditableModel:
    return load(LLAVA)


def edited(name: str, method: str) -> list[Any]:
    """Deltas that act together: all of a routed method, else the first."""
    deltas = fitted(name, method)
    return deltas if "router" in deltas[0].spec.options else deltas[:1]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("method", ["lora", "grace", "ldke", "ft-vision"])
@pytest.mark.parametrize("name", [LLAVA, "random:blip2-tiny", "random:qwen2vl-tiny"])
@torch.no_grad()
def test_a_forward_with_labels_has_the_engines_loss_and_logits(name: str, method: str, left: bool) -> None:
    model, deltas = load(name), edited(name, method)
    asked = [Query(query.prompt, query.image, "seven red cats") for query in questions(model)]
    encoded = model.encode(asked, answers=True)
    targets = encoded.labels[encoded.label_mask]
    # The end token is a label of the engine's and no input, so no label of the stock model's
    counted = torch.cat([torch.arange(n) < n - 1 for n in encoded.label_mask.sum(1).tolist()])

    given = inputs(model, asked, left=left, answers=True)
    plain = model.hf(**given)
    with fastedit.applied(model, deltas):
        state = packed_start(model, encoded)
        if model.watching:
            state = watched(model, state, encoded)
        for holder in model.holders:
            state = packed_prefix(model, state, *holder.point)
            holder.route(state)
        expected = model.head(packed_tail(model, state))
    with fastedit.attached(model, deltas) as hf:
        whole = hf(**given)
    labelled = functional.pad(given["labels"], (0, 1), value=-100)[:, 1:] != -100
    logits = whole.logits[labelled]
    torch.testing.assert_close(logits, expected[counted], rtol=0, atol=2e-4 if left else 1e-5)
    loss = functional.cross_entropy(expected[counted], targets[counted])
    torch.testing.assert_close(whole.loss, loss, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert not torch.equal(whole.loss, plain.loss)


@pytest.mark.parametrize("name", [LLAVA, "random:blip2-tiny", "random:qwen2vl-tiny"])
@torch.no_grad()
def test_edits_of_the_vision_side_act_on_the_images_of_the_rows_that_name_them(name: str) -> None:
    model, deltas = load(name), fitted(name, "ft-vision")
    asked = questions(model)
    given = inputs(model, asked, left=True)
    ids = [0, 1, -1, 1, *[-1] * (len(asked) - 4)]
    plain, base = model.hf(**given).logits, stock_answers(model, model.hf, asked)
    each, answers = [], []
    for delta in deltas:
        with fastedit.attached(model, delta) as hf:
            each.append(hf(**given).logits)
            answers.append(stock_answers(model, hf, asked))
            assert torch.equal(hf(**given, edit_ids=[-1] * len(asked)).logits, plain)
            assert stock_answers(model, hf, asked, edit_ids=[-1] * len(asked)) == base
    with fastedit.attached(model, deltas) as hf:
        chosen = hf(**given, edit_ids=ids).logits
        assert stock_answers(model, hf, asked, edit_ids=ids) == [
            base[row] if edit < 0 else answers[edit][row] for row, edit in enumerate(ids)
        ]
        with pytest.raises(ValueError, match="act on the rows that name them"):
            stock_answers(model, hf, asked)
    for row, edit in enumerate(ids):
        if edit < 0:
            assert torch.equal(chosen[row], plain[row])
        else:
            torch.testing.assert_close(chosen[row], each[edit][row], rtol=0, atol=1e-12)


@torch.no_grad()
def by_hand(model: EditableModel, delta: Any, hf: Any) -> Any:
    """A copy of the stock model whose weights are changed."""
    made = copy.deepcopy(hf)
    for site in delta.spec.sites:
        weight, place = made.get_submodule(site.module_path).weight, f"{site.layer}.{site.name}:"
        if delta.spec.kind == "full":
            weight += delta.tensors[f"{place}delta"].to(weight)
        else:
            down, up = (delta.tensors[place + part].to(weight) for part in ("down", "up"))
            weight += float(delta.spec.options["scale"]) * (down @ up).T
    return made


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("method", ["ft", "lora"])
@pytest.mark.parametrize("name", [LLAVA, "random:qwen2vl-tiny"])
def test_sampling_is_that_of_a_model_whose_weights_were_changed(
    name: str, method: str, options: dict[str, Any]
) -> None:
    model, deltas = load(name), fitted(name, method)[:1]
    asked = questions(model)
    written = by_hand(model, deltas[0], model.hf)
    drawn = []
    for edit in (False, True):
        with fastedit.attached(model, deltas) as hf:
            torch.manual_seed(3)
            drawn.append(stock_answers(model, hf if edit else written, asked, do_sample=True, top_k=20, **options))
    assert drawn[0] == drawn[1]
    torch.manual_seed(3)
    assert stock_answers(model, model.hf, asked, do_sample=True, top_k=20, **options) != drawn[0]


@pytest.mark.parametrize("method", ["ldke", "wise", "grace", "tpatcher"])
def test_beams_of_rows_that_are_routed_apart(llava: EditableModel, method: str) -> None:
    deltas, asked = edited(LLAVA, method), questions(llava)
    with fastedit.attached(llava, deltas) as hf:
        together = stock_answers(llava, hf, asked, num_beams=3)
        assert together == [stock_answers(llava, hf, [query], num_beams=3)[0] for query in asked]
    assert together != stock_answers(llava, llava.hf, asked, num_beams=3)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}, {"assistant_model": True}], ids=str
)
def test_assisted_generation_is_refused(llava: EditableModel, options: dict[str, Any]) -> None:
    if "assistant_model" in options:
        options = {"assistant_model": llava.hf}
    with fastedit.attached(llava, edited(LLAVA, "ft")) as hf, pytest.raises(ValueError, match="without assistance"):
        stock_answers(llava, hf, questions(llava)[:1], **options)


@pytest.mark.parametrize("name", [LLAVA, "random:blip2-tiny"])
def test_arguments_may_be_given_by_position(name: str) -> None:
    model, deltas = load(name), edited(name, "grace")
    asked = questions(model)
    given = inputs(model, asked, left=True)
    first = "pixel_values" if "blip2" in name else "input_ids"
    with fastedit.attached(model, deltas) as hf, torch.no_grad():
        expected = hf(**given).logits
        head = given.pop(first)
        assert torch.equal(hf(head, **given).logits, expected)
        ids = hf.generate(head, **given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert texts(model, ids[:, -NEW:]) == stock_answers(model, hf, asked)


@pytest.mark.parametrize("method", ["grace", "tpatcher"])
@torch.no_grad()
def test_a_kept_cache_is_gone_on_with(llava: EditableModel, method: str) -> None:
    """By hand token by token, by generate, and behind a place that it was cropped to."""
    settings: dict[str, Any] = {"positions": "answer"} if method == "tpatcher" else {}
    deltas, asked = fitted(LLAVA, method, **settings), questions(llava)
    deltas = deltas if method == "grace" else deltas[:1]
    given = inputs(llava, asked, left=True)
    ends = {"eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    with fastedit.attached(llava, deltas) as hf:
        whole = hf.generate(**given, max_new_tokens=NEW, **ends)
        output, tokens, mask = hf(**given, use_cache=True), [], given["attention_mask"]
        cache = output.past_key_values
        for step in range(NEW):
            tokens.append(output.logits[:, -1:].argmax(-1))
            if step == 2:
                # As if the last had been a guess
                cache.crop(-1)
                mask, tokens = mask[:, :-1], tokens[:-1]
            again = tokens[-1]
            mask = torch.cat([mask, torch.ones(len(asked), 1, dtype=mask.dtype)], 1)
            output = hf(input_ids=again, attention_mask=mask, past_key_values=cache, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(tokens, 1), whole[:, -NEW:])
        begun = hf.generate(**given, max_new_tokens=2, return_dict_in_generate=True, **ends)
        ids = begun.sequences
        mask = torch.cat([given["attention_mask"], torch.ones(len(asked), 2, dtype=torch.long)], 1)
        behind = hf.generate(
            input_ids=ids, attention_mask=mask, past_key_values=begun.past_key_values, max_new_tokens=NEW - 2, **ends
        )
        assert torch.equal(behind, whole)


def test_inference_mode_and_training_mode(llava: EditableModel) -> None:
    deltas, asked = edited(LLAVA, "grace"), questions(llava)
    with fastedit.attached(llava, deltas) as hf:
        expected = stock_answers(llava, hf, asked)
        with torch.inference_mode():
            assert stock_answers(llava, hf, asked) == expected
        llava.hf.train()
        try:
            assert stock_answers(llava, hf, asked) == expected
            assert all(module.training for module in llava.hf.modules())
        finally:
            llava.hf.eval()
    with torch.inference_mode(), fastedit.attached(llava, deltas) as hf:
        assert stock_answers(llava, hf, asked) == expected


def test_a_call_that_named_its_edits_leaves_nothing_to_the_next(llava: EditableModel) -> None:
    deltas, asked = fitted(LLAVA, "ft")[:1], questions(llava)
    with fastedit.attached(llava, deltas) as hf:
        expected = stock_answers(llava, hf, asked)
        for call in (lambda: llava.generate(asked, max_new_tokens=NEW), lambda: stock_answers(llava, hf, asked)):
            assert stock_answers(llava, hf, asked[:2], edit_ids=[0, -1])[0] == expected[0]
            assert call() == expected


def test_pipelines_of_images_and_text_answer_edited() -> None:
    from transformers import pipeline

    model, deltas = load("pocket-llava", "float32"), fitted("pocket-llava", "grace", "float32")
    asked = questions(model)[:4]
    pipe = pipeline("image-text-to-text", model=model.hf, processor=model.processor)

    def answers() -> list[str]:
        found = []
        for query in asked:
            content = [{"type": "image", "image": query.image}, {"type": "text", "text": query.prompt}]
            output = pipe(
                text=[{"role": "user", "content": content}],
                max_new_tokens=NEW,
                do_sample=False,
                return_full_text=False,
            )
            found.append(output[0]["generated_text"].strip())
        return found

    base = answers()
    assert base == model.generate(asked, max_new_tokens=NEW)
    with fastedit.applied(model, deltas):
        expected = model.generate(asked, max_new_tokens=NEW)
    with fastedit.attached(model.hf, deltas, model.processor):
        assert answers() == expected != base
    assert answers() == base


def test_pipelines_of_text_answer_edited() -> None:
    from transformers import pipeline

    hf = make_stock("qwen3")
    tokenizer = LayoutProcessor("qwen3", hf).tokenizer
    model = fastedit.wrap(hf, tokenizer)
    request = fastedit.EditRequest("what is it ?", "red", locality_prompt="how many ?", locality_answer="two")
    delta = fastedit.edit(model, [request], "lora", lr=2e-2, evaluate=False, show_progress=False).deltas[0]
    pipe = pipeline("text-generation", model=hf, tokenizer=tokenizer)

    def answer() -> str:
        output = pipe(request.prompt, max_new_tokens=NEW, do_sample=False, return_full_text=False)
        return str(output[0]["generated_text"]).strip()

    base = answer()
    assert base == model.answer(None, request.prompt, max_new_tokens=NEW)
    with fastedit.applied(model, delta):
        expected = model.answer(None, request.prompt, max_new_tokens=NEW)
    with fastedit.attached(hf, delta, tokenizer):
        assert answer() == expected != base
    assert answer() == base


#: Outputs that a trainer cannot gather.
UNREAD = ["past_key_values", "cache", "image_outputs", "image_hidden_states"]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Questions with answers, each a row of its own."""

    def __init__(self, model: EditableModel) -> None:
        asked = [Query(query.prompt, query.image, "seven red cats") for query in questions(model) if query.image]
        given = inputs(model, asked, left=False, answers=True)
        self.rows = [{name: tensor[row] for name, tensor in given.items()} for row in range(len(asked))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]


def test_a_trainer_evaluates_and_predicts_edited(llava: EditableModel, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    hf = copy.deepcopy(llava.hf)
    model = fastedit.wrap(hf, llava.processor)
    data, deltas = Rows(model), edited(LLAVA, "grace")
    options = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(hf, options, eval_dataset=data)
    plain = trainer.evaluate()["eval_loss"]
    losses = []
    with torch.no_grad(), fastedit.attached(hf, deltas, llava.processor) as edited_hf:
        for start in range(0, len(data), 2):
            batch = torch.utils.data.default_collate([data[row] for row in range(start, min(start + 2, len(data)))])
            losses += [float(edited_hf(**batch).loss)] * len(batch["input_ids"])
        found = trainer.evaluate()["eval_loss"]
        predicted = trainer.predict(data, ignore_keys=UNREAD)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert abs(found - plain) > 1e-2
    assert predicted.metrics["test_loss"] == pytest.approx(found)
    assert trainer.evaluate()["eval_loss"] == plain


def test_threads_name_their_edits_in_one_attachment(llava: EditableModel) -> None:
    deltas, asked = fitted(LLAVA, "ft"), questions(llava)
    with fastedit.attached(llava, deltas) as hf:
        expected = {
            number: stock_answers(llava, hf, asked, edit_ids=[number, -1, number, -1, number, number])
            for number in (0, 1, -1)
        }
    handle = fastedit.attach(llava, deltas, select=lambda given: [-1] * len(given["input_ids"]))
    wrong: list[int] = []

    def serve(number: int) -> None:
        for _ in range(2):
            named = {} if number < 0 else {"edit_ids": [number, -1, number, -1, number, number]}
            if stock_answers(llava, llava.hf, asked, **named) != expected[number]:
                wrong.append(number)

    try:
        run_all([lambda number=number: serve(number) for number in (0, 1, -1)])
    finally:
        handle.detach()
    assert wrong == []


def run_all(jobs: list[Callable[[], None]]) -> None:
    """Run jobs in threads of their own."""
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Gate:
    """Stops a generation behind its second token until it is let go on."""

    def __init__(self) -> None:
        self.reached, self.released, self.tokens = threading.Event(), threading.Event(), 0

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        self.tokens += 1
        if self.tokens == 2:
            self.reached.set()
            assert self.released.wait(60)
        return scores


@pytest.mark.parametrize("method", ["ft", "grace"])
def test_calls_that_are_under_way_end_as_they_began(llava: EditableModel, method: str) -> None:
    deltas, asked = edited(LLAVA, method), questions(llava)
    base = stock_answers(llava, llava.hf, asked)
    with fastedit.attached(llava, deltas) as hf:
        expected = stock_answers(llava, hf, asked)
    handle: Any = None
    for begins in (base, expected):
        gate, answers = Gate(), []

        def generate(gate: Gate = gate, answers: list[Any] = answers) -> None:
            answers.append(stock_answers(llava, llava.hf, asked, logits_processor=[gate]))

        thread = threading.Thread(target=generate)
        thread.start()
        assert gate.reached.wait(60)
        if begins is base:
            handle = fastedit.attach(llava, deltas)
            assert stock_answers(llava, llava.hf, asked) == expected
        else:
            handle.detach()
            assert stock_answers(llava, llava.hf, asked) == base
            assert llava.generate(asked, max_new_tokens=NEW) == base
        gate.released.set()
        thread.join()
        assert answers == [begins]
    assert "forward" not in llava.hf.__dict__
    assert not any(module._forward_hooks for module in llava.adapter.text.layers.modules())


def test_a_model_in_nf4_is_edited_and_attached_to() -> None:
    pytest.importorskip("bitsandbytes")
    model = fastedit.load(LLAVA, quantize="nf4")
    asked = questions(model)
    run = fastedit.edit(model, edits()[:1], "lora", steps=25, lr=2e-2, evaluate=False, show_progress=False)
    base = model.generate(asked, max_new_tokens=NEW)
    with fastedit.applied(model, run.deltas):
        expected = model.generate(asked, max_new_tokens=NEW)
    with fastedit.attached(model.hf, run.deltas, model.processor) as hf:
        assert stock_answers(model, hf, asked) == expected != base
    assert stock_answers(model, model.hf, asked) == base


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["lora", "grace"])
def test_a_delta_bound_by_architecture_acts_in_a_stock_model_of_another_type(method: str, dtype: str) -> None:
    full = load(LLAVA)
    other = fastedit.wrap(copy.deepcopy(full.hf).to(getattr(torch, dtype)), full.processor)
    settings: dict[str, Any] = {"steps": 25, "lr": 2e-2 if method == "lora" else 1.0}
    run = fastedit.edit(full, edits()[:1], method, bind="architecture", evaluate=False, show_progress=False, **settings)
    asked = questions(other)
    base, plain = stock_answers(other, other.hf, asked), stock_logits(other, other.hf, asked)
    with pytest.warns(RuntimeWarning, match="fitted in float64"), fastedit.applied(other, run.deltas):
        expected, logits = other.generate(asked, max_new_tokens=NEW), engine_logits(other, asked)
    with pytest.warns(RuntimeWarning, match="fitted in float64"):
        handle = fastedit.attach(other.hf, run.deltas, other.processor)
    with handle:
        found = stock_logits(other, other.hf, asked)
        if dtype == "float32":
            assert stock_answers(other, other.hf, asked) == expected != base
    # Narrow numbers are rounded at other places in a padded forward
    torch.testing.assert_close(found, logits, rtol=0, atol=0.2 if dtype == "bfloat16" else 1e-3)
    assert float((found - plain).abs().max()) > 2
    assert stock_answers(other, other.hf, asked) == base


@pytest.mark.parametrize("method", ["grace", "wise"])
def test_routed_edits_act_on_top_of_the_adapters_of_others(llava: EditableModel, method: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|down_proj)", r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(llava.hf), config)
    model = fastedit.wrap(adapted, llava.processor)
    asked = questions(model)
    options: dict[str, Any] = {"steps": 25, "evaluate": False, "show_progress": False, "pool": make_edits(4)[2:]}
    deltas = list(fastedit.edit(model, edits(), method, **options).deltas)
    base = stock_answers(model, adapted, asked)
    with fastedit.applied(model, deltas):
        expected = model.generate(asked, max_new_tokens=NEW)
    with fastedit.attached(adapted, deltas, model.processor):
        assert stock_answers(model, adapted, asked) == expected != base
    assert stock_answers(model, adapted, asked) == base


@pytest.mark.parametrize("method", ["ike", "serac"])
@pytest.mark.parametrize("name", [LLAVA, "random:blip2-tiny"])
def test_prompts_come_back_as_they_were_given_where_edits_ask_another_question(name: str, method: str) -> None:
    model, asked = load(name), questions(load(name))
    deltas = fitted(name, method)[: 1 if method == "ike" else 2]
    given = inputs(model, asked, left=True)
    ids = [0, -1, 0, *[-1] * (len(asked) - 3)]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": list(model.end_token_ids)}
    plain = model.hf.generate(**given, max_new_tokens=NEW, **options)
    told = plain.shape[1] > NEW
    before = given["input_ids"] if told else given["input_ids"][:, :0]
    base = stock_answers(model, model.hf, asked)
    with fastedit.attached(model, deltas) as hf:
        whole = hf.generate(**given, max_new_tokens=NEW, edit_ids=ids, **options)
        longest = hf.generate(
            **given, max_length=given["input_ids"].shape[1] + NEW, edit_ids=ids, return_dict_in_generate=True, **options
        ).sequences
        beams = hf.generate(**given, max_new_tokens=NEW, edit_ids=ids, num_beams=3, num_return_sequences=2, **options)
        alone = [stock_answers(model, hf, [query], edit_ids=[edit])[0] for query, edit in zip(asked, ids, strict=True)]
        assert stock_answers(model, hf, asked, edit_ids=[-1] * len(asked)) == base
    found = texts(model, whole[:, before.shape[1] :])
    assert torch.equal(whole[:, : before.shape[1]], before)
    assert torch.equal(beams[:, : before.shape[1]], before.repeat_interleave(2, 0))
    assert texts(model, longest[:, before.shape[1] :]) == found == alone
    for row, edit in enumerate(ids):
        assert (found[row] == base[row]) == (edit < 0)
    # Rows in which none asks are those of the base model's batch, to the last token
    width = min(whole.shape[1], plain.shape[1])
    assert torch.equal(whole[1, :width], plain[1, :width])


def test_a_prompt_that_another_template_made_is_refused_where_edits_ask_another_question(llava: EditableModel) -> None:
    given = inputs(llava, questions(llava)[:2], left=True)
    given["input_ids"][0, -1] = given["input_ids"][0, -4]
    with fastedit.attached(llava, fitted(LLAVA, "ike")[:1]) as hf:
        with pytest.raises(ValueError, match="one that the model's own template makes of a question"):
            hf.generate(**given, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(ValueError, match="need input_ids"):
            hf.generate(inputs_embeds=torch.zeros(1, 3, llava.hidden_size, dtype=torch.float64), max_new_tokens=2)


def test_pipelines_ask_what_edits_ask() -> None:
    from transformers import pipeline

    model = load("pocket-llava", "float32")
    delta, asked = fitted("pocket-llava", "ike", "float32")[0], questions(model)
    pipe = pipeline("image-text-to-text", model=model.hf, processor=model.processor)
    base = model.generate(asked, max_new_tokens=NEW)
    with fastedit.applied(model, delta):
        expected = model.generate(asked, max_new_tokens=NEW)
    number = next(n for n, query in enumerate(asked) if query.image and base[n] != expected[n])
    content = [{"type": "image", "image": asked[number].image}, {"type": "text", "text": asked[number].prompt}]

    def answer() -> str:
        output = pipe(text=[{"role": "user", "content": content}], max_new_tokens=NEW, do_sample=False)
        return str(output[0]["generated_text"][-1]["content"]).strip()

    assert answer() == base[number]
    with fastedit.attached(model.hf, delta, model.processor):
        assert answer() == expected[number]
