"""Marks of rows in a batch that is fitted."""

from __future__ import annotations

import pytest
import torch

from fastedit.backbone.token_layout import TokenLayout
from fastedit.deltas import Rows, TokenSpans
from fastedit.deltas.scope import IN_SCOPE, in_scope, row_marks
from fastedit.objectives.base import CE_ROLES, KL_ROLES

CPU = torch.device("cpu")
# Two edits, of two rows and one: prompts of 3, 2 and 4 tokens, of which 1, 0 and 4 are an image's
COUNTS, WANTED = (5, 3, 4), torch.tensor([2, 3, 4, 6, 7, 11])
LIVE = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)


def spans(live: torch.Tensor | None = LIVE) -> TokenSpans:
    made = TokenSpans.of(Rows((2, 1)), COUNTS, 2, live)
    made.layout = TokenLayout(COUNTS, live, WANTED, (3, 2, 1))
    return made


def test_scope_is_what_is_fitted() -> None:
    assert {int(role) for role in CE_ROLES} == IN_SCOPE
    roles, expected = [int(role) for role in (*CE_ROLES, *KL_ROLES)], [True] * 3 + [False] * 2
    assert in_scope(roles, Rows((5,)), CPU).tolist() == expected
    batch = spans()
    assert in_scope(roles, batch, CPU).tolist() == expected
    # Made once for a batch
    assert in_scope(roles, batch, CPU) is in_scope(roles, batch, CPU)


def test_marks_of_rows() -> None:
    marks = row_marks(spans(), 2, CPU)
    assert marks is not None
    assert marks.row.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert marks.last.tolist() == [2, 6, 11]
    assert marks.owner.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("tokens", "counted"),
    [
        ("all", [0, 1, 2, 5, 6, 8, 9, 10, 11]),
        # the last prompt ends with its image: its last token stands for it
        ("after_image", [1, 2, 5, 6, 11]),
        ("last", [2, 6, 11]),
    ],
)
def test_tokens_that_count(tokens: str, counted: list[int]) -> None:
    marks = row_marks(spans(), 2, CPU)
    assert marks is not None
    assert marks.counted(tokens).nonzero().flatten().tolist() == counted


def test_without_images_all_tokens_of_prompts_count() -> None:
    marks = row_marks(spans(None), 2, CPU)
    assert marks is not None
    assert torch.equal(marks.counted("after_image"), marks.counted("all"))


def test_an_edit_without_rows_owns_none() -> None:
    made = TokenSpans.of(Rows((0, 1, 0, 1)), (2, 2), 4)
    made.layout = TokenLayout((2, 2))
    marks = row_marks(made, 4, CPU)
    assert marks is not None
    assert marks.owner.tolist() == [1, 3]
    assert marks.last.tolist() == [0, 2]


def test_marks_are_made_once_and_not_for_rows_that_are_not_known() -> None:
    known = spans()
    assert row_marks(known, 2, CPU) is row_marks(known, 2, CPU)
    assert row_marks(Rows(), 1, CPU) is None
    assert row_marks(TokenSpans([0, 2]), 1, CPU) is None
    chosen = TokenSpans.chosen([0, -1], (2, 2), 1, None)
    chosen.layout = TokenLayout((2, 2))
    assert row_marks(chosen, 1, CPU) is None
