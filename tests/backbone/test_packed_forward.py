"""Walks over answers alone, their prompts held constant."""

from __future__ import annotations

import fastedit
from fastedit import Query
from fastedit.backbone.packed_forward import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.backbone.token_layout import token_layout
from fastedit.testing import assert_close
from tests.engine.conftest import picture


def test_prompts_held_constant_leave_the_answers_as_they_are() -> None:
    """The walk over the answers alone gives what the walk over everything gives, in float64."""
    model = fastedit.load("random:llava-tiny", dtype="float64")
    asked = [
        Query("What is it?", picture(1), "a red cat"),
        Query("Who?", None, "me"),
        Query("Why is it?", picture(2), "b"),
    ]
    encoded = model.encode(asked, answers=True)
    state = packed_prefix(model, packed_start(model, encoded), 1, "ffn")
    whole = packed_tail(model, state)
    state.live = token_layout(state).acting("answer")
    held = hold_constant(model, state)
    assert held.hidden.shape[0] == len(held.wanted) == len(whole) < state.hidden.shape[0]
    assert held.starts == tuple(count - 1 for count in token_layout(state).prompts)
    assert_close(packed_tail(model, held), whole, length=64)
