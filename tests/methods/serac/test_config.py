"""Settings of SERAC, and its published loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.methods.serac.config import SERACConfig, SeracObjective
from fastedit.objectives import Role, TokenBatch


def test_cached_text_is_filled_once() -> None:
    assert SERACConfig().cached(" What? ", "{question}") == "What? {question}\n"
    assert SERACConfig(context="{answer}: {question} ").cached("{answer}", "b") == "b: {answer} "


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": "{question}"}, {"context": "{question}{question}{answer}"}, {"rank": -1}, {"alpha": 0.0},
        {"threshold": 1.0}, {"swap": 1.5}, {"scope_batch": 0}, {"locality_weight": -1.0}, {"names": ()},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"serac: .*{next(iter(wrong))}"):
        SERACConfig(**wrong)


def batch() -> TokenBatch:
    """Two edits; the second has no image locality."""
    generator = torch.Generator().manual_seed(0)
    role = [Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE, Role.TEXT_LOCALITY, Role.IMAGE_LOCALITY]
    roles, edit = torch.tensor([*role, *role[:4]]), torch.tensor([0] * 5 + [1] * 4)
    logits = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    kept = roles >= int(Role.TEXT_LOCALITY)
    reference = torch.randn(int(kept.sum()), 6, generator=generator, dtype=torch.float64)
    return TokenBatch(logits, logits, torch.arange(9) % 6, edit, roles, 2, reference)


@pytest.mark.parametrize("faithful", [False, True])
def test_loss_is_the_weighted_sum_of_its_parts(faithful: bool) -> None:
    tokens = batch()
    config = SERACConfig(edit_weight=0.2, image_edit_weight=0.3, locality_weight=0.7, faithful=faithful)
    losses = SeracObjective(config)(tokens, 0)
    log = tokens.logits.log_softmax(-1)
    nll = -log[torch.arange(9), tokens.labels]
    assert tokens.reference is not None
    before = tokens.reference.log_softmax(-1)
    kl = (before.exp() * (before - log[[3, 4, 8]])).sum(-1)
    first = 0.1 * nll[0] + 0.1 * nll[1] + 0.3 * nll[2] + 0.7 * kl[0] + (0.0 if faithful else 0.7) * kl[1]
    second = 0.1 * nll[5] + 0.1 * nll[6] + 0.3 * nll[7] + 0.7 * kl[2]
    torch.testing.assert_close(losses.total, torch.stack([first, second]))
    torch.testing.assert_close(losses.nll, nll[[0, 5]])
