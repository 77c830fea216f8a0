"""Which tokens belong to which edit, padded and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.deltas import Rows, TokenSpans


def test_packed_rows_of_equal_length_are_padded_ones() -> None:
    rows = Rows((2, 0, 1))
    spans = TokenSpans.of(rows, (4, 4, 4), 3)
    assert spans.token_offsets(12, 3) == rows.token_offsets(12, 3) == [0, 8, 8, 12]
    assert torch.equal(
        spans.offsets_tensor(12, 3, torch.device("cpu")), rows.offsets_tensor(12, 3, torch.device("cpu"))
    )
    assert spans.offsets_tensor(12, 3, torch.device("cpu")) is spans.offsets_tensor(12, 3, torch.device("cpu"))


def test_spans_end_where_the_rows_of_an_edit_end() -> None:
    live = torch.ones(11, dtype=torch.bool)
    spans = TokenSpans.of(Rows((0, 2, 1, 0)), (3, 6, 2), 4, live)
    assert spans.token_offsets(11, 4) == [0, 0, 9, 11, 11]
    assert spans.live is live
    # Without a map all rows are those of the only edit
    assert TokenSpans.of(Rows(), (3, 0, 2), 1).token_offsets(5, 1) == [0, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenSpans.of(Rows(), (3, 2), 2), r"a map is needed for more than one edit \(got edits=2\)"),
        (lambda: TokenSpans.of(Rows((1, 2)), (3, 2), 2), r"every row once .* \(got rows=2, edits=2, map=\(1, 2\)\)"),
        (lambda: TokenSpans.of(Rows((1, 1)), (3, 2), 3), r"a count for every edit \(got rows=2, edits=3"),
        (lambda: TokenSpans([0, 3, 5]).token_offsets(6, 2), r"of 6 tokens and 2 edits \(got offsets=\[0, 3, 5\]\)"),
        (lambda: TokenSpans([0, 3, 5]).token_offsets(5, 3), r"of 5 tokens and 3 edits"),
        (lambda: Rows((1, 1)).token_offsets(5, 2), r"tokens must divide into rows \(got tokens=5, rows=2\)"),
        (lambda: Rows((1, 1)).token_offsets(4, 3), r"one count per edit \(got counts=2, edits=3\)"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
