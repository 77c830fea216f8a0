"""What UniKE's encoders make of hidden states, in two dimensions: arrays for a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.deltas.attention_memory import encode
from fastedit.training import Artifact

#: What a point is, by its label.
KINDS = ("question", "right answer", "wrong answer")
_STATES = ("semantic", "positive", "negative")


@dataclass(frozen=True)
class KnowledgeView:
    """Points (N, 2), float32, each with its place in the plane of largest variance.

    Args:
        semantic_before, semantic_after: N = 3 M states and codes of questions, right answers and wrong ones.
        truthful_before, truthful_after: N = 2 M of answers alone.
        semantic_kinds, truthful_kinds: (N,) int64, places in ``KINDS``.
        semantic_triplets, truthful_triplets: (N,) int64, which question a point belongs to.
    """

    semantic_before: Tensor
    semantic_after: Tensor
    truthful_before: Tensor
    truthful_after: Tensor
    semantic_kinds: Tensor
    truthful_kinds: Tensor
    semantic_triplets: Tensor
    truthful_triplets: Tensor


def knowledge_view(artifact: Artifact, layer: int | None = None, *, most: int = 500) -> KnowledgeView:
    """The states of an artifact's memory before and after its encoders (UniKE, arXiv 2409.19872, section 4.5).

    Args:
        artifact: of "unike". layer: one of its own; None is the last. most: triplets, the first so many.
    Raises:
        ValueError: the artifact is of another kind, or has no such layer.
    """
    layers = artifact.config.get("layers", []) if artifact.kind == "unike" else []
    chosen = layers[-1] if layer is None and layers else layer
    if chosen not in layers:
        raise ValueError(f"knowledge_view: a layer of a 'unike' artifact, of {layers} (got layer={layer!r})")
    states = [artifact.tensors[f"{chosen}:{name}"][:most].float() for name in _STATES]
    spaces: dict[str, Tensor] = {}
    for name, encoder, used in (("semantic", "enc_sem", states), ("truthful", "enc_tru", states[1:])):
        weights = [artifact.tensors[f"{chosen}:{encoder}.{n}"].float() for n in range(4)]
        together = torch.cat(used)
        # The losses see directions alone
        codes = torch.nn.functional.normalize(encode(together, weights), dim=1)
        spaces |= {f"{name}_before": plane(together), f"{name}_after": plane(codes)}
    kinds = torch.arange(3).repeat_interleave(len(states[0]))
    triplets = torch.arange(len(states[0])).repeat(3)
    answers = len(states[0])
    return KnowledgeView(
        **spaces,
        semantic_kinds=kinds,
        truthful_kinds=kinds[answers:],
        semantic_triplets=triplets,
        truthful_triplets=triplets[answers:],
    )


def plane(points: Tensor) -> Tensor:
    """(N, 2): points (N, d) on their first two principal axes, the largest place on each being positive."""
    centred = (points - points.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    found: Tensor = centred @ axes
    largest: Tensor = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found.mul(largest.sign()).float()
