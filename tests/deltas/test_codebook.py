"""Codebook entries: where their values stand, alone and in sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.backbone.token_layout import TokenLayout
from fastedit.deltas import DeltaSpec, EditDelta, Rows, TokenSpans, accumulate, codebook
from fastedit.deltas.codebook import CodebookDelta, Entries, expecting, with_entry
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.questions import QUESTIONS

D = 4
SITE = Site(3, "down", "down", 6, D)


def spec(**options: object) -> DeltaSpec:
    return DeltaSpec("codebook", (SITE,), {"positions": "answer", "router": "ball", "values": 2, **options})


def entry(key: list[float], radius: float, label: float = 0.0) -> EditDelta:
    tensors = {
        "3.down:value": torch.zeros(2, D),
        "3.down:key": torch.tensor(key),
        "3.down:radius": torch.tensor([radius]),
        "3.down:length": torch.tensor([2.0]),
        "3.down:label": torch.full((4,), label),
    }
    return EditDelta(spec(), tensors, "model", "id")


def stacked(*, length: float = 9.0, trainable: bool = False, **options: object) -> CodebookDelta:
    made: CodebookDelta = new_stack(spec(**options), 2, dtype=torch.float64, trainable=trainable)
    for edit in range(2):
        value = torch.arange(2 * D, dtype=torch.float64).view(2, D) + 100 * edit + 1
        made.set(edit, {"3.down:value": value, "3.down:length": torch.tensor([length])})
    return made


def spans(
    counts: tuple[int, ...], per_edit: tuple[int, ...], behind: tuple[int, ...] = (), wanted: Tensor | None = None
):
    made = TokenSpans.of(Rows(per_edit), counts, len(per_edit))
    first = () if wanted is None else tuple(int(((wanted >= s) & (wanted < s + c)).sum()) for s, c in _places(counts))
    made.layout = TokenLayout(counts, None, wanted, first, behind)
    return made


def _places(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(sum(counts[:row]), count) for row, count in enumerate(counts)]


def changes(stack: CodebookDelta, rows: TokenSpans, output: Tensor | None = None) -> Tensor:
    tokens = rows.offsets[-1]
    return stack.delta(
        0, torch.zeros(tokens, D, dtype=torch.float64), rows, torch.zeros(tokens, D) if output is None else output
    )


def test_values_stand_one_by_one_from_the_last_token_of_the_prompt() -> None:
    """Rows of 3 and 4 tokens whose prompts have 2 and 1."""
    got = changes(stacked(), spans((3, 4), (1, 1), wanted=torch.tensor([1, 2, 3, 4, 5, 6])))
    assert got[:, 0].tolist() == [0.0, 1.0, 5.0, 101.0, 105.0, 0.0, 0.0]


def test_values_go_on_where_an_answer_goes_on() -> None:
    """Tokens that are walked alone, 1 and 2 behind their prompts."""
    got = changes(stacked(), spans((1, 1), (1, 1), behind=(1, 2)))
    assert got[:, 0].tolist() == [5.0, 0.0]


def test_a_value_acts_for_as_many_tokens_as_the_target_has() -> None:
    got = changes(stacked(length=1.0), spans((3, 3), (1, 1)))
    assert got[:, 0].tolist() == [1.0, 0.0, 0.0, 101.0, 0.0, 0.0]


def test_a_value_replaces_the_output_or_is_added() -> None:
    output = torch.full((2, D), 7.0, dtype=torch.float64)
    rows = spans((1, 1), (1, 1))
    added, replaced = changes(stacked(), rows, output), changes(stacked(replace=True), rows, output)
    assert torch.equal(added - 7, replaced)
    assert torch.equal(replaced + output, stacked().parts["3.down:value"][:, 0])


def test_chosen_rows_have_the_values_of_their_edit() -> None:
    layout = TokenLayout((2, 1, 2), behind=(0, 1, 0))
    rows = TokenSpans.chosen([1, -1, 0], layout.counts, 2, None)
    rows.layout = layout
    got = stacked().delta(0, torch.zeros(4, D), rows, torch.zeros(4, D))
    assert got[:, 0].tolist() == [1.0, 5.0, 101.0, 105.0]


def test_rows_out_of_scope_have_the_value_only_inside_of_the_ball_while_it_is_fitted() -> None:
    stack = stacked(trainable=True)
    stack.set(0, {"3.down:radius": torch.tensor([1.0])})
    stack.row_roles = (0, 1, 3, 4)
    rows = spans((1, 1, 1, 1), (4, 0))
    x = torch.tensor([0.0, 9.0, 9.0, 0.5], dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0, 0])
    got = stack.delta(0, x, rows, torch.zeros(4, D))
    assert (got[:, 0] != 0).tolist() == [True, True, False, True]
    # a radius that is written later counts: rows stay the same while edits enter
    stack.set(0, {"3.down:radius": torch.tensor([10.0])})
    assert bool((stack.delta(0, x, rows, torch.zeros(4, D))[:, 0] != 0).all())


def test_gradients_reach_the_values_that_acted() -> None:
    stack = stacked(trainable=True)
    stack.begin_step()
    changes(stack, spans((2, 1), (1, 1))).sum().backward()
    stack.end_step()
    assert stack.part_grads["3.down:value"][:, :, 0].tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_an_entry_acts_only_where_answers_are_known() -> None:
    with pytest.raises(ValueError, match="which tokens are an answer's"):
        stacked().delta(0, torch.zeros(4, D), Rows((2, 2)), torch.zeros(4, D))


@pytest.mark.parametrize("sites", [(Site(3, "up", "up", D, 6),), (SITE, Site(2, "down", "x", 6, D))])
def test_one_entry_stands_at_the_end_of_one_block(sites: tuple[Site, ...]) -> None:
    with pytest.raises(ValueError, match=r"one 'down' \(got sites="):
        new_stack(DeltaSpec("codebook", sites, {}), 1)


def test_entries_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="act one at a time"):
        accumulate([entry([0.0] * D, 1.0), entry([1.0] * D, 1.0)])


def radii(entries: list[EditDelta]) -> list[float]:
    return [float(each.tensors["3.down:radius"]) for each in entries]


def test_balls_that_meet_shrink_where_their_targets_differ() -> None:
    one = entry([0.0, 0, 0, 0], 1.0, label=1)
    two = entry([1.6, 0, 0, 0], 1.0, label=2)
    assert radii(with_entry([one], two)) == pytest.approx([0.8, 0.8])
    # the nearest one only
    far = entry([-1.5, 0, 0, 0], 1.0, label=3)
    assert radii(with_entry([far, one], two)) == pytest.approx([1.0, 0.8, 0.8])
    assert radii([one, two, far]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("at", "label"), [(1.6, 1.0), (2.5, 2.0)])
def test_balls_stay_where_targets_agree_or_they_do_not_meet(at: float, label: float) -> None:
    one, other = entry([0.0, 0, 0, 0], 1.0, label=1), entry([at, 0, 0, 0], 1.0, label=label)
    assert with_entry([], one) == [one]
    assert radii(with_entry([one], other)) == [1.0, 1.0]


def test_a_ball_never_grows() -> None:
    small, other = entry([0.0, 0, 0, 0], 0.1, label=1), entry([1.0, 0, 0, 0], 1.0, label=2)
    assert radii(with_entry([small], other)) == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize("at_once", [1, 200, 1 << 24])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e18])
def test_entries_that_are_expected_shrink_as_those_that_are_not(
    at_once: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys far from zero and close together, some twice, some of one question: the same nearest to the bit."""
    monkeypatch.setattr(codebook, "_AT_ONCE", at_once)
    make = torch.Generator().manual_seed(0)
    keys = (scale * (1000 + torch.randn(60, 4, generator=make))).repeat_interleave(
        torch.tensor([1, 1, 2]).repeat(20), 0
    )
    made = [entry(key.tolist(), scale, label=n % 3) for n, key in enumerate(keys)]
    made = [replace(each, texts={QUESTIONS: f"question {n % 17}"}) for n, each in enumerate(made)]
    plain, expected = Entries(), expecting(Entries(), made[:50])
    for number, each in enumerate(made):
        if number == 50:
            expected = expecting(expected, made[50:])
        plain, expected = with_entry(plain, each), with_entry(expected, each)
    assert radii(plain) == radii(expected)
    assert min(radii(plain)) < 0.9 * scale, "some balls meet"


def test_what_was_not_expected_is_found_too() -> None:
    one, two, three = (entry([at, 0, 0, 0], 1.0, label=at) for at in (0.0, 1.6, -1.5))
    entries = expecting([one], [three])
    assert radii(with_entry(with_entry(entries, two), three)) == radii(with_entry(with_entry([one], two), three))


def test_what_is_not_finite_is_looked_for_the_long_way() -> None:
    made = [entry([at, 0, 0, 0], 1.0, label=at) for at in (0.0, float("inf"), 1.6, float("nan"), 1.0)]
    entries, plain = expecting([], made), Entries()
    for each in made:
        entries, plain = with_entry(entries, each), with_entry(plain, each)
    assert str(radii(entries)) == str(radii(plain))
