"""Side memories: masked gradients, margins, thresholds, TIES-merging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import Site
from fastedit.backbone.token_layout import TokenLayout
from fastedit.deltas import DeltaSpec, EditDelta, Rows, TokenSpans, accumulate
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.random_mask import apply_mask_, mask_key
from fastedit.deltas.side import SideDelta, empty_side, merged_side, ties
from fastedit.testing import assert_close

D_IN, D_OUT = 7, 5
SITE = Site(2, "down", "down", D_IN, D_OUT)
OPTIONS: dict[str, Any] = {
    "router": "distance", "keep": 0.5, "tokens": "all",
    "alpha": 0.3, "beta": 1.5, "gamma": 0.8, "weight": 0.7, "share": 0.5,
}  # fmt: skip
# Three edits, the second one without rows: edit, rephrase, two others; edit, one other
ROLES, COUNTS, PROMPTS, EDITS = (0, 1, 3, 4, 0, 4), (3, 2, 2, 4, 3, 2), (2, 2, 1, 3, 1, 2), (4, 0, 2)
OWNER = [0, 0, 0, 0, 2, 2]


def spec(**options: Any) -> DeltaSpec:
    return DeltaSpec("side", (SITE,), OPTIONS | options)


def spans() -> TokenSpans:
    made = TokenSpans.of(Rows(EDITS), COUNTS, 3)
    starts = [sum(COUNTS[:row]) for row in range(6)]
    wanted = [s + p for s, prompt, count in zip(starts, PROMPTS, COUNTS, strict=True) for p in range(prompt - 1, count)]
    first = tuple(count - prompt + 1 for prompt, count in zip(PROMPTS, COUNTS, strict=True))
    made.layout = TokenLayout(COUNTS, None, torch.tensor(wanted), first)
    return made


def fitted(*, unit: float = 2.0, **options: Any) -> tuple[SideDelta, Tensor, Tensor]:
    """A stack that is being fitted, inputs and frozen outputs of its tokens."""
    make = torch.Generator().manual_seed(3)
    stack: SideDelta = new_stack(spec(**options), 3, dtype=torch.float64)
    stack.flat.copy_(torch.randn(stack.flat.shape, generator=make))
    for edit in range(3):
        values = {
            "mask": torch.tensor(mask_key(0, str(edit))),
            "unit": torch.tensor([unit + edit]),
            "edits": torch.ones(1),
        }
        stack.set(edit, {f"2.down:{name}": value for name, value in values.items()})
    stack.row_roles = ROLES
    tokens = sum(COUNTS)
    x = torch.randn(tokens, D_IN, generator=make, dtype=torch.float64)
    return stack, x, torch.randn(tokens, D_OUT, generator=make, dtype=torch.float64)


def row_distance(matrix: Tensor, x: Tensor, y: Tensor, row: int, tokens: str = "all") -> Tensor:
    """By hand: how far a matrix moves the prompt of a row, on average."""
    start = sum(COUNTS[:row])
    chosen = range(start, start + PROMPTS[row])
    if tokens == "last":
        chosen = chosen[-1:]
    found = [(functional.silu(y[t] + matrix @ x[t]) - functional.silu(y[t])).norm() for t in chosen]
    return torch.stack(found).mean()


def margins(matrix: Tensor, x: Tensor, y: Tensor, edit: int, unit: float) -> Tensor:
    rows = [row for row in range(6) if OWNER[row] == edit]
    near = [row_distance(matrix, x, y, row) / unit for row in rows if ROLES[row] < 3]
    far = [row_distance(matrix, x, y, row) / unit for row in rows if ROLES[row] >= 3]
    loss = torch.stack([(1.5 - d).relu() for d in near]).mean() + torch.stack([(d - 0.3).relu() for d in far]).mean()
    return 0.7 * (loss + torch.stack([(b - a + 0.8).relu() for a in near for b in far]).mean())


def test_margins_are_those_of_the_paper_over_an_edits_own_rows() -> None:
    stack, x, y = fitted()
    stack.begin_step()
    stack.delta(0, x, spans(), y)
    loss = stack.extra_loss()
    assert loss is not None
    matrices = stack.parts["2.down:delta"].clone().requires_grad_()
    expected = torch.stack([margins(matrices[0], x, y, 0, 2.0), torch.zeros(()), margins(matrices[2], x, y, 2, 4.0)])
    assert bool((expected.detach()[[0, 2]] > 0).all())
    assert_close(loss, expected.detach(), length=50)
    loss.sum().backward()
    stack.end_step()
    (grad,) = torch.autograd.grad(expected.sum(), matrices)
    wanted = grad.flatten(1)
    apply_mask_(wanted, stack.fixed["2.down:mask"], 0.5)
    assert_close(stack.grad, wanted, length=50)
    assert 0 < int((stack.grad[0] != 0).sum()) < stack.grad.shape[1]


def test_every_edit_has_a_mask_of_its_own() -> None:
    stack, _, _ = fitted()
    stack.grad.fill_(1.0)
    stack._fresh = dict.fromkeys(stack.shapes, False)
    stack.end_step()
    assert not torch.equal(stack.grad[0], stack.grad[2])
    assert 0.2 < float(stack.grad.mean()) < 0.8


def test_margins_come_once_per_forward_pass_and_only_from_a_fit() -> None:
    stack, x, y = fitted()
    assert stack.extra_loss() is None
    with torch.no_grad():
        stack.delta(0, x, spans(), y)
    assert stack.extra_loss() is None
    stack.delta(0, x, spans(), y)
    assert stack.extra_loss() is not None
    assert stack.extra_loss() is None
    stack.row_roles = ()
    stack.delta(0, x, spans(), y)
    assert stack.extra_loss() is None


def test_a_fresh_delta_has_finite_gradients() -> None:
    """The distance has no slope at 0."""
    stack, x, y = fitted()
    stack.restart([0, 1, 2])
    for edit in range(3):
        stack.set(edit, {"2.down:unit": torch.ones(1)})
    stack.begin_step()
    stack.delta(0, x, spans(), y)
    loss = stack.extra_loss()
    assert loss is not None
    loss.sum().backward()
    stack.end_step()
    assert bool(stack.grad.isfinite().all())


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_thresholds_are_measured_when_an_edit_ends(tokens: str) -> None:
    """At the values of then, which are one step further than those of the last forward pass."""
    stack, x, y = fitted(tokens=tokens)
    stack.delta(0, x, spans(), y)
    stack.flat.mul_(1.5)
    matrices = stack.parts["2.down:delta"].clone()
    for edit, rows in ((0, (0, 1)), (2, (4,))):
        delta = stack.unstack(edit)
        expected = 0.5 * torch.stack([row_distance(matrices[edit], x, y, row, tokens) for row in rows]).min()
        assert float(delta.tensors["2.down:threshold"]) == pytest.approx(float(expected), rel=1e-10)
    # an edit without rows keeps what it has
    assert float(stack.unstack(1).tensors["2.down:threshold"]) == 0.0


def test_earlier_edits_count_in_distances() -> None:
    """Fitted on top of another memory, it is both together that have to move and to stay."""
    stack, x, y = fitted()
    earlier: SideDelta = new_stack(spec(), 1, dtype=torch.float64, trainable=False)
    earlier.flat.copy_(torch.randn(earlier.flat.shape, generator=torch.Generator().manual_seed(9)))
    stack.earlier = [earlier]
    matrices = stack.parts["2.down:delta"] + earlier.parts["2.down:delta"]
    stack.delta(0, x, spans(), y)
    loss = stack.extra_loss()
    assert loss is not None
    assert float(loss[0].detach()) == pytest.approx(float(margins(matrices[0], x, y, 0, 2.0).detach()), rel=1e-9)
    expected = 0.5 * min(float(row_distance(matrices[0], x, y, row)) for row in (0, 1))
    assert float(stack.unstack(0).tensors["2.down:threshold"]) == pytest.approx(expected, rel=1e-9)


def test_a_copy_is_of_one_map() -> None:
    with pytest.raises(ValueError, match="one linear map"):
        new_stack(DeltaSpec("side", (SITE, replace(SITE, layer=3)), OPTIONS), 1)


def memory(seed: int, threshold: float = 1.0, edits: float = 1.0) -> EditDelta:
    make = torch.Generator().manual_seed(seed)
    tensors = {
        "2.down:delta": torch.randn(D_OUT, D_IN, generator=make),
        "2.down:mask": torch.full((4,), float(seed)),
        "2.down:unit": torch.ones(1),
        "2.down:threshold": torch.tensor([threshold]),
        "2.down:edits": torch.tensor([edits]),
        "2.down:merged": torch.zeros(1),
    }
    return EditDelta(spec(), tensors, "model", f"edit-{seed}")


def test_memories_add_up() -> None:
    one, two = memory(1, threshold=2.0), memory(2, threshold=3.0, edits=4.0)
    both = accumulate([one, two])
    assert_close(both.tensors["2.down:delta"], one.tensors["2.down:delta"] + two.tensors["2.down:delta"], length=2)
    found = {name: float(both.tensors[f"2.down:{name}"]) for name in ("threshold", "edits", "merged")}
    assert found == {"threshold": 2.0, "edits": 5.0, "merged": 0.0}
    assert both.request_id == "edit-1+edit-2"


def test_an_empty_memory_acts_nowhere_and_adds_nothing() -> None:
    one = memory(1, threshold=2.0)
    empty = empty_side(one)
    assert float(empty.tensors["2.down:threshold"]) == float("inf")
    assert float(empty.tensors["2.down:edits"]) == 0.0
    both = accumulate([empty, one])
    assert torch.equal(both.tensors["2.down:delta"], one.tensors["2.down:delta"])
    assert float(both.tensors["2.down:threshold"]) == 2.0


def test_ties_by_hand() -> None:
    one = torch.tensor([3.0, -1.0, 0.1, 2.0, 0.2, -4.0])
    two = torch.tensor([1.0, 2.0, -5.0, -2.5, 0.1, -1.5])
    # half of each stays: 3, 2, -4 and 2, -5, -2.5; signs by mass: + + - - . -
    assert ties([one, two], 0.5).tolist() == [3.0, 2.0, -5.0, -2.5, 0.0, -4.0]
    # all stays: 4 and 2 in, signs + + - - + -; agreeing values averaged
    assert ties([one, two], 1.0).tolist() == pytest.approx([2.0, 2.0, -5.0, -2.5, 0.15, -2.75])


def test_ties_of_one_and_of_equals_change_nothing_but_trim() -> None:
    one = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ties([one], 1.0), one)
    assert_close(ties([one, one, one], 1.0), one, length=3)
    kept = ties([one], 0.53)
    assert int((kept != 0).sum()) == round(0.53 * 1200)
    assert float(kept[kept != 0].abs().min()) > float(one[kept == 0].abs().max())
    assert torch.equal(ties([-one], 0.53), -kept)


def test_ties_keep_entries_that_masks_set_apart() -> None:
    """Where only one of the memories has anything, it stays what it is."""
    one, two = torch.zeros(100), torch.zeros(100)
    one[:20], two[50:70] = 1.5, -2.5
    assert torch.equal(ties([one, two], 0.53), one + two)


@pytest.mark.parametrize(("count", "density"), [(0, 0.5), (1, 0.0), (1, 1.1)])
def test_ties_that_cannot_be(count: int, density: float) -> None:
    with pytest.raises(ValueError, match=rf"changes={count}, density={density}"):
        ties([torch.ones(2)] * count, density)


def test_merged_memories_hold_the_edits_of_all() -> None:
    merged = merged_side([memory(1, 2.0, 3.0), memory(2, 1.0, 4.0)], 1.0)
    found = {name: float(merged.tensors[f"2.down:{name}"]) for name in ("threshold", "edits", "merged")}
    assert found == {"threshold": 1.0, "edits": 7.0, "merged": 1.0}
    assert merged.request_id == "edit-1+edit-2"


def test_an_edit_that_enters_has_its_own_mask() -> None:
    stack, *_ = fitted()

    def kept(names: tuple[str, str, str]) -> Tensor:
        goal = torch.ones_like(stack.grad)
        apply_mask_(goal, torch.tensor([mask_key(0, name) for name in names]), 0.5)
        return goal

    def after_a_step() -> Tensor:
        stack.begin_step()
        stack.receive("2.down:delta", torch.ones_like(stack.part_grads["2.down:delta"]))
        stack.end_step()
        return stack.grad

    assert torch.equal(after_a_step(), kept(("0", "1", "2")))
    stack.restart([1])
    stack.set(1, {"2.down:mask": torch.tensor(mask_key(0, "another"))})
    assert torch.equal(after_a_step(), kept(("0", "another", "2")))
    deltas = [stack.unstack(number) for number in (1, 0, 2)]
    stack.copy_from(deltas)
    assert torch.equal(after_a_step(), kept(("another", "0", "2")))
