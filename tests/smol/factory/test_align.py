"""The first stage's loss falls where tokens say what they show."""

from __future__ import annotations

import torch

from fastedit.smol.factory.align import WORDS, Alignment, name_table
from fastedit.smol.factory.views import Layer, View
from fastedit.smol.scenes import BACKGROUNDS

GROUNDS = torch.eye(32)[8 : 8 + len(BACKGROUNDS)]
NAMES = torch.eye(32)[:3]
LETTERS = {group: torch.eye(32)[20 + at : 20 + at + len(each)] for at, (group, each) in enumerate(WORDS.items())}
VIEW = View("beside", (Layer(2, 0.2, 0.5, 0.4, 0), Layer(0, 0.8, 0.5, 0.4, 0)), (0, 0, 0), "red")


def test_a_name_is_the_mean_of_its_tokens() -> None:
    embedding = torch.arange(12.0).view(6, 2)
    table = name_table(embedding, lambda text: {" hot dog": [1, 3], " cat": [5]}[text], ["hot dog", "cat"])
    assert table.tolist() == [[4, 5], [10, 11]]


def test_targets_are_the_icons_and_the_grounds_name() -> None:
    cover = torch.full((1, 6, 6), -1)
    cover[0, 3, 0], cover[0, 3, 5] = 0, 1
    targets = Alignment(NAMES, GROUNDS, LETTERS).targets([VIEW], cover)
    assert targets[0, [18, 23]].tolist() == [2, 0]
    assert targets[0, 0] == len(NAMES) + list(BACKGROUNDS).index("red")


def test_a_ground_without_a_name_asks_for_nothing() -> None:
    view = View("one", (Layer(1, 0.5, 0.5, 0.5, 0),), (1, 2, 3), None)
    assert (Alignment(NAMES, GROUNDS, LETTERS).targets([view], torch.full((1, 6, 6), -1)) == -1).all()


def test_the_right_names_have_the_least_loss() -> None:
    alignment = Alignment(NAMES, GROUNDS, LETTERS)
    view, cover = View("one", (Layer(1, 0.5, 0.5, 0.5, 0),), (1, 2, 3), None), torch.zeros(1, 6, 6, dtype=torch.int64)
    right = (NAMES[1] + 0.1 * LETTERS["number"][0]).expand(1, 36, -1)
    loss, shares = alignment.loss(right, [view], cover)
    assert shares == {"number": 1.0, "tokens": 1.0, "pictures": 1.0}
    wrong, wrong_shares = alignment.loss((NAMES[0] + 0.1 * LETTERS["number"][1]).expand(1, 36, -1), [view], cover)
    assert wrong_shares == {"number": 0.0, "tokens": 0.0, "pictures": 0.0}
    assert float(loss) + 1 < float(wrong)
    long, _ = alignment.loss(3 * right, [view], cover)
    assert float(long - loss) > 0.5


def test_sides_are_asked_where_there_are_sides() -> None:
    cover = torch.full((2, 6, 6), -1)
    cover[:, 3, 0], cover[:, 3, 5] = 0, 1
    above = View("above", (Layer(2, 0.5, 0.2, 0.4, 0), Layer(0, 0.5, 0.8, 0.4, 0)), (0, 0, 0), None)
    sides = Alignment(NAMES, GROUNDS, LETTERS).sides([VIEW, above], cover)
    assert sides["column"][:, [18, 23, 0]].tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert sides["row"][:, [18, 23, 0]].tolist() == [[-1, -1, -1], [0, 1, -1]]
    assert sides["number"].eq(1).all()
