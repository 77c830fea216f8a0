"""NLL with a KL term: how rephrased views count, and when an edit is right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastedit.objectives import KLObjective, Role, TokenBatch


def batch(*, without: tuple[Role, ...] = ()) -> TokenBatch:
    """Two tokens of every fitted role for each of two edits."""
    make = torch.Generator().manual_seed(0)
    roles = [role for role in (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE) if role not in without]
    role = torch.tensor([int(r) for r in roles for _ in range(2)] * 2)
    count = len(role)
    return TokenBatch(
        hidden=torch.randn(count, 3, generator=make),
        logits=torch.randn(count, 7, generator=make, requires_grad=True),
        labels=torch.randint(0, 7, (count,), generator=make),
        edit=torch.tensor([0] * (count // 2) + [1] * (count // 2)),
        role=role,
        n_edits=2,
    )


@pytest.mark.parametrize("without", [(), (Role.TEXT_REPHRASE,), (Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE)])
def test_rephrased_views_have_a_weight_of_their_own(without: tuple[Role, ...]) -> None:
    tokens = batch(without=without)
    found = KLObjective(1.0, rephrases=True, rephrase_weight=0.5)(tokens, 0)
    each = F.cross_entropy(tokens.logits, tokens.labels, reduction="none")
    for edit in range(2):
        means = {
            role: each[(tokens.edit == edit) & (tokens.role == int(role))].mean()
            for role in (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE)
            if role not in without
        }
        rest = [value for role, value in means.items() if role is not Role.EDIT]
        expected = means[Role.EDIT] + (0.5 * sum(rest) / len(rest) if rest else 0.0)
        torch.testing.assert_close(found.total[edit], expected)
        torch.testing.assert_close(found.nll[edit], max(means.values()).detach())
    plain = KLObjective(1.0, rephrases=True)(tokens, 0)
    assert not torch.allclose(plain.total, found.total) or len(without) == 2


def test_an_edit_is_right_where_its_rephrased_views_are() -> None:
    tokens = batch()
    logits = F.one_hot(tokens.labels, 7).float()
    wrong = ((tokens.edit == 1) & (tokens.role == int(Role.IMAGE_REPHRASE))).nonzero()[0]
    logits[wrong] = -logits[wrong]
    tokens.logits = logits
    assert KLObjective(rephrases=True, rephrase_weight=0.5)(tokens, 0).correct.tolist() == [True, False]
    assert KLObjective(rephrases=True)(tokens, 0).correct.tolist() == [True, True]


def test_a_role_weighs_the_same_whatever_the_number_of_its_views() -> None:
    assert KLObjective(n_views=3).roles == (Role.EDIT, *[Role.TEXT_LOCALITY] * 3, *[Role.IMAGE_LOCALITY] * 3)
    edit, role = [0] * 7, [0, 1, 1, 1, 2, 2, 2]
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = TokenBatch(
        hidden=logits, logits=logits, labels=torch.arange(7) % 5, edit=torch.tensor(edit), role=torch.tensor(role),
        n_edits=1,
    )  # fmt: skip
    each = torch.nn.functional.cross_entropy(logits, tokens.labels, reduction="none")
    expected = torch.stack([each[0], each[1:4].mean(), each[4:].mean()]).mean()
    torch.testing.assert_close(KLObjective(rephrases=True, n_views=3)(tokens, 0).total[0], expected)
    apart = KLObjective(rephrases=True, n_views=3, rephrase_weight=0.5)(tokens, 0)
    torch.testing.assert_close(apart.total[0], each[0] + 0.5 * (each[1:4].mean() + each[4:].mean()) / 2)
