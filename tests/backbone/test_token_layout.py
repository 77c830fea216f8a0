"""Whose the tokens of a walk are: prompts and answers in packed rows."""

from __future__ import annotations

import torch

import fastedit
from fastedit import Query
from fastedit.backbone.generation import Reader
from fastedit.backbone.token_layout import Running, TokenLayout, showing
from tests.engine.conftest import picture


def test_a_prompt_ends_with_the_first_wanted_token() -> None:
    layout = TokenLayout((4, 3, 2), None, torch.tensor([2, 3, 4, 8]), (2, 1, 1))
    assert layout.prompts == (3, 1, 2)
    assert layout.answer is not None
    assert layout.answer.tolist() == [False, False, True, True, True, True, True, False, True]


def test_a_row_without_wanted_tokens_is_all_prompt() -> None:
    assert TokenLayout((2, 0, 3), None, torch.tensor([1]), (1, 0, 0)).prompts == (2, 0, 3)


def test_where_all_tokens_are_wanted_all_are_of_the_answer() -> None:
    layout = TokenLayout((2, 0, 3))
    assert layout.prompts == (1, 0, 1)
    assert layout.answer is None


def test_where_a_delta_acts_by_its_positions() -> None:
    live = torch.tensor([False, True, True])
    layout = TokenLayout((3,), live, torch.tensor([2]), (1,))
    assert layout.acting("all") is live
    assert layout.acting("after_image") is live
    assert layout.acting("answer") is layout.answer


def test_steps_count_from_the_end_of_the_prompt() -> None:
    layout = TokenLayout((4, 2), None, torch.tensor([2, 3, 5]), (2, 1))
    assert layout.steps == (-2, -1, 0, 1, -1, 0)
    # walked alone, one and three tokens behind their prompts
    assert TokenLayout((2, 1), behind=(1, 3)).steps == (1, 2, 3)


def test_answers_that_are_decoded_know_how_far_they_are() -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    encoded = model.encode([Query("What is it?", picture(1)), Query("Who?", None)], answers=False)
    reader = Reader(model, encoded, 4)
    seen: list[tuple[int, ...]] = []
    (site,) = model.sites([0], ["down"])

    def note(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        assert model.running is not None
        seen.append(model.running.layouts[inputs[0].shape[1]].steps)

    handle = model.module(site).register_forward_pre_hook(note)
    try:
        reader.read()
        reader.extend({0: [5, 6], 1: [5]}, {0: 0, 1: 0})
        reader.extend({1: [7]}, {1: 1})
    finally:
        handle.remove()
    lengths = encoded.lengths.tolist()
    assert seen[0] == (*range(1 - lengths[0], 1), *range(1 - lengths[1], 1))
    assert seen[1:] == [(1, 2, 1), (2,)]


def test_what_runs_inside_of_what_runs_is_shown_and_goes_again() -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    outer, inner = Running({}), Running({2: TokenLayout((2,))})
    assert model.running is None
    with showing(outer):
        with showing(inner):
            assert model.running is inner
        assert model.running is outer
    assert model.running is None
