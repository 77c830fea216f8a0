import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.baselines.metrics import (
    NO_TOKEN,
    all_right,
    kl_divergence,
    ranked_agreement,
    token_accuracy,
    top_ids,
)

NAN = math.nan


def bits(*rows: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def same(value: Tensor, expected: list[float]) -> None:
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-12)


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# top_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 17])
def test_top_ids_are_the_largest_best_first(dtype: torch.dtype, k: int) -> None:
    logits = random_logits(2, 5, 17, dtype=dtype)
    expected = sorted_ids(logits, k)
    assert torch.equal(top_ids(logits, k), expected)


def sorted_ids(logits: Tensor, k: int) -> Tensor:
    """Order by (value descending, id ascending), in plain Python."""
    rows = [
        sorted(range(logits.shape[-1]), key=lambda i: (-row[i], i))[:k]
        for row in logits.reshape(-1, logits.shape[-1]).tolist()
    ]
    return torch.tensor(rows).reshape(*logits.shape[:-1], k)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_ties_are_ordered_by_id(rows: list[list[int]], k: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(top_ids(logits, k), sorted_ids(logits, k))


def test_long_ties_are_ordered_by_id() -> None:
    logits = torch.zeros(3, 20_000, dtype=torch.bfloat16)
    logits[1, 19_000] = 1.0
    logits[2, 7] = NAN
    found = top_ids(logits, 500)
    assert found[0].tolist() == list(range(500))
    assert found[1].tolist() == [19_000, *range(499)]
    assert (found[2] == NO_TOKEN).all()


def test_infinite_logits_are_ordered() -> None:
    logits = torch.tensor([[-math.inf, 0.0, math.inf, -math.inf], [-math.inf] * 4])
    assert top_ids(logits, 3).tolist() == [[2, 1, 0], [0, 1, 2]]
    largest = torch.finfo(torch.float32).max
    assert top_ids(torch.tensor([largest, math.inf]), 2).tolist() == [1, 0]


def test_a_diverged_position_has_no_token() -> None:
    logits = torch.tensor([[[0.0, 1.0, NAN], [0.0, 1.0, 2.0]]])
    assert top_ids(logits, 2).tolist() == [[[NO_TOKEN, NO_TOKEN], [2, 1]]]
    assert top_ids(torch.tensor([NAN, NAN, 0.0, 0.0]), 3).tolist() == [NO_TOKEN] * 3


def test_top_ids_of_nothing() -> None:
    assert top_ids(torch.empty(0, 3, 7), 2).shape == (0, 3, 2)


@pytest.mark.parametrize("k", [0, 8])
def test_k_is_checked(k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_ids: k must be 1 to V \(got k={k}, logits of shape \(2, 7\)"):
        top_ids(torch.zeros(2, 7), k)


# token accuracy


def test_accuracy_is_the_share_of_masked_positions() -> None:
    predicted = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 9, 3], [1, 2, 3]])
    labels = torch.tensor([[1, 2, 3], [1, 0, 0], [1, 2, 3], [1, 2, 3]])
    mask = bits("111", "110", "001", "000")
    same(token_accuracy(predicted, labels, mask), [1.0, 0.5, 1.0, NAN])
    same(all_right(predicted, labels, mask), [1.0, 0.0, 1.0, NAN])


def test_no_token_is_never_right_even_where_labels_are_undefined() -> None:
    predicted = torch.full((1, 2), NO_TOKEN)
    same(token_accuracy(predicted, predicted, bits("11")), [0.0])
    same(all_right(predicted, predicted, bits("11")), [0.0])


def test_padding_does_not_change_a_row() -> None:
    predicted, labels = torch.tensor([[1, 2]]), torch.tensor([[1, 3]])
    padded = token_accuracy(torch.tensor([[1, 2, 7, 7]]), torch.tensor([[1, 3, 7, 7]]), bits("1100"))
    assert torch.equal(token_accuracy(predicted, labels, bits("11")), padded)


# agreement


def test_a_swap_of_two_ranks_costs_both() -> None:
    before = torch.tensor([[[0, 1, 2, 3, 4]]])
    after = torch.tensor([[[0, 1, 3, 2, 4]]])
    same(ranked_agreement(before, after, bits("1")), [0.6])


