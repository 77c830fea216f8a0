"""A delta that no memory holds is a sentence, not an allocation that fails."""

from __future__ import annotations

import pytest
import torch

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec
from fastedit.deltas.kinds import new_stack

SITES = (Site(0, "down", "a", 4096, 4096),)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("low_rank", {"rank": 10**9}), ("codebook", {"values": 10**9}), ("full", {})],
)
def test_a_delta_larger_than_all_memory_is_refused(kind: str, options: dict[str, int]) -> None:
    sites = SITES if options else (Site(0, "down", "a", 10**7, 10**7),)
    named = "".join(f"{name}={value}, " for name, value in options.items())
    rule = rf"^delta: one of kind '{kind}' must fit into the \d+ MiB of cpu \(got \d+ MiB, {named}sites=1\)"
    with pytest.raises(ValueError, match=rule):
        new_stack(DeltaSpec(kind, sites, options), 1, dtype=torch.float32)


def test_one_that_fits_is_allocated() -> None:
    stacked = new_stack(DeltaSpec("low_rank", SITES, {"rank": 2}), 3, trainable=False)
    assert stacked.flat.shape == (3, 2 * 2 * 4096)
