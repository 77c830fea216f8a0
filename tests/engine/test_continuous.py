"""Waiting edits take over the places of those that have ended; deltas that leave the image's tokens alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.deltas import EditDelta, Rows, accumulate, installed, load_deltas, save_deltas, stack
from fastedit.engine import Run, editing, fit_problem, fitting
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.run_state import EndedEdits
from fastedit.fitting import prepared
from fastedit.fitting.solver import FitOutcome
from fastedit.requests import Query
from tests.backbone.padded import prefix, tail
from tests.engine.conftest import make_edits
from tests.engine.test_editing import largest_difference

# Enough to refill more than once with places for three
MANY = 8
PLACES = 3
#: Settings under which edits end at different steps, some by the stop rule and some at the last step.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"steps": 24, "lr": 1e-2, "stop_loss": 1.0},
    "ft": {"steps": 24, "lr": 3e-3, "stop_loss": 1.0},
    "kl+lora": {"steps": 24, "lr": 1e-2, "stop_loss": 1.0},
    # Weights of equation (9): MMD is what some edits do not come through in time
    "odedit+lora": {"steps": 24, "lr": 1e-2, "stop_loss": 1.0, "warmup": 0.25, "weights": (1.0, 1.0, 1.0)},
}


@pytest.fixture(scope="module")
def many() -> list[EditRequest]:
    """Edits of which two are about text alone."""
    made = make_edits(MANY)
    for number in (0, 4):
        made[number] = dataclasses.replace(made[number], image=None, image_rephrase=None)
    return made


def run(model: EditableModel, edits: Sequence[EditRequest], method: str = "lora", **settings: Any) -> Run:
    return fastedit.edit(model, edits, method, **{"layers": 2, "evaluate": False, **METHODS[method], **settings})


@pytest.fixture(scope="module")
def singles(exact_model: EditableModel, many: list[EditRequest]) -> dict[tuple[str, str], Run]:
    """Every edit by itself, by method and positions."""
    return {
        (method, positions): run(exact_model, many, method, batch_size=1, positions=positions)
        for method, positions in [*((name, "all") for name in METHODS), ("lora", "after_image"), ("ft", "after_image")]
    }


def same(found: Run, expected: Run, edits: Sequence[EditRequest]) -> None:
    assert [delta.request_id for delta in found.deltas] == [edit.id for edit in edits]
    assert largest_difference(list(found.deltas), list(expected.deltas)) < 1e-8
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert (one.status, one.steps) == (other.status, other.steps)
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        assert one.nll == pytest.approx(other.nll, rel=1e-9)


class Refills:
    """The sizes of what is prepared at a time; at a given call memory runs out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.sizes: list[int] = []
        real = fitting.prepare

        def prepared(model: Any, spec: Any, views: Any, timer: Any, **settings: Any) -> Any:
            self.sizes.append(len(views))
            if len(self.sizes) == fail_at:
                raise torch.OutOfMemoryError("no room for more")
            return real(model, spec, views, timer, **settings)

        monkeypatch.setattr(fitting, "prepare", prepared)


@pytest.mark.parametrize("method", METHODS)
def test_places_that_are_taken_over_equal_singles(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run], method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    alone = singles[method, "all"]
    steps = [outcome.steps for outcome in alone.outcomes]
    assert len(set(steps)) > 2, f"the case needs edits that end at different steps (got {steps})"
    assert min(delta.norm for delta in alone.deltas) > 0.01
    refills = Refills(monkeypatch)
    together = run(exact_model, many, method, batch_size=PLACES)
    # Places are taken over one by one: a batch that waits for its last edit would prepare 3, 3 and 2
    assert refills.sizes[0] == PLACES
    assert sum(refills.sizes) == MANY
    assert len(refills.sizes) > MANY / PLACES + 1
    same(together, alone, many)
    assert together.timing.steps == sum(steps)


def test_both_ways_of_ending_are_there(singles: dict[tuple[str, str], Run]) -> None:
    ended = {outcome.status for run_ in singles.values() for outcome in run_.outcomes}
    assert ended == {"converged", "max_steps"}


