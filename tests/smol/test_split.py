from __future__ import annotations

import pytest

from fastedit.smol.concepts import concepts
from fastedit.smol.split import concepts_of


@pytest.mark.parametrize("kind", ["icon", "flag", "animal", None])
def test_the_splits_share_no_concept_and_have_enough(kind: str | None) -> None:
    train, held = set(concepts_of("train", kind)), set(concepts_of("eval", kind))
    assert not train & held
    assert len(train) > 1.3 * len(held) > 20
    if kind is None:
        assert train | held == {concept.name for concept in concepts()}
