"""Encoded rows as containers."""

from __future__ import annotations

import torch

from fastedit.backbone.states import join_padded


def test_joining_pads_every_dimension_with_zeros() -> None:
    joined = join_padded([torch.ones(1, 2, 3), torch.ones(2, 3, 1)])
    assert joined.shape == (3, 3, 3)
    assert joined.sum() == 12
