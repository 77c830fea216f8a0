"""The view of UniKE's spaces: arrays for a picture."""

from __future__ import annotations

import pytest
import torch

from fastedit.methods.unike.view import knowledge_view, plane
from fastedit.training import Artifact


def artifact(kind: str = "unike") -> Artifact:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"3:{name}": torch.randn(7, 5, generator=generator) for name in ("semantic", "positive", "negative")}
    shapes = ((5, 5), (5,), (5, 4), (4,))
    for encoder in ("enc_sem", "enc_tru"):
        tensors |= {f"3:{encoder}.{n}": torch.randn(s, generator=generator) for n, s in enumerate(shapes)}
    return Artifact(kind, "", {"layers": [3]}, tensors)


def test_every_point_has_its_kind_and_question() -> None:
    view = knowledge_view(artifact(), most=6)
    for name, count in (("semantic", 18), ("truthful", 12)):
        assert getattr(view, f"{name}_before").shape == getattr(view, f"{name}_after").shape == (count, 2)
        assert getattr(view, f"{name}_kinds").shape == getattr(view, f"{name}_triplets").shape == (count,)
    assert view.truthful_kinds.tolist() == [1] * 6 + [2] * 6
    assert view.semantic_triplets.tolist() == [*range(6)] * 3
    states = torch.cat([artifact().tensors[f"3:{name}"][:6] for name in ("semantic", "positive", "negative")])
    torch.testing.assert_close(view.semantic_before, plane(states))
    assert not torch.allclose(view.truthful_before, view.truthful_after)


def test_the_plane_is_that_of_the_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 2, generator=generator) * torch.tensor([5.0, 2.0])
    turned = points @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:2] + 3.0
    found = plane(turned)
    assert found.var(0)[0] > found.var(0)[1]
    exact = "donot_use_mm_for_euclid_dist"
    apart, before = torch.cdist(found, found, compute_mode=exact), torch.cdist(points, points, compute_mode=exact)
    torch.testing.assert_close(apart, before, rtol=1e-4, atol=1e-4)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_another_artifact_or_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"of \[\] \(got layer=None\)"):
        knowledge_view(artifact("mend"))
    with pytest.raises(ValueError, match=r"of \[3\] \(got layer=1\)"):
        knowledge_view(artifact(), 1)
