"""What can end a run is found before any work, all of it at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fastedit
from fastedit import EditRequest, Probe, Query
from fastedit.backbone import EditableModel
from fastedit.backbone.synthetic.skeleton import skeleton
from fastedit.data import Problem, RecordErrors, read_edits, write_jsonl
from fastedit.engine.preflight import check_run, check_training, record_problems
from fastedit.fitting.views import ViewSource
from fastedit.methods import METHODS, EditPlan, resolve
from fastedit.methods.base import Method
from tests.engine.conftest import make_edits, picture

LONG = "is " * 300


def places(problems: list[Problem]) -> list[tuple[int | None, str, str]]:
    """Where the problems are, and the first words of their rules."""
    return [(problem.index, problem.field, " ".join(problem.rule.split()[:4])) for problem in problems]


def refused(function: Callable[[], object]) -> RecordErrors:
    with pytest.raises(RecordErrors) as caught:
        function()
    return caught.value


@pytest.fixture
def broken(tmp_path: Path) -> list[EditRequest]:
    """Five edits, one thing wrong with each but the first."""
    picture(1).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    edits = make_edits(6)
    return [
        edits[0],
        replace(edits[1], image=tmp_path / "cut.png"),
        replace(edits[2], target="red " * 300),
        replace(edits[3], portability=(Query("What is <image>?", picture(30), "nine"),)),
        replace(edits[4], locality_answer="Paris</s>"),
        replace(edits[5], probes=(Probe("near", "What?", tmp_path / "absent.png"), Probe("blind", LONG))),
    ]


def test_all_problems_are_told_at_once_and_by_id(
    model: EditableModel, broken: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "encode", lambda *_a, **_k: pytest.fail("work began"))
    ledger = fastedit.open_ledger(tmp_path / "edits", model)
    error = refused(lambda: fastedit.edit(model, broken, "lora", ledger=ledger))
    special = "must not hold special"
    assert places(error.problems) == [
        (1, "image", "cannot be decoded, OSError:"),
        (2, "target", "a row may have"),
        (3, "portability[0].prompt", special),
        (4, "locality_answer", special),
        (5, "probes[0].image", "no such file"),
        (5, "probes[1].prompt", "a row may have"),
    ]
    for number in (1, 2, 3, 4, 5):
        assert f"edits[{number}] (id 'edit-{number}'), " in str(error)
    assert "row " not in str(error).replace("a row may have", "")
    assert not ledger.history()


def test_records_of_a_file_are_named_as_the_file_has_them(model: EditableModel, tmp_path: Path) -> None:
    edits = make_edits(4)
    write_jsonl([edits[0], replace(edits[1], target="</s>"), *edits[2:]], tmp_path / "r.jsonl", images=tmp_path)
    read = read_edits(tmp_path / "r.jsonl", images=tmp_path)
    for part in (read, read[1:]):
        error = refused(lambda part=part: fastedit.edit(model, part, "lora"))
        assert f"{tmp_path / 'r.jsonl'} record 1 (line 2, id 'edit-1'), target: must not hold special" in str(error)


@pytest.mark.parametrize("target", ["</s>", "<image>", "teal<image>", "red </s>", "<s> red"])
def test_targets_are_no_special_tokens(model: EditableModel, edits: list[EditRequest], target: str) -> None:
    for change in (
        {"target": target},
        {"locality_answer": target},
        {"image_locality_answer": target},
        {"portability": (Query("what?", None, target),)},
        {"probes": (Probe("blind", "what?", None, target),)},
    ):
        error = refused(lambda change=change: fastedit.edit(model, [edits[0], replace(edits[1], **change)], "lora"))
        assert len(error.problems) == 1
        assert error.problems[0].id == "edit-1"
        assert error.problems[0].field.split("[")[0] == next(iter(change))
        assert re.search(r"must not hold special tokens .*\('<.*>'\) \(got ", str(error))


def test_only_what_is_used_is_looked_at(model: EditableModel, edits: list[EditRequest]) -> None:
    unused = replace(edits[0], probes=(Probe("near", "what?", "absent.png"),), rephrase="<image>")
    assert fastedit.edit(model, [unused, edits[1]], "lora", steps=1, evaluate=False).deltas
    refused(lambda: fastedit.edit(model, [unused, edits[1]], "lora", steps=1))
    assert "rephrase" in str(refused(lambda: fastedit.edit(model, [unused, edits[1]], "kl+lora", evaluate=False)))


def test_the_pool_is_looked_at_where_it_is_used(model: EditableModel, edits: list[EditRequest]) -> None:
    pool = [*edits[2:4], replace(edits[4], image_locality_image="absent.png", prediction="</s>")]
    assert fastedit.edit(model, edits[:2], "lora", steps=1, pool=pool, evaluate=False).deltas
    error = refused(lambda: fastedit.edit(model, edits[:2], "kl+lora", pool=pool))
    assert [problem.field for problem in error.problems] == ["prediction", "image_locality_image"]
    assert "pool[2] (id 'edit-4'), prediction" in str(error)


def test_training_looks_at_its_records(model: EditableModel, edits: list[EditRequest]) -> None:
    records = [*edits[:4], replace(edits[4], target="</s>", probes=(Probe("near", "x?", "absent.png"),))]
    error = refused(lambda: fastedit.train(model, "mend", records))
    assert [(problem.file, problem.index, problem.field) for problem in error.problems] == [
        ("records", 4, "target"), ("records", 4, "probes[0].image"),
    ]  # fmt: skip


@pytest.fixture
def tiled() -> EditableModel:
    """A model whose images take 34 to 88 tokens, by their shape, in rows of at most 256."""
    model = fastedit.load("random:llava-next-tiny")
    model.adapter.text.config.max_position_embeddings = 256
    return model


WIDE, SQUARE = Image.new("RGB", (400, 100)), Image.new("RGB", (64, 64))
#: Of a question that has room beside the wide image and not beside the square one.
ROOMY = "is " * 180


def test_training_needs_room_for_any_question_about_any_image(tiled: EditableModel, edits: list[EditRequest]) -> None:
    plan = resolve("mend", {})
    wide = [
        replace(edit, image=WIDE, image_rephrase=WIDE, image_locality_image=WIDE, portability=(), probes=())
        for edit in edits
    ]
    long = replace(wide[1], prompt=ROOMY)
    check_training(tiled, [wide[0], long], plan)
    check_training(tiled, wide[:1] + edits[2:], plan)
    error = refused(lambda: check_training(tiled, [edits[0], long], plan))
    assert [(problem.index, problem.field) for problem in error.problems] == [(1, "prompt")]


def test_views_drawn_from_a_pool_have_room(tiled: EditableModel, edits: list[EditRequest]) -> None:
    plan = resolve("odedit+lora", {})
    # The pool knows another wording, which fits beside its own image and not beside the edit's
    pool = [edits[1], EditRequest("What?", "red", WIDE, rephrase=ROOMY)]

    def check(edit: EditRequest, views: str = "heldout") -> None:
        check_run(tiled, [edit], plan, ViewSource([edit], pool, source=views), evaluate=False, mode="single")

    check(EditRequest("What?", "red", WIDE))
    check(EditRequest("What else?", "red", SQUARE))
    check(EditRequest("What?", "red", SQUARE), "record")
    error = refused(lambda: check(EditRequest("What?", "red", SQUARE, id="asked")))
    assert str(error).splitlines()[1].startswith("  edits[0] (id 'asked'), views: a row may have at most 256 tokens")


def test_text_before_questions_counts(model: EditableModel, edits: list[EditRequest]) -> None:
    long = replace(edits[0], prompt="is " * 100)
    for method, chosen in (("ike", {"k": 0}), ("unike", {"extrinsic": "prompt", "zeta": "none"})):
        plan = resolve(method, chosen)

        def check(asked: list[EditRequest], plan: EditPlan = plan) -> None:
            check_run(model, asked, plan, ViewSource(asked, None), evaluate=True, mode="single")

        check([edits[1], edits[2]])
        error = refused(lambda check=check: check([edits[1], long]))
        assert places(error.problems) == [(1, "prompt", f"{method}: the edit and")]
        odd = replace(edits[1], target="{prompt}")
        assert f"{method}: an edit's text does not hold '{{prompt}}'" in str(
            refused(lambda c=check, o=odd: c([long, o]))
        )
    check_run(model, [long], resolve("lora", {}), ViewSource([long], None), evaluate=True, mode="single")


def test_questions_near_the_limit_are_scored(model: EditableModel, edits: list[EditRequest]) -> None:
    # What the frozen model says to the longest question has no room for its end
    start = "is " * 400
    limit = 256
    found = []
    for locality in (0, 1, 2):
        words = limit
        while record_problems(model, [replace(edits[0], locality_prompt=start[: 3 * words], locality_answer=None)]):
            words -= 1
        found.append(replace(edits[0], locality_prompt=start[: 3 * (words - locality)], locality_answer=None))
    run = fastedit.edit(model, found, "lora", steps=1)
    for scores in run.edit_scores:
        assert 0 <= scores.strict["text_locality"] <= 1
    # A delta that changes nothing changes no answer, cut or not
    still = fastedit.edit(model, found, "lora", steps=1, lr=1e-30)
    assert [scores.strict["text_locality"] for scores in still.edit_scores] == [1.0] * 3


def test_a_model_without_weights_will_do(broken: list[EditRequest], model: EditableModel) -> None:
    shaped, _ = skeleton("random:llava-tiny")
    assert record_problems(shaped, broken) == record_problems(model, broken)
    assert {p.field for p in record_problems(shaped, broken, images=False)} == {
        "target", "portability[0].prompt", "locality_answer", "probes[1].prompt",
    }  # fmt: skip


def test_shapes_that_the_processor_refuses_are_found(edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastedit.load("random:qwen2vl-tiny")
    process = model.images._preprocess

    def picky(image: Image.Image) -> object:
        if image.width < 10:
            raise ValueError("too thin")
        return process(image)

    monkeypatch.setattr(model.images, "_preprocess", picky)
    thin = replace(edits[1], image_rephrase=Image.new("RGB", (8, 1600)))
    error = refused(lambda: fastedit.edit(model, [edits[0], thin, edits[2]], "lora", steps=1))
    assert places(error.problems) == [(1, "image_rephrase", "the processor refuses it,")]


def test_files_are_decoded_once_and_not_again_by_a_second_run(
    model: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(5).save(tmp_path / "a.png")
    shared = [replace(edit, image=tmp_path / "a.png", image_rephrase=str(tmp_path / "a.png")) for edit in edits]
    looked = []
    import fastedit.backbone.images as module

    real = module.check_image
    monkeypatch.setattr(module, "check_image", lambda source: looked.append(source) or real(source))
    for _ in range(2):
        assert not record_problems(model, shared)
    assert [source for source in looked if isinstance(source, (str, Path))] == [tmp_path / "a.png"]


PIECES = ["red", " is", "</s>", "<image>", "é", "☃", " of " * 30, "{prompt}", "\u200b", "<", "image>", "\n"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_what_passes_does_not_stop_a_run(model: EditableModel, tmp_path: Path, data: st.DataObject) -> None:
    """Records are damaged in some fields; then either the run is refused before work, or it ends."""
    picture(2).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join).filter(str.strip)
    images = st.sampled_from([picture(4), tmp_path / "good.png", tmp_path / "cut.png", Image.new("F", (4, 4), 9e9)])
    fields = {
        "prompt": texts, "target": texts, "rephrase": texts, "locality_prompt": texts, "locality_answer": texts,
        "image_locality_prompt": texts, "image_locality_answer": texts, "prediction": texts, "image": images,
        "image_rephrase": images, "image_locality_image": images,
        "portability": st.builds(lambda *parts: (Query(*parts),), texts, images, texts),
        "probes": st.builds(lambda prompt, image: (Probe("near", prompt, image),), texts, images),
    }  # fmt: skip
    edits = make_edits(3)
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(fields)))
        number = data.draw(st.integers(0, 2))
        edits[number] = replace(edits[number], **{name: data.draw(fields[name])})
    method = data.draw(st.sampled_from(["lora", "odedit+lora", "ike", "grace"]))
    chosen = {"k": 2} if method == "ike" else {"steps": 1}
    seen = []
    encode = model.encode
    model.encode = lambda *args, **named: seen.append(1) or encode(*args, **named)  # type: ignore[method-assign]
    try:
        fastedit.edit(model, edits, method, pool=make_edits(5)[3:], **chosen)
    except RecordErrors:
        assert not seen
    finally:
        del model.encode


def test_every_method_that_writes_text_says_so() -> None:
    with_text = {name for name, method in METHODS.items() if method.context is not Method.context}
    assert with_text == {"ike", "serac", "unike"}
