"""Masks by counter-based random numbers: Philox itself, what a mask is a function of, and its statistics."""

import math

import pytest
import torch

from fastedit.deltas import random_mask
from fastedit.deltas.random_mask import apply_mask_, dropped_entries, mask_key, philox

# Known answers of Philox4x32-10 that come with the authors' Random123 1.14: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text):
    return [torch.tensor([int(word, 16)]) for word in text.split()]


def made(names, width, keep=0.2, seed=0):
    """Masks (B, width), 1 where an entry is kept."""
    values = torch.ones(len(names), width)
    apply_mask_(values, torch.tensor([mask_key(seed, name) for name in names]), keep)
    return values


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    assert [int(word) for word in philox(numbers(counter), numbers(key))] == [int(w) for w in numbers(words)]


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_the_kept_share(keep):
    count = 400_000
    got = float(made(["a"], count, keep).mean())
    assert abs(got - keep) <= 4 * math.sqrt(keep * (1 - keep) / count) + 2**-16


def test_neighbours_and_edits_are_independent():
    """Two entries that have anything in common are both kept as often as two that have nothing: keep squared."""
    count, keep = 400_000, 0.2
    masks = made(["a", "b"], count, keep)
    pairs = [masks[0] * masks[1], *(masks[0, step:] * masks[0, :-step] for step in (1, 2, 4, 7, 8, 384))]
    for pair in pairs:
        error = math.sqrt(keep**2 * (1 - keep**2) / pair.numel())
        # neighbouring products share factors, which adds a little to their error
        assert abs(float(pair.mean()) - keep**2) < 6 * error


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_columns_of_a_matrix_get_their_share(dim):
    """The counts follow a binomial distribution: chi-square over rows and over columns."""
    keep, mask = 0.2, made(["c"], 256 * 512)[0].view(256, 512)
    counts = mask.sum(dim)
    each = mask.shape[dim]
    chi = float(((counts - each * keep) ** 2 / (each * keep * (1 - keep))).sum())
    free = counts.numel()
    assert abs(chi - free) < 5 * math.sqrt(2 * free)


def test_a_mask_is_a_function_of_key_and_place_alone(monkeypatch):
    alone, wide = made(["a"], 999), made(["b", "a", "c"], 3001)
    assert torch.equal(alone[0], wide[1, :999])
    assert not torch.equal(wide[0], wide[1])
    assert not torch.equal(made(["a"], 999, seed=1), alone)
    monkeypatch.setattr(random_mask, "_COUNTERS", 7)
    assert torch.equal(made(["b", "a", "c"], 3001), wide)


def test_more_is_kept_where_less_was():
    """The same draws under a larger share: nothing that was kept is dropped."""
    few, many = made(["a"], 5000, 0.2), made(["a"], 5000, 0.4)
    assert bool((many >= few).all())
    assert float(many.sum()) > float(few.sum())


def test_this_mask_stays_this_mask():
    """Deltas are fitted under it: another one after an update would go unnoticed."""
    assert made(["edit-1"], 40, 0.2)[0].nonzero().flatten().tolist() == [0, 6, 17, 26, 34, 38]
    assert mask_key(3, "edit-1") == (31522.0, 25779.0, 65471.0, 30893.0)


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9])
def test_odd_widths(width):
    assert torch.equal(made(["a"], width)[0], made(["a"], 16)[0, :width])


def test_values_that_are_kept_keep_every_bit():
    values = torch.randn(2, 1000, dtype=torch.float64)
    before = values.clone()
    apply_mask_(values, torch.tensor([mask_key(0, "a"), mask_key(0, "b")]), 0.3)
    kept = values != 0
    assert torch.equal(values[kept], before[kept])
    assert 0 < int(kept.sum()) < 2000


def test_a_view_of_a_larger_row_is_masked_in_place():
    row = torch.ones(2, 50)
    apply_mask_(row[:, 10:30], torch.tensor([mask_key(0, "a"), mask_key(0, "b")]), 0.0)
    assert row.sum() == 60
    assert bool((row[:, 10:30] == 0).all())


@pytest.mark.parametrize(
    ("values", "keys", "keep", "told"),
    [
        (torch.ones(4), torch.ones(4, 4), 0.2, r"values=\(4,\)"),
        (torch.ones(2, 3), torch.ones(3, 4), 0.2, r"keys=\(3, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 4), 1.5, "keep=1.5"),
    ],
)
def test_what_cannot_be(values, keys, keep, told):
    with pytest.raises(ValueError, match=told):
        apply_mask_(values, keys, keep)


@pytest.mark.parametrize("keep", [0.0, 0.2, 1.0])
def test_dropped_entries_are_what_is_set_to_zero(keep: float) -> None:
    keys = torch.tensor([mask_key(0, "a"), mask_key(0, "b"), mask_key(0, "c")])
    values = torch.ones(3, 1003)
    apply_mask_(values, keys, keep)
    assert torch.equal(dropped_entries(keys, 1003, keep), values == 0)