def test_a_quarter_of_the_places_must_be_free(
    exact_model: EditableModel, singles: dict[tuple[str, str], Run], many: list[EditRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    refills = Refills(monkeypatch)
    monkeypatch.setattr(fit_problem, "REFILL_FRACTION", 1.0)
    found = run(exact_model, many, "lora", batch_size=PLACES)
    # All of them here
    assert refills.sizes == [3, 3, 2]
    same(found, singles["lora", "all"], many)


def test_rows_of_ended_edits_are_taken_out(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows: list[int] = []
    real = fit_problem.packed_tail

    def walked(model: Any, state: Any) -> Tensor:
        rows.append(len(state))
        return real(model, state)

    monkeypatch.setattr(fit_problem, "packed_tail", walked)
    run(exact_model, many, "lora", batch_size=MANY)
    # One row per edit. At no step may a quarter of them, or more, be of edits that had ended before
    steps = [outcome.steps for outcome in singles["lora", "all"].outcomes]
    last = max(steps)
    working = [sum(own >= step for own in steps) for step in range(last)]
    assert len(set(working)) > 2
    assert rows[0] == MANY
    for step in range(1, last):
        assert working[step] <= rows[step] < working[step] / 0.75, (rows, working)


def test_other_orders_give_the_same(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run]
) -> None:
    backward = run(exact_model, many[::-1], "ft", batch_size=PLACES)
    assert [delta.request_id for delta in backward.deltas] == [edit.id for edit in many[::-1]]
    assert largest_difference(list(backward.deltas)[::-1], list(singles["ft", "all"].deltas)) < 1e-8


def test_a_ledger_gives_deltas_in_order_whatever_ends_first(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run], tmp_path: Path
) -> None:
    ledger = fastedit.open_ledger(tmp_path / "edits", exact_model)
    stored = run(exact_model, many, "lora", batch_size=PLACES, ledger=ledger)
    written = [event.detail["edits"][0] for event in ledger.history() if event.action == "edit"]
    assert written != sorted(written), "the case needs edits that end out of order"
    assert sorted(written) == list(range(1, MANY + 1))
    assert ledger.state().edit_ids == sorted(written)
    for deltas in (stored.deltas, ledger.state().deltas):
        assert deltas.request_ids == [edit.id for edit in many]  # type: ignore[attr-defined]
        assert largest_difference(list(deltas), list(singles["lora", "all"].deltas)) < 1e-8


def test_memory_that_runs_out_at_a_refill_costs_no_ended_edit(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    refills = Refills(monkeypatch, fail_at=3)
    ended: list[int] = []
    real = EndedEdits.keep

    def keep(self: Any, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        ended.append(number)
        real(self, number, delta, outcome)

    monkeypatch.setattr(EndedEdits, "keep", keep)
    with pytest.warns(RuntimeWarning, match="memory ran out in a batch of 3; going on with batches of 1"):
        found = run(exact_model, many, "kl+lora", batch_size=PLACES, evaluate=True)
    at_first = sum(refills.sizes[:2])
    assert sorted(ended) == list(range(MANY)), "every edit ends once"
    # The third refill failed; who had ended stays, who was at work is fitted again, one at a time
    assert refills.sizes[3:] == [1] * len(refills.sizes[3:])
    assert MANY - at_first < len(refills.sizes[3:]) < MANY
    same(found, singles["kl+lora", "all"], many)
    assert len(found.edit_scores) == MANY


@contextmanager
def scoring_fails(monkeypatch: pytest.MonkeyPatch, above: int, times: int) -> Iterator[list[int]]:
    """Memory runs out so many times where more than `above` edits are scored; the sizes that were tried."""
    tried: list[int] = []
    failed: list[int] = []
    real = Evaluator.scores

    def scores(self: Evaluator, requests: Any, stacked: Any, **settings: Any) -> Any:
        tried.append(len(requests))
        if len(requests) > above and len(failed) < times:
            failed.append(len(requests))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, requests, stacked, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "scores", scores)
        yield tried
    assert len(failed) == min(times, 99) or times > 99


def plain_scores(found: Run) -> list[Any]:
    return [(scores.legacy, scores.answers) for scores in found.edit_scores]


def test_memory_that_runs_out_in_scoring_halves_what_is_scored_at_a_time(
    exact_model: EditableModel, many: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(exact_model, many, "ft", batch_size=4, evaluate=True)
    with scoring_fails(monkeypatch, above=1, times=999) as tried, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run(exact_model, many, "ft", batch_size=4, evaluate=True)
    assert tried == [4, 2, *[1] * MANY]
    said = [str(each.message) for each in told if "memory ran out" in str(each.message)]
    assert said == [
        f"edit: memory ran out scoring {size} edits; going on with {size // 2} at a time" for size in (4, 2)
    ]
    same(found, expected, many)
    assert plain_scores(found) == plain_scores(expected)


def test_an_edit_whose_scoring_fails_beside_a_batch_is_scored_later(
    exact_model: EditableModel, many: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that is being fitted takes memory too; without it there may be room."""
    expected = run(exact_model, many, "ft", batch_size=PLACES, evaluate=True)
    with scoring_fails(monkeypatch, above=0, times=3) as tried, pytest.warns(RuntimeWarning) as told:
        found = run(exact_model, many, "ft", batch_size=PLACES, evaluate=True)
    # One alone is tried twice
    assert tried[:3] == [3, 1, 1]
    assert sum(tried[3:]) == MANY
    assert any("memory ran out in a batch of 3" in str(each.message) for each in told)
    same(found, expected, many)
    assert plain_scores(found) == plain_scores(expected)


def test_one_edit_that_cannot_be_scored_is_an_error(
    exact_model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        scoring_fails(monkeypatch, above=0, times=999),
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match="can't allocate memory"),
    ):
        run(exact_model, edits[:2], "ft", batch_size=2, evaluate=True)


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_deltas_behind_the_image_equal_singles(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run], method: str
) -> None:
    alone = singles[method, "after_image"]
    assert len({outcome.steps for outcome in alone.outcomes}) > 2
    for size in (PLACES, MANY):
        same(run(exact_model, many, method, batch_size=size, positions="after_image"), alone, many)
    # Text alone: there is nothing that they could leave out. With an image: another delta
    everywhere = singles[method, "all"]
    for number, pair in enumerate(zip(alone.deltas, everywhere.deltas, strict=True)):
        gap = largest_difference(*([each] for each in pair))
        assert gap < 1e-8 if many[number].image is None else gap > 1e-4, number


@pytest.mark.parametrize("method", ["kl+lora", "odedit+lora"])
def test_objectives_with_references_behind_the_image(
    exact_model: EditableModel, many: list[EditRequest], method: str
) -> None:
    settings: dict[str, Any] = {"positions": "after_image", "names": ("v", "down"), "steps": 8}
    alone, together = (run(exact_model, many[2:7], method, batch_size=size, **settings) for size in (1, PLACES))
    same(together, alone, many[2:7])


def test_behind_the_image_is_what_a_masked_delta_does(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run]
) -> None:
    """The constants of the fit and the hooks of an answer are the same delta."""
    model, delta = exact_model, singles["lora", "after_image"].deltas[1]
    encoded = model.encode([Query(many[1].prompt, many[1].image, many[1].target)], answers=True)
    state = packed_prefix(model, packed_start(model, encoded), 2, "ffn")
    plain = packed_tail(model, state)
    constants = hold_constant(model, state)
    assert constants.hidden.shape[0] < state.hidden.shape[0]
    with installed(model, stack([delta], device=model.device), Rows()):
        whole, held = packed_tail(model, state), packed_tail(model, constants)
    assert float((whole - held).abs().max()) < 1e-12
    assert float((whole - plain).abs().max()) > 1e-3


@pytest.mark.parametrize(("method", "mode"), [("lora", "single"), ("kl+lora", "sequential"), ("ft", "sequential")])
def test_constants_change_no_fit(
    exact_model: EditableModel, many: list[EditRequest], method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on top of earlier edits, which act behind the image alone as well."""
    settings: dict[str, Any] = {"positions": "after_image", "names": ("q", "v", "down"), "steps": 6, "mode": mode}
    exact_model.forget()
    held = run(exact_model, many[1:4], method, batch_size=2, **settings)
    calls: list[int] = []
    monkeypatch.setattr(prepared, "hold_constant", lambda _model, state: calls.append(1) or state)
    exact_model.forget()
    whole = run(exact_model, many[1:4], method, batch_size=2, **settings)
    # What is kept belongs to this test
    exact_model.forget()
    assert calls
    same(held, whole, many[1:4])


class Seen:
    """Outputs of the last layer's and the edited modules, by path, for one question."""

    def __init__(self, model: EditableModel, query: Query, deltas: Sequence[EditDelta]) -> None:
        encoded = model.encode([query], answers=False)
        self.image = encoded.image_mask[0]
        self.outputs: dict[str, Tensor] = {}
        handles = []
        for site in model.sites([1, 2], ["up", "down"]):

            def hook(_module: Any, _inputs: Any, output: Tensor, path: str = site.module_path) -> None:
                self.outputs[path] = output[0].detach().clone()

            handles.append((model.module(site), hook))
        with installed(model, stack(deltas, device=model.device), Rows()) if deltas else _nothing():
            # After the deltas' own hooks, so that these see what goes on
            removed = [module.register_forward_hook(hook) for module, hook in handles]
            try:
                packed_tail(model, packed_start(model, encoded))
            finally:
                for each in removed:
                    each.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_image_tokens_stay_as_they_are(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run], method: str
) -> None:
    layers = {"layers": (1, 2), "steps": 3, "stop_loss": None}
    found = [
        run(exact_model, many[1:2], method, positions=positions, **layers).deltas[0]
        for positions in ("after_image", "all")
    ]
    asked, blind = Query(many[2].prompt, many[2].image), Query(many[2].prompt)
    plain, behind, everywhere = (Seen(exact_model, asked, each) for each in ([], [found[0]], [found[1]]))
    last = int(plain.image.nonzero().max())
    assert 0 < last < len(plain.image) - 1
    for path, output in plain.outputs.items():
        assert torch.equal(behind.outputs[path][: last + 1], output[: last + 1])
        assert float((behind.outputs[path][last + 1 :] - output[last + 1 :]).abs().max(1).values.min()) > 1e-6
        assert not torch.equal(everywhere.outputs[path][: last + 1], output[: last + 1])
    # A question without an image has no token before its delta
    plain, behind = (Seen(exact_model, blind, each) for each in ([], [found[0]]))
    for path, output in plain.outputs.items():
        assert float((behind.outputs[path] - output).abs().max(1).values.min()) > 1e-6


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_applied_deltas_answer_as_they_were_scored(
    exact_model: EditableModel, many: list[EditRequest], method: str, tmp_path: Path
) -> None:
    some = many[3:6]
    found = run(exact_model, some, method, batch_size=2, positions="after_image", stop_loss=0.1, evaluate=True)
    loaded = Run.load(found.save(tmp_path / "run")).deltas
    kept = load_deltas(save_deltas(list(found.deltas), tmp_path / "deltas.safetensors"))
    for deltas in (loaded, kept):
        assert [delta.spec.positions for delta in deltas] == ["after_image"] * len(some)
        assert largest_difference(list(deltas), list(found.deltas)) == 0
    changed = 0
    for request, delta, scores in zip(some, loaded, found.edit_scores, strict=True):
        with fastedit.applied(exact_model, delta):
            for asked in scores.answers:
                if asked["score"] not in ("reliability", "text_locality", "blind"):
                    continue
                image = request.image if asked["score"] == "reliability" else None
                answer = exact_model.answer(image, asked["prompt"], max_new_tokens=48)
                assert answer == asked["after"], asked
                changed += asked["after"] != asked["before"]
    assert changed > 0


def test_padded_rows_are_refused_behind_the_image(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run]
) -> None:
    delta = singles["lora", "after_image"].deltas[1]
    encoded = exact_model.encode([Query("what?", many[1].image)], answers=False)
    message = r"acts in generate, answer and edits, where the model knows which .* \(got padded rows\)"
    with fastedit.applied(exact_model, delta), pytest.raises(ValueError, match=message):
        tail(exact_model, prefix(exact_model, encoded, 0))
    with fastedit.applied(exact_model, singles["lora", "all"].deltas[1]):
        tail(exact_model, prefix(exact_model, encoded, 0))


def test_deltas_of_different_positions_are_not_one(
    exact_model: EditableModel, singles: dict[tuple[str, str], Run]
) -> None:
    both = [singles["lora", positions].deltas[1] for positions in ("all", "after_image")]
    with pytest.raises(ValueError, match="deltas share kind, sites and positions"):
        accumulate(both)
    with pytest.raises(ValueError, match="deltas share one spec"):
        stack(both)
    two = accumulate([singles["lora", "after_image"].deltas[number] for number in (1, 2)])
    assert two.spec.positions == "after_image"


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_wrong_positions_are_named(exact_model: EditableModel, many: list[EditRequest], method: str) -> None:
    message = rf"{method}: positions is one of \['all', 'after_image'\] \(got positions='behind'\)"
    with pytest.raises(ValueError, match=message):
        run(exact_model, many, method, positions="behind")
    assert "positions" not in singles_options(run(exact_model, many[:1], method, steps=1))


def singles_options(found: Run) -> dict[str, Any]:
    """Options of the first delta's spec: files of earlier versions have none about positions."""
    return dict(found.deltas[0].spec.options)


def test_the_plan_chooses_a_batch(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    asked: list[tuple[int, bool, bool]] = []

    def largest(model: Any, plan: Any, edits: Any, *, evaluate: bool, keep_deltas: bool, mode: str) -> int:
        assert mode == "single"
        asked.append((len(edits), evaluate, keep_deltas))
        return 2

    with monkeypatch.context() as patched:
        patched.setattr(editing, "largest_batch", largest)
        refills = Refills(patched)
        found = run(exact_model, many, "lora", batch_size="auto")
        run(
            exact_model,
            many[:3],
            "lora",
            batch_size="auto",
            steps=1,
            evaluate=True,
            ledger=fastedit.open_ledger(tmp_path / "edits", exact_model),
        )
    # Who is scored, and whether deltas stay in memory
    assert asked == [(MANY, False, True), (3, True, False)]
    assert refills.sizes[0] == max(refills.sizes) == 2
    assert found.provenance["run"]["batch_size"] == 2
    same(found, singles["lora", "all"], many)
    # By the real plan a tiny model has room for all
    assert run(exact_model, many[:3], "lora", steps=1, batch_size="auto").provenance["run"]["batch_size"] == 3


@pytest.mark.parametrize("size", [0, -2, "many", 2.0, None])
def test_wrong_batch_sizes_are_named(exact_model: EditableModel, many: list[EditRequest], size: Any) -> None:
    with pytest.raises(ValueError, match=rf"batch_size is at least 1, or 'auto' \(got batch_size={size!r}\)"):
        run(exact_model, many, "lora", batch_size=size)


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("method", [*METHODS, "kl+ft", "odedit+ft", "grace", "wise", "tpatcher"])
def test_deltas_do_not_depend_on_when_the_host_asks_which_edits_have_ended(
    model: EditableModel, many: list[EditRequest], method: str, every: int
) -> None:
    """To the bit, where an edit is alone in its batch: the same products are computed."""
    settings = {**METHODS.get(method, {"steps": 8, "stop_loss": 3.0}), "evaluate": False, "batch_size": 1}
    edits = [edit for edit in many if edit.image is not None][:2]
    first, other = (fastedit.edit(model, edits, method, check_every=check, **settings) for check in (1, every))
    assert [repr(outcome) for outcome in other.outcomes] == [repr(outcome) for outcome in first.outcomes]
    for one, two in zip(first.deltas, other.deltas, strict=True):
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_edits_that_take_over_places_end_alike_however_often_the_host_asks(
    exact_model: EditableModel, many: list[EditRequest], singles: dict[tuple[str, str], Run], method: str
) -> None:
    same(run(exact_model, many, method, batch_size=PLACES, check_every=3), singles[method, "all"], many)
