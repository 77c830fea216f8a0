"""Edits act in the call that they are applied in: not in other threads, not in what is kept, not in other company."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel, weights_hash
from fastedit.deltas import EditDelta
from fastedit.deltas.kinds import new_stack
from fastedit.engine import Run
from tests.engine.conftest import make_edits, picture

STRONG: dict[str, Any] = {"steps": 30, "lr": 2e-2, "layers": 2, "stop_loss": None}


@pytest.fixture(scope="module")
def exact() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return make_edits(4)


def fitted(model: EditableModel, edits: list[EditRequest], method: str = "lora", **settings: Any) -> Run:
    options: dict[str, Any] = {"evaluate": False, "show_progress": False, "steps": 5}
    return fastedit.edit(model, edits, method, **{**options, **settings})


@pytest.fixture(scope="module")
def strong(exact: EditableModel, edits: list[EditRequest]) -> EditDelta:
    """A delta that changes most answers."""
    return fitted(exact, edits[:1], "ft", **STRONG).deltas[0]


def short(edit: EditRequest) -> EditRequest:
    """An edit with few questions to score."""
    return dataclasses.replace(edit, portability=(), probes=(), image_rephrase=None, rephrase=None)


def answers(model: EditableModel) -> list[str]:
    asked = [Query(f"What is number {i} here?", picture(10 * i)) for i in range(4)]
    return model.generate([*asked, Query("of what colour ?")], max_new_tokens=6)


def in_thread(work: Callable[[], Any], context: contextvars.Context | None = None) -> Any:
    """What some work returns in a thread of its own."""
    results: list[Any] = []
    run = work if context is None else lambda: context.run(work)
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


# What is kept of the model


@pytest.mark.parametrize("method", ["odedit+lora", "kl+lora"])
def test_what_is_edited_inside_a_block_leaves_nothing_for_later_runs(
    edits: list[EditRequest], strong: EditDelta, method: str
) -> None:
    options: dict[str, Any] = {"evaluate": True, "pool": make_edits(8)[5:], "layers": 2}
    edits = [short(edit) for edit in edits[:2]]
    clean, used = (fastedit.load("random:llava-tiny", dtype="float64") for _ in range(2))
    expected = fitted(clean, edits, method, **options)
    with fastedit.applied(used, strong):
        inside = fitted(used, edits, method, **options)
        answered = answers(used)
    after = fitted(used, edits, method, **options)
    assert [o.loss for o in after.outcomes] == [o.loss for o in expected.outcomes]
    assert [s.strict for s in after.edit_scores] == [s.strict for s in expected.edit_scores]
    assert [o.loss for o in inside.outcomes] != [o.loss for o in expected.outcomes], "the case needs a strong delta"
    assert answers(used) != answered
    assert answers(used) == answers(clean)


def test_edits_inside_a_block_are_fitted_on_top_of_what_acts_and_say_so(
    exact: EditableModel, edits: list[EditRequest], strong: EditDelta
) -> None:
    base = exact.fingerprint
    with fastedit.applied(exact, strong):
        inside = exact.fingerprint
        assert inside != base
        delta = fitted(exact, edits[1:2], "ft", **STRONG).deltas[0]
        assert delta.model_fingerprint == inside
        with fastedit.applied(exact, delta):
            assert exact.answer(edits[1].image, edits[1].prompt) == edits[1].target
        assert exact.fingerprint == inside
    assert exact.fingerprint == base
    with pytest.raises(ValueError, match="inside of applied needs the same deltas"), fastedit.applied(exact, delta):
        pass
    with (
        fastedit.applied(exact, strong),
        pytest.raises(ValueError, match="was fitted on the base model and would act on top of 1 others"),
        fastedit.applied(exact, fitted_outside(strong)),
    ):
        pass


def fitted_outside(delta: EditDelta) -> EditDelta:
    return dataclasses.replace(delta, request_id="another")


def test_an_edit_inside_a_block_equals_the_second_of_a_sequence(exact: EditableModel, edits: list[EditRequest]) -> None:
    sequence = fitted(exact, edits[:2], "lora", mode="sequential", layers=2)
    with fastedit.applied(exact, sequence.deltas[0]):
        second = fitted(exact, edits[1:2], "lora", layers=2).deltas[0]
    for name, tensor in sequence.deltas[1].tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=0, atol=1e-10)


def test_features_of_images_are_those_of_the_base_model_whatever_stands_behind_the_tower(
    edits: list[EditRequest],
) -> None:
    clean, used = (fastedit.load("random:llava-tiny", dtype="float64") for _ in range(2))
    delta = fitted(used, edits[:1], "ft-vision", steps=20, lr=2e-2).deltas[0]
    unseen = Query("what is it ?", picture(77))
    with fastedit.applied(used, delta):
        used.generate([unseen], max_new_tokens=6)
    key = used.encode([unseen], answers=False).images[0].key  # type: ignore[union-attr]
    own, base = (m.features(m.encode([unseen], answers=False))[key].tokens for m in (used, clean))
    assert torch.equal(own, base)
    assert used.generate([unseen], max_new_tokens=6) == clean.generate([unseen], max_new_tokens=6)


def test_answers_under_autocast_leave_nothing_for_runs_without(edits: list[EditRequest]) -> None:
    clean, used = (fastedit.load("random:llava-tiny") for _ in range(2))
    expected = [o.loss for o in fitted(clean, edits, "kl+lora", views="record").outcomes]
    with torch.autocast("cpu", torch.bfloat16):
        answers(used)
        under = [o.loss for o in fitted(used, edits, "kl+lora", views="record").outcomes]
    assert [o.loss for o in fitted(used, edits, "kl+lora", views="record").outcomes] == expected
    assert under != expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_change_nothing(edits: list[EditRequest], mode: Callable[[], Any]) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    with mode():
        before = answers(model)
        inside = fitted(model, edits, "ft-vision" if mode is torch.no_grad else "kl+lora", views="record")
    after = fitted(model, edits, "ft-vision" if mode is torch.no_grad else "kl+lora", views="record")
    assert [o.loss for o in inside.outcomes] == [o.loss for o in after.outcomes]
    assert not any(tensor.is_inference() for delta in inside.deltas for tensor in delta.tensors.values())
    assert answers(model) == before


def test_a_file_that_was_replaced_is_another_image(edits: list[EditRequest], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    edit = dataclasses.replace(short(edits[0]), image=path, image_locality_image=path)
    clean, used = (fastedit.load("random:llava-tiny", dtype="float64") for _ in range(2))
    options: dict[str, Any] = {"evaluate": True, "views": "record"}
    picture(1).save(path)
    first = fitted(used, [edit], "kl+lora", **options)
    picture(2).resize((64, 64)).save(path)
    again, expected = (fitted(model, [edit], "kl+lora", **options) for model in (used, clean))
    assert [o.loss for o in again.outcomes] == [o.loss for o in expected.outcomes]
    assert [s.answers for s in again.edit_scores] == [s.answers for s in expected.edit_scores]
    assert [o.loss for o in again.outcomes] != [o.loss for o in first.outcomes]


# Threads


def test_another_thread_has_the_base_model(exact: EditableModel, strong: EditDelta) -> None:
    base = answers(exact)
    with fastedit.applied(exact, strong):
        edited = answers(exact)
        assert edited != base
        assert in_thread(lambda: answers(exact)) == base
        assert in_thread(lambda: exact.fingerprint) == exact.base_fingerprint
        assert in_thread(lambda: answers(exact), contextvars.copy_context()) == edited


def test_threads_that_share_a_block_do_not_take_each_others_choices(
    exact: EditableModel, edits: list[EditRequest]
) -> None:
    deltas = fitted(exact, edits, "grace", steps=30).deltas
    asked = [[Query(edit.prompt, edit.image)] * (1 + number) for number, edit in enumerate(edits)]
    with fastedit.applied(exact, deltas):
        expected = [exact.generate(part, max_new_tokens=8) for part in asked]

        async def serve() -> list[list[str]]:
            jobs = [asyncio.to_thread(exact.generate, part, max_new_tokens=8) for part in asked * 2]
            return list(await asyncio.gather(*jobs))

        assert asyncio.run(serve()) == expected * 2


def test_a_server_answers_base_and_edited_questions_at_once(exact: EditableModel, edits: list[EditRequest]) -> None:
    deltas = [fitted(exact, [edit], "ft", **STRONG).deltas[0] for edit in edits[:2]]
    base = answers(exact)
    expected: dict[int | None, list[str]] = {None: base}
    for number, delta in enumerate(deltas):
        with fastedit.applied(exact, delta):
            expected[number] = answers(exact)
    wrong: list[str] = []

    def serve(which: int | None) -> None:
        for _ in range(2):
            if which is None:
                got = answers(exact)
            else:
                with fastedit.applied(exact, deltas[which]):
                    got = answers(exact)
            if got != expected[which]:
                wrong.append(f"{which}: {got}")

    threads = [threading.Thread(target=serve, args=(which,)) for which in (None, 0, 1, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert answers(exact) == base


@pytest.mark.parametrize("method", ["odedit+lora", "grace", "tpatcher", "wise", "ft-vision"])
def test_threads_that_edit_at_once_come_out_as_if_alone(edits: list[EditRequest], method: str) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    options: dict[str, Any] = {"evaluate": True, "pool": make_edits(8)[5:], "steps": 3}
    parts = [[short(edits[0])], [short(edits[2])]]
    expected = [fitted(model, part, method, **options) for part in parts]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())
    forwards = [name for name, module in model.hf.named_modules() if "forward" in module.__dict__]
    model.forget()
    got: dict[int, Run] = {}

    def work(number: int) -> None:
        got[number] = fitted(model, parts[number % 2], method, **options)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 1, 2]
    for number, run in got.items():
        assert [o.loss for o in run.outcomes] == [o.loss for o in expected[number % 2].outcomes]
        assert [s.strict for s in run.edit_scores] == [s.strict for s in expected[number % 2].edit_scores]
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    assert forwards == [name for name, module in model.hf.named_modules() if "forward" in module.__dict__]


# Company


def test_deltas_that_were_fitted_apart_are_not_added_up_without_a_word(
    exact: EditableModel, edits: list[EditRequest]
) -> None:
    run = fitted(exact, edits[:3])
    with pytest.raises(ValueError, match=r"deltas\[1\] \(request 'edit-1'\) was fitted alone"):
        fastedit.applied(exact, run.deltas).__enter__()
    with fastedit.applied(exact, run.deltas, check_sequence=False):
        answers(exact)
    with fastedit.applied(exact, run.deltas[1]):
        answers(exact)


@pytest.mark.parametrize("method", ["ft", "lora", "tpatcher"])
def test_a_sequence_acts_from_its_first_edit_on_and_in_order(
    exact: EditableModel, edits: list[EditRequest], method: str, tmp_path: Path
) -> None:
    run = fitted(exact, edits[:3], method, mode="sequential")
    for count in (1, 2, 3):
        with fastedit.applied(exact, run.deltas[:count]):
            answers(exact)
    for wrong in ([2], [1, 2], [1, 0], [0, 2], [0, 0]):
        with pytest.raises(ValueError, match=r"was fitted on top of|was fitted alone"):
            fastedit.applied(exact, [run.deltas[n] for n in wrong]).__enter__()
    run.save(tmp_path / "run")
    stored = Run.load(tmp_path / "run")
    if stored.deltas[2].fitted_on is not None:
        assert [delta.fitted_on for delta in stored.deltas] == [delta.fitted_on for delta in run.deltas]
        with pytest.raises(ValueError, match="was fitted on top of 2 earlier deltas"):
            fastedit.applied(exact, stored.deltas[2]).__enter__()


def test_deltas_of_a_router_act_in_any_company(exact: EditableModel, edits: list[EditRequest]) -> None:
    run = fitted(exact, edits[:3], "grace", mode="sequential")
    for chosen in ([2], [1, 0], [0, 1, 2]):
        with fastedit.applied(exact, [run.deltas[n] for n in chosen]):
            answers(exact)


def test_what_is_known_of_a_company_does_not_grow_with_it(exact: EditableModel, edits: list[EditRequest]) -> None:
    run = fitted(exact, edits[:3], mode="sequential", steps=1)
    sizes = [len("".join(delta.fitted_on or ())) for delta in run.deltas]
    assert sizes == [0, 66, 66]


@pytest.mark.parametrize(
    ("given", "error", "rule"),
    [
        ([], ValueError, "at least one delta is needed"),
        ("run", TypeError, "got a Run; its deltas are in .deltas"),
        (None, TypeError, "got a NoneType"),
        ([1], TypeError, "got a int"),
    ],
)
def test_what_is_no_delta_is_said_to_be_none(
    exact: EditableModel, edits: list[EditRequest], given: Any, error: type[Exception], rule: str
) -> None:
    if given == "run":
        given = fitted(exact, edits[:1], steps=1)
    with pytest.raises(error, match=rule), fastedit.applied(exact, given):
        pass


# The stock model


def test_saving_inside_a_block_is_refused_and_writes_nothing(
    exact: EditableModel, strong: EditDelta, tmp_path: Path
) -> None:
    with fastedit.applied(exact, strong):
        for module in (exact.hf, exact.hf.model.language_model):
            with pytest.raises(ValueError, match="still those of the base model"):
                module.save_pretrained(tmp_path / "inside")
        saved = in_thread(lambda: exact.hf.save_pretrained(tmp_path / "thread"))
    assert saved is None
    assert not (tmp_path / "inside").exists()
    assert (tmp_path / "thread" / "config.json").exists()
    exact.hf.save_pretrained(tmp_path / "outside")
    assert (tmp_path / "outside" / "config.json").exists()
    assert "save_pretrained" not in exact.hf.__dict__


@pytest.mark.parametrize("method", ["ike", "grace"])
def test_what_a_stock_forward_cannot_do_is_an_error_there(
    exact: EditableModel, edits: list[EditRequest], method: str
) -> None:
    settings: dict[str, Any] = {} if method == "grace" else {"k": 0}
    delta = fastedit.edit(exact, edits[:1], method, evaluate=False, **settings).deltas[0]
    encoded = exact.encode([edits[0].query], answers=False)
    with fastedit.applied(exact, delta):
        for call in (exact.hf, lambda **inputs: exact.hf.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(ValueError, match="which the stock model's forward and generate cannot do"):
                call(**encoded.model_inputs)
        in_thread(lambda: exact.hf(**encoded.model_inputs))
    exact.hf(**encoded.model_inputs)


# Nested blocks and copies


def test_routed_deltas_of_nested_blocks_each_answer_their_own_question(
    exact: EditableModel, edits: list[EditRequest]
) -> None:
    deltas = fitted(exact, edits[:2], "grace", steps=60).deltas
    base = answers(exact)
    alone = []
    for delta in deltas:
        with fastedit.applied(exact, delta):
            alone.append(answers(exact))
    with fastedit.applied(exact, deltas[0]), fastedit.applied(exact, deltas[1]):
        nested = answers(exact)
    # Where both fire, the inner one stands
    assert nested == [i if i != b else o for b, o, i in zip(base, *alone, strict=True)]
    assert alone[0] != base != alone[1]


def test_editing_on_top_of_routed_deltas_is_refused(exact: EditableModel, edits: list[EditRequest]) -> None:
    delta = fitted(exact, edits[:1], "grace").deltas[0]
    with fastedit.applied(exact, delta), pytest.raises(ValueError, match="those act on every prompt"):
        fitted(exact, edits[1:2])


def test_a_copy_of_a_model_is_a_model(exact: EditableModel, edits: list[EditRequest]) -> None:
    twin = copy.deepcopy(exact)
    assert twin.fingerprint == exact.fingerprint
    assert twin.hf is not exact.hf
    run, expected = fitted(twin, edits[:2], "ft"), fitted(exact, edits[:2], "ft")
    assert [o.loss for o in run.outcomes] == [o.loss for o in expected.outcomes]
    with torch.no_grad():
        twin.adapter.head.weight.zero_()
    assert weights_hash(twin.hf) != weights_hash(exact.hf)


def test_a_delta_says_by_its_id_what_it_does(exact: EditableModel) -> None:
    from fastedit.deltas import DeltaSpec

    spec = DeltaSpec("full", tuple(exact.sites([1], ["down"])))
    delta = new_stack(spec, 1, dtype=torch.float64, trainable=False).unstack(0)
    same = dataclasses.replace(delta, request_id="other", model_fingerprint="x")
    changed = dataclasses.replace(delta, tensors={name: t + 1 for name, t in delta.tensors.items()})
    assert delta.id == same.id != changed.id
    assert delta.id != dataclasses.replace(delta, texts={"template": "{prompt}"}).id