def test_agreement_is_the_mean_over_masked_positions() -> None:
    before = torch.tensor([[[0, 1], [2, 3], [4, 5]]] * 3)
    after = torch.tensor([[[0, 1], [2, 9], [8, 9]]] * 3)
    mask = bits("111", "010", "000")
    same(ranked_agreement(before, after, mask), [0.5, 0.5, NAN])


def test_diverged_models_do_not_agree() -> None:
    broken = torch.full((1, 1, 3), NO_TOKEN)
    same(ranked_agreement(broken, broken, bits("1")), [0.0])


def test_kl_is_the_definition() -> None:
    before, after = random_logits(3, 4, 9, dtype=torch.float64), random_logits(3, 4, 9, seed=1, dtype=torch.float64)
    mask = bits("1111", "0100", "0000")
    p, q = before.softmax(-1), after.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    expected = [each[0].mean().item(), each[1, 1].item(), NAN]
    torch.testing.assert_close(
        kl_divergence(before, after, mask),
        torch.tensor(expected, dtype=torch.float64),
        equal_nan=True,
        rtol=1e-12,
        atol=0,
    )


def test_kl_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = random_logits(4, 5, 9), random_logits(4, 5, 9, seed=1)
    mask = bits("11111", "00000", "10101", "01000")
    whole = kl_divergence(before, after, mask)
    monkeypatch.setattr("benchmarks.baselines.metrics._CHUNK", 20)
    assert torch.equal(kl_divergence(before, after, mask).nan_to_num(-1.0), whole.nan_to_num(-1.0))
    assert kl_divergence(before, after, torch.zeros(4, 5, dtype=torch.bool)).isnan().all()


def test_kl_is_directed() -> None:
    # KL((1/2, 1/2) || (3/4, 1/4)) and the other way round.
    before, after = torch.zeros(1, 1, 2).double(), torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64)
    same(kl_divergence(before, after, bits("1")), [0.5 * math.log(4 / 3)])
    same(kl_divergence(after, before, bits("1")), [0.75 * math.log(3) - math.log(2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kl_is_computed_in_float32_and_stable(dtype: torch.dtype) -> None:
    before = random_logits(2, 3, 1000, dtype=dtype) * 30
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(kl_divergence(before, before, mask), torch.zeros(2, dtype=torch.float64))
    # A constant does not change a distribution, however large: exp of it would overflow.
    wide = before.float()
    shifted = kl_divergence(wide, wide + 4096.0, mask)
    assert (shifted < 1e-2).all()
    exact = kl_divergence(before.double(), before.flip(-1).double(), mask)
    torch.testing.assert_close(kl_divergence(before, before.flip(-1), mask), exact, rtol=1e-4, atol=0)


def test_kl_never_goes_below_zero() -> None:
    before = random_logits(50, 2, 300)
    noise = kl_divergence(
        before, before + 1e-7 * random_logits(50, 2, 300, seed=1), torch.ones(50, 2, dtype=torch.bool)
    )
    assert (noise >= 0).all()


def test_kl_of_ruled_out_tokens() -> None:
    inf = math.inf
    before = torch.tensor([[[0.0, 0.0, -inf]]])
    same(kl_divergence(before, torch.tensor([[[0.0, 0.0, -inf]]]), bits("1")), [0.0])
    same(kl_divergence(before, torch.tensor([[[0.0, -inf, 0.0]]]), bits("1")), [inf])


def test_kl_of_a_diverged_model_is_infinite_and_looks_at_the_mask_only() -> None:
    before = torch.zeros(2, 2, 3)
    after = before.clone()
    after[:, 1] = NAN
    same(kl_divergence(before, after, bits("11", "10")), [math.inf, 0.0])


# errors


def test_shapes_are_checked() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"token_accuracy: labels must agree with the mask .*labels=\(2, 2\)"):
        token_accuracy(ids, ids[:, :2], mask)
    with pytest.raises(ValueError, match=r"mask must be \(R, M\) bool .*int64"):
        token_accuracy(ids, ids, mask.long())
    with pytest.raises(ValueError, match="ranked_agreement: before and after must agree"):
        ranked_agreement(torch.zeros(2, 3, 1), torch.zeros(2, 3, 2), mask)
    with pytest.raises(ValueError, match="kl_divergence: before and after must agree"):
        kl_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), mask)
