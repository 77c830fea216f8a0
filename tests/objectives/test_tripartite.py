"""The tripartite risk and its environment gradients against double backward through a dummy multiplier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.objectives import ROLES, Role, TokenBatch, tripartite
from fastedit.objectives.tripartite import SCALES

D, V = 6, 11


def make_batch(n_edits: int = 2, seed: int = 0, *, drop: tuple[Role, ...] = ()) -> tuple[TokenBatch, Tensor]:
    """A packed batch whose logits are a head of its hidden states; and that head."""
    generator = torch.Generator().manual_seed(seed)
    roles = [role for role in ROLES if role not in drop]
    edit, role = [], []
    for b in range(n_edits):
        for r in roles:
            count = 1 + int(torch.randint(1, 4, (), generator=generator))
            edit += [b] * count
            role += [int(r)] * count
    tokens = len(edit)
    hidden = torch.randn(tokens, D, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    out = torch.tensor([r >= Role.TEXT_LOCALITY for r in role])
    reference = torch.randn(int(out.sum()), V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (tokens,), generator=generator)
    batch = TokenBatch(
        hidden=hidden, logits=hidden @ head.T, labels=labels, edit=torch.tensor(edit), role=torch.tensor(role),
        n_edits=n_edits, reference=reference,
    )  # fmt: skip
    return batch, head


def plain_risks(batch: TokenBatch, head: Tensor, w: Tensor, direction: str, unbiased: bool) -> Tensor:
    """(B, 6) risks written out with a dummy multiplier on the final hidden states."""
    hidden = w * batch.hidden
    log_p = F.log_softmax(hidden @ head.T, -1)
    assert batch.reference is not None
    log_q = torch.zeros_like(log_p)
    log_q[batch.role >= int(Role.TEXT_LOCALITY)] = F.log_softmax(batch.reference, -1)
    rows = []
    for b in range(batch.n_edits):
        row = []
        for role in ROLES:
            chosen = (batch.edit == b) & (batch.role == int(role))
            if not chosen.any():
                row.append(torch.zeros((), dtype=torch.float64))
            elif role < Role.TEXT_LOCALITY:
                row.append(F.nll_loss(log_p[chosen], batch.labels[chosen]))
            else:
                p, q = log_p[chosen], log_q[chosen]
                kl = (p.exp() * (p - q)) if direction == "reverse_kl" else (q.exp() * (q - p))
                row.append(kl.sum(-1).mean())
        x = hidden[(batch.edit == b) & (batch.role == int(Role.EDIT))]
        y = hidden[(batch.edit == b) & ((batch.role == 1) | (batch.role == 2))]
        row.append(plain_mmd(x, y, unbiased) if len(y) else torch.zeros((), dtype=torch.float64))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def plain_mmd(x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    pooled = torch.cat([x, y]).detach()
    distances = (pooled[:, None] - pooled[None]).square().sum(-1)
    n = len(pooled)
    sigma2 = distances.sum() / (n * (n - 1)) * torch.tensor(SCALES, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b[None]).square().sum(-1)[..., None] / (2 * sigma2)).sum(-1)

    def within(a: Tensor) -> Tensor:
        gram, count = kernel(a, a), len(a)
        if not unbiased:
            return gram.mean()
        return (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_risks_and_environment_gradients_equal_double_backward(direction: str, unbiased: bool) -> None:
    batch, head = make_batch()
    table = tripartite(batch, direction=direction, unbiased=unbiased)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    expected = plain_risks(batch, head, w, direction, unbiased)
    gradients = torch.stack([torch.autograd.grad(v, w, create_graph=True)[0] for v in expected.flatten()])
    torch.testing.assert_close(table.value, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(table.env_grad.flatten(), gradients, atol=1e-10, rtol=1e-10)

    weights = torch.randn(expected.shape, dtype=torch.float64)
    ours = (weights * (table.value + table.env_grad.square())).sum()
    theirs = (weights * (expected + gradients.view_as(expected).square())).sum()
    (got,) = torch.autograd.grad(ours, batch.hidden)
    (wanted,) = torch.autograd.grad(theirs, batch.hidden)
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_per_token_means_are_the_segment_means() -> None:
    batch, _ = make_batch(3, seed=1)
    table, split = tripartite(batch), tripartite(batch, per_token=True)
    torch.testing.assert_close(split.value, table.value)
    torch.testing.assert_close(split.env_grad, table.env_grad)
    assert split.token_grad is not None
    assert split.token_grad.shape == batch.labels.shape


def test_absent_views_are_marked_and_count_nothing() -> None:
    batch, _ = make_batch(2, drop=(Role.IMAGE_REPHRASE, Role.TEXT_LOCALITY))
    table = tripartite(batch)
    assert table.present[0].tolist() == [True, True, False, False, True, True]
    assert table.value[:, [2, 3]].abs().max() == 0


def test_without_rephrases_there_is_no_generality_risk() -> None:
    batch, _ = make_batch(2, drop=(Role.IMAGE_REPHRASE, Role.TEXT_REPHRASE))
    table = tripartite(batch)
    assert not table.present[:, -1].any()
    assert table.value[:, -1].abs().max() == 0


def test_locality_is_zero_when_nothing_moved() -> None:
    batch, _ = make_batch()
    batch.reference = batch.logits.detach()[batch.role >= int(Role.TEXT_LOCALITY)]
    table = tripartite(batch)
    assert table.value[:, 3:5].abs().max() < 1e-15
    assert table.env_grad[:, 3:5].abs().max() < 1e-14


def test_an_edit_does_not_see_its_neighbours() -> None:
    batch, _ = make_batch(2)
    table = tripartite(batch)
    own = batch.edit == 0
    out = batch.role >= int(Role.TEXT_LOCALITY)
    assert batch.reference is not None
    alone = TokenBatch(
        batch.hidden[own], batch.logits[own], batch.labels[own], batch.edit[own], batch.role[own], 1,
        batch.reference[own[out]],
    )  # fmt: skip
    torch.testing.assert_close(tripartite(alone).value[0], table.value[0], atol=1e-13, rtol=1e-13)


def test_reference_logits_are_required() -> None:
    batch, _ = make_batch()
    batch.reference = None
    with pytest.raises(ValueError, match=r"need reference logits \(got reference=None\)"):
        tripartite(batch)
