"""What is no change of weights is refused by name and told what serves instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.export.weights import require_weights


def delta(kind: str, texts: dict[str, str] | None = None, **options: Any) -> EditDelta:
    spec = DeltaSpec(kind, (Site(1, "down", 4, 3, "layers.1.down"),), options)
    return EditDelta(spec, {"1.down:delta": torch.zeros(3, 4)}, request_id="e1", texts=texts or {})


def test_full_and_low_rank_are_weights() -> None:
    require_weights([delta("full"), delta("low_rank", rank=2, router=None), delta("full", positions="all")], "peft")


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (delta("codebook"), "a delta of kind 'codebook' is none"),
        (delta("low_rank", rank=1, router="ball"), "acts on the prompts that its router 'ball' chooses"),
        (delta("full", positions="after_image"), "acts on some tokens of a prompt"),
        (delta("full", {"template": "Now {prompt}"}), "asks another question"),
    ],
    ids=["kind", "router", "positions", "template"],
)
def test_all_else_is_refused(refused: EditDelta, why: str) -> None:
    with pytest.raises(
        ValueError, match=r"fastedit.attach lets it act .* \(got deltas\[1\] of request 'e1'\)"
    ) as error:
        require_weights([delta("full"), refused], "peft")
    assert why in str(error.value)
